package bgp

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

var goodConfig = Config{ASN: 64512, RouterID: netip.MustParseAddr("192.0.2.1")}

func TestConfig(t *testing.T) {
	tests := []struct {
		change func(*Config)
		want   string // in the error; "": none
	}{
		{func(c *Config) {}, ""},
		{func(c *Config) { c.ASN = 4200000000 }, ""},
		{func(c *Config) { c.ASN = 0 }, "ASN 0 is reserved"},
		{func(c *Config) { c.ASN = 23456 }, "ASN 23456 is reserved"},
		{func(c *Config) { c.RouterID = netip.Addr{} }, "RouterID"},
		{func(c *Config) { c.RouterID = netip.MustParseAddr("2001:db8::1") }, "RouterID"},
		{func(c *Config) { c.NextHop6 = netip.MustParseAddr("2001:db8::1") }, ""},
		{func(c *Config) { c.NextHop6 = netip.MustParseAddr("fe80::1") }, "NextHop6"},
		{func(c *Config) { c.NextHop6 = c.RouterID }, "NextHop6"},
		{func(c *Config) { c.ListenPort = -1 }, ""},
		{func(c *Config) { c.ListenPort = -2 }, "ListenPort"},
		{func(c *Config) { c.ListenPort = 65536 }, "ListenPort"},
		{func(c *Config) { c.ListenAddresses = []netip.Addr{c.RouterID, c.RouterID} }, "twice"},
		{func(c *Config) { c.ListenAddresses = []netip.Addr{{}} }, "ListenAddresses"},
		{func(c *Config) { c.HoldTime = 2 * time.Second }, "HoldTime"},
		{func(c *Config) { c.HoldTime = 3500 * time.Millisecond }, "HoldTime"},
		{func(c *Config) { c.RestartTime = 4096 * time.Second }, "RestartTime"},
		{func(c *Config) { c.RestartTime = time.Millisecond }, "RestartTime"},
	}
	for _, tt := range tests {
		c := goodConfig
		tt.change(&c)
		checkError(t, c.setDefaults(), tt.want)
	}
}

func checkError(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Error(err)
	case want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want)):
		t.Errorf("got %v, want ErrInvalid about %q", err, want)
	}
}

func TestPeer(t *testing.T) {
	p4, p6 := netip.MustParsePrefix("10.10.0.0/16"), netip.MustParsePrefix("2001:db8::/32")
	tests := []struct {
		change func(*Peer)
		want   string
	}{
		{func(p *Peer) {}, ""},
		{func(p *Peer) { p.Address = netip.MustParseAddr("2001:db8::2") }, ""},
		{func(p *Peer) { p.Address = netip.Addr{} }, "Address"},
		{func(p *Peer) { p.Address = netip.MustParseAddr("fe80::1%eth0") }, "global address"},
		{func(p *Peer) { p.Address = netip.MustParseAddr("::ffff:192.0.2.2") }, "Address"},
		{func(p *Peer) { p.Port = 65536 }, "Port"},
		{func(p *Peer) { p.ASN = 0 }, "ASN"},
		{func(p *Peer) { p.Kind = 3 }, "Kind"},
		{func(p *Peer) { p.Source = netip.MustParseAddr("2001:db8::1") }, "Source"},
		{func(p *Peer) { p.Source = p.Address }, "Source"},
		{func(p *Peer) { p.Password = strings.Repeat("x", 80) }, ""},
		{func(p *Peer) { p.Password = strings.Repeat("x", 81) }, "Password"},
		{func(p *Peer) { p.RouteReflectorClient = true }, ""},
		{func(p *Peer) { p.RouteReflectorClient, p.ASN = true, 64513 }, "RouteReflectorClient"},
		{func(p *Peer) { p.ClusterID = netip.MustParseAddr("::1") }, "ClusterID"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 26, Max: 26}, {Prefix: p6, Min: 32, Max: 128}} }, ""},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 8}} }, "Import[0]"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 16, Max: 33}} }, "Import[0]"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4}} }, "Import[0]"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, FromPeers: true}} }, "FromPeers is for Export"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, Communities: []string{"x"}}} }, "Import[0]"},
		{func(p *Peer) { p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, Prepend: []uint32{64512}}} }, "changes what it rejects"},
		{func(p *Peer) {
			p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, Action: Accept, Prepend: []uint32{0}}}
		}, "AS 0 is reserved"},
		{func(p *Peer) {
			p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, Action: Accept, Prepend: slices.Repeat([]uint32{64512}, 11)}}
		}, "more than 10"},
		{func(p *Peer) {
			p.Import = []Filter{{Prefix: p4, Min: 16, Max: 16, Action: Accept, ASPath: []uint32{65001}, Prepend: []uint32{65002, 65003}}}
		}, "one AS only"},
		{func(p *Peer) {
			p.ASN, p.Export = 64513, []Filter{{Prefix: p4, Min: 16, Max: 16, Action: Accept, Prepend: []uint32{64512, 64512}}}
		}, ""},
		{func(p *Peer) {
			p.ASN, p.Export = 64513, []Filter{{Prefix: p4, Min: 16, Max: 16, Action: Accept, Prepend: []uint32{65001}}}
		}, "only our own, 64512"},
		{func(p *Peer) { p.Export = []Filter{{Prefix: p4, Min: 16, Max: 32}, {Prefix: p4, Min: 26, Max: 25}} }, "Export[1]"},
		{func(p *Peer) { p.Export = []Filter{{Prefix: netip.MustParsePrefix("10.10.0.1/16"), Min: 16, Max: 32}} }, "want 10.10.0.0/16"},
		{func(p *Peer) { p.AllowedPrefixes = []netip.Prefix{{}} }, "AllowedPrefixes"},
		{func(p *Peer) { p.Communities = []string{"65001:100", "1:2:3"} }, ""},
		{func(p *Peer) { p.Communities = []string{"65536:100"} }, "65536"},
		{func(p *Peer) { p.TTLSecurity, p.MultiHop = 1, 1 }, "exclude"},
		{func(p *Peer) { p.TTLSecurity = 255 }, "TTLSecurity"},
		{func(p *Peer) { p.MultiHop = 256 }, "MultiHop"},
		{func(p *Peer) { p.MaxPrefixes = -1 }, "MaxPrefixes"},
		{func(p *Peer) { p.KeepaliveTime = 90 * time.Second }, "KeepaliveTime"},
		{func(p *Peer) { p.HoldTime = time.Second }, "HoldTime"},
		{func(p *Peer) { p.RestartTime = time.Hour * 2 }, "RestartTime"},
	}
	c := goodConfig
	if err := c.setDefaults(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		p := Peer{Address: netip.MustParseAddr("192.0.2.2"), ASN: 64512}
		tt.change(&p)
		checkError(t, p.check(&c), tt.want)
	}
	c.ListenPort = -1
	checkError(t, Peer{Address: netip.MustParseAddr("192.0.2.2"), ASN: 64512, Passive: true}.check(&c), "nobody would ever dial")
}

// TestInvalidChangesNothing: one bad member, and the rest of the set is not taken either.
func TestInvalidChangesNothing(t *testing.T) {
	s := startLoopback(t, 1, 64512, freePort(t), newRecorder())
	good := Peer{Address: loopback(2), ASN: 64512, Passive: true}
	checkError(t, s.SetPeers([]Peer{good, {Address: loopback(3)}}), "127.9.0.3")
	checkError(t, s.SetPeers([]Peer{good, good}), "twice")
	checkError(t, s.Announce([]netip.Prefix{netip.MustParsePrefix("10.10.1.0/26"), default4}), "default route")
	checkError(t, s.Announce([]netip.Prefix{netip.MustParsePrefix("10.10.1.1/26")}), "10.10.1.0/26")
	checkError(t, s.Announce([]netip.Prefix{{}}), "prefix")
	if len(s.wanted) != 0 || s.announced != nil {
		t.Errorf("peers %v, announced %v", s.wanted, s.announced)
	}
	if _, err := Start(t.Context(), Config{}, newRecorder()); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if _, err := Start(t.Context(), goodConfig, nil); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	// A port that is taken is an error of Start, not of a goroutine later on.
	if second, err := Start(t.Context(), s.config, newRecorder()); err == nil {
		_ = second.Close(false)
		t.Error("two speakers listen on one port")
	}
}

func TestExpects(t *testing.T) {
	p := Peer{AllowedPrefixes: prefixes("10.10.0.0/16", "2001:db8::/32")}
	for prefix, want := range map[string]bool{
		"10.10.0.0/16": true, "10.10.2.0/26": true, "10.0.0.0/8": false, "192.0.2.0/24": false,
		"2001:db8:1::/48": true, "2001:db9::/32": false, "0.0.0.0/0": false, "::/0": false,
	} {
		if got := p.expects(netip.MustParsePrefix(prefix)); got != want {
			t.Errorf("expects %s: %v", prefix, got)
		}
	}
	if !(Peer{AllowDefault: true}).expects(default4) || (Peer{}).expects(default6) {
		t.Error("the default route")
	}
}

func TestBlocks(t *testing.T) {
	b := newBlocks(map[netip.Prefix]bool{netip.MustParsePrefix("10.10.1.0/26"): true, netip.MustParsePrefix("2001:db8::/122"): true})
	for prefix, want := range map[string]bool{
		"10.10.1.0/26": true, "10.10.1.63/32": true, "10.10.1.64/32": false, "10.10.1.0/25": false, "0.0.0.0/0": false,
		"2001:db8::3f/128": true, "2001:db8::40/128": false,
	} {
		if _, got := b.around(netip.MustParsePrefix(prefix)); got != want {
			t.Errorf("around %s: %v", prefix, got)
		}
	}
}

func TestBestPath(t *testing.T) {
	base := func(change func(*path)) *path {
		p := &path{Route: Route{From: loopback(1), ASPath: []uint32{65001}}, localPref: 100, length: 1, id: loopback(9)}
		change(p)
		return p
	}
	same := base(func(*path) {})
	for name, better := range map[string]*path{
		"local preference": base(func(p *path) { p.localPref, p.length = 200, 5 }),
		"AS path":          base(func(p *path) { p.ASPath, p.length, p.origin = nil, 0, 2 }),
		"router ID":        base(func(p *path) { p.id = loopback(8) }),
	} {
		if better.compare(same) >= 0 || same.compare(better) <= 0 {
			t.Errorf("%s does not decide", name)
		}
	}
	for name, worse := range map[string]*path{
		"origin":       base(func(p *path) { p.origin = 1 }),
		"MED":          base(func(p *path) { p.med = 1 }),
		"iBGP":         base(func(p *path) { p.internal = true }),
		"peer address": base(func(p *path) { p.From = loopback(2) }),
	} {
		if worse.compare(same) <= 0 || same.compare(worse) >= 0 {
			t.Errorf("%s does not decide", name)
		}
	}
	if other := base(func(p *path) { p.ASPath, p.med, p.id = []uint32{65002}, 1, loopback(8) }); other.compare(same) >= 0 {
		t.Error("MEDs of different neighbours were compared")
	}
}

func FuzzCommunities(f *testing.F) {
	for _, seed := range []string{"65001:100", "1:2:3", "", ":", "::", "65536:0", "-1:1", "+1:2", "1:2:3:4", "0x1:2", "4294967295:0:1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, c string) {
		standard, large, err := parseCommunities([]string{c})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v", c, err)
			}
			return
		}
		all := slices.Concat(standard, large)
		if len(all) != 1 {
			t.Fatalf("%q became %v", c, all)
		}
		again, againLarge, err := parseCommunities(all)
		if err != nil || !slices.Equal(slices.Concat(again, againLarge), all) {
			t.Errorf("%q became %v, and that %v, %v", c, all, again, err)
		}
	})
}

func FuzzMD5Refusals(f *testing.F) {
	f.Add([]byte("TcpExt: TCPMD5NotFound TCPTimeouts TCPMD5Failure\nTcpExt: 1 2 4\n"))
	f.Add([]byte("TcpExt: TCPMD5NotFound\n"))
	f.Fuzz(func(_ *testing.T, data []byte) { md5Refusals(data) })
}

func TestMD5Refusals(t *testing.T) {
	got := md5Refusals([]byte("IpExt: X\nTcpExt: TCPMD5NotFound TCPTimeouts TCPMD5Unexpected TCPMD5Failure\nTcpExt: 1 2 4 8\nIpExt: 3\n"))
	if got != 13 {
		t.Errorf("got %d", got)
	}
}
