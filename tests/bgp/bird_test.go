package bgp

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/bgp"
)

// Our speaker is router 1, BIRD router 2.

const (
	ourAS   = 64512
	theirAS = 64513
)

// bird is BIRD 2 in a router.
type bird struct {
	*router
	*daemon
	control string
}

// bird starts BIRD with protocols that the test gives. A protocol bgp from `ours` needs only its session and channels.
func (r *router) bird(config string) *bird {
	t := r.net.t
	t.Helper()
	b := &bird{router: r, control: filepath.Join(r.net.dir, "bird.ctl")}
	path := r.net.write("bird.conf", fmt.Sprintf(birdBase, r.v4)+config)
	b.daemon = r.start(program(t, "bird", "bird2"), "-f", "-c", path, "-s", b.control, "-P", filepath.Join(r.net.dir, "bird.pid"))
	eventually(t, "BIRD to answer", func() bool { _, err := b.ask("show status"); return err == nil })
	return b
}

const birdBase = `
log stderr all;
router id %s;
protocol device {}
protocol static mine4 { ipv4; route 10.10.2.0/26 blackhole; }
protocol static mine6 { ipv6; route 2001:db8:10:2::/122 blackhole; }
template bgp ours {
	hold time 9; connect retry time 1; connect delay time 1; error wait time 1, 2;
	graceful restart on; graceful restart time 5;
	enforce first as off;
}
`

func (b *bird) ask(command string) (string, error) {
	return b.exec(program(b.net.t, "birdc", "bird2"), "-s", b.control, command)
}

// must is ask that fails the test.
func (b *bird) must(command string) string {
	b.net.t.Helper()
	out, err := b.ask(command)
	if err != nil {
		b.net.t.Fatalf("birdc %s: %v\n%s", command, err, out)
	}
	return out
}

// configure replaces the protocols.
func (b *bird) configure(config string) {
	b.net.t.Helper()
	path := b.net.write("bird.conf", fmt.Sprintf(birdBase, b.v4)+config)
	if out := b.must(fmt.Sprintf("configure %q", path)); !strings.Contains(out, "econfigur") {
		b.net.t.Fatal(out)
	}
}

// route is BIRD's route to a prefix with its attributes; "" if it has none.
func (b *bird) route(p netip.Prefix) string {
	out, err := b.ask(fmt.Sprintf("show route %s all", p))
	if err != nil || !strings.Contains(out, "BGP.") {
		return ""
	}
	return out
}

func (b *bird) has(p netip.Prefix, words ...string) bool {
	route := b.route(p)
	return route != "" && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(route, w) })
}

const exportMine = `import all; export where source = RTS_STATIC; next hop self;`

// session4 is a protocol with an IPv4 session to us.
func session4(as uint32, options string) string {
	return fmt.Sprintf(`protocol bgp v4 from ours { local 192.0.2.2 as %d; neighbor 192.0.2.1 as %d; direct; %s
		ipv4 { %s }; }
`, as, ourAS, options, exportMine)
}

func to(n int, as uint32) bgp.Peer { return bgp.Peer{Address: v4(n), ASN: as} }

func TestBIRDRoutes(t *testing.T) {
	for _, kind := range []struct {
		name string
		as   uint32
	}{{"iBGP", ourAS}, {"eBGP", theirAS}} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			_, r := newNetwork(t, 2)
			b := r[1].bird(fmt.Sprintf(`
protocol bgp v4 from ours { local 192.0.2.2 as %[1]d; neighbor 192.0.2.1 as %[2]d; direct;
	ipv4 { %[3]s }; ipv6 { %[3]s next hop address 2001:db8::2; }; }
protocol bgp v6 from ours { disabled; local 2001:db8::2 as %[1]d; neighbor 2001:db8::1 as %[2]d; direct;
	ipv6 { %[3]s }; }
`, kind.as, ourAS, exportMine))
			s := r[0].speak(ourAS)
			p := to(2, kind.as)
			p.Communities = []string{"65001:100", "65001:1:2"}
			p6 := p
			p6.Address = v6(2)
			s.setPeers(p)
			s.announce(block4(1), block6(1))

			eventually(t, "routes from BIRD", func() bool { return s.has(block4(2), block6(2)) })
			check := func(p netip.Prefix, next netip.Addr) {
				t.Helper()
				got := s.route(p)
				if got.NextHop != next || len(got.ASPath) != map[string]int{"iBGP": 0, "eBGP": 1}[kind.name] {
					t.Errorf("learned %+v", got)
				}
			}
			check(block4(2), v4(2))
			check(block6(2), v6(2)) // over the IPv4 session
			eventually(t, "routes in BIRD", func() bool {
				return b.has(block4(1), "BGP.next_hop: 192.0.2.1", "(65001,100)", "(65001, 1, 2)") && b.has(block6(1), "BGP.next_hop: 2001:db8::1")
			})
			if got := s.peer(v4(2)); got.IPv4 != (bgp.Counts{Received: 1, Accepted: 1, Announced: 1}) || got.IPv6 != got.IPv4 || got.Info != "Established" {
				t.Errorf("status %+v", got)
			}
			eventually(t, "everything from everybody", s.isSynced)

			b.must("disable mine4")
			eventually(t, "BIRD's withdrawal", func() bool { return !s.has(block4(2)) })
			s.announce(block6(1))
			eventually(t, "our withdrawal", func() bool { return !b.has(block4(1)) })

			// The same over IPv6.
			b.must("disable v4")
			b.must("enable v6")
			s.setPeers(p6)
			eventually(t, "a route from BIRD over IPv6", func() bool { return s.has(block6(2)) && s.route(block6(2)).From == v6(2) })
			check(block6(2), v6(2))
			eventually(t, "a route in BIRD over IPv6", func() bool { return b.has(block6(1), "BGP.next_hop: 2001:db8::1") })
		})
	}
}

func TestBIRDPassword(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	b := r[1].bird(session4(ourAS, `password "other";`))
	s := r[0].speak(ourAS)
	p := to(2, ourAS)
	p.Password = "secret"
	s.setPeers(p)
	s.announce(block4(1))
	eventually(t, "the alarm", func() bool { return s.alarmed(bgp.Session, "the passwords differ") })
	if got := s.peer(v4(2)); got.State != "start" || !strings.Contains(got.LastError, "passwords differ") {
		t.Errorf("status %+v", got)
	}
	p.Password = "other"
	s.setPeers(p)
	eventually(t, "the session", func() bool { return s.has(block4(2)) && b.has(block4(1)) })
	if got := s.peer(v4(2)); got.LastError != "" {
		t.Errorf("status %+v", got)
	}

	// BIRD dials, so the listening socket must know the password.
	p.Passive = true
	s.setPeers(p)
	eventually(t, "the session that BIRD begins", func() bool { return s.has(block4(2)) && s.up(v4(2)) })

	// Without a password on both sides: the old one is forgotten, by the listening socket too.
	p.Password = ""
	s.setPeers(p)
	b.configure(session4(ourAS, ""))
	eventually(t, "the session without password", func() bool { return s.has(block4(2)) && s.up(v4(2)) && b.has(block4(1)) })
}

func TestBIRDWrongAS(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	r[1].bird(session4(64999, ""))
	s := r[0].speak(ourAS)
	s.setPeers(to(2, theirAS))
	s.announce(block4(1))
	eventually(t, "the alarm", func() bool { return s.alarmed(bgp.Session, "bad peer as") })
	if got := s.peer(v4(2)); got.State != "start" || got.LastError == "" {
		t.Errorf("status %+v", got)
	}
}

func TestBIRDImport(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	b := r[1].bird(session4(theirAS, "") + `
protocol static hijack { disabled; ipv4; route 10.10.1.0/26 blackhole; route 10.10.1.7/32 blackhole; }
protocol static everything { disabled; ipv4; route 0.0.0.0/0 blackhole; }
protocol static bad { disabled; ipv4; route 203.0.113.0/24 blackhole; route 10.10.9.0/28 blackhole; }
protocol static more { disabled; ipv4; route 10.10.3.0/26 blackhole; route 10.10.4.0/26 blackhole; route 10.10.5.0/26 blackhole; }
`)
	s := r[0].speak(ourAS)
	p := to(2, theirAS)
	p.AllowedPrefixes = prefixes("10.10.0.0/16")
	p.Import = []bgp.Filter{{Prefix: netip.MustParsePrefix("10.10.9.0/24"), Min: 27, Max: 32}}
	p.MaxPrefixes = 5 // with room for the hijacker's two
	s.setPeers(p)
	s.announce(block4(1))
	eventually(t, "the session", func() bool { return s.has(block4(2)) })

	b.must("enable hijack")
	eventually(t, "the alarms", func() bool {
		return s.alarmed(bgp.ForeignOrigin, "our block 10.10.1.0/26") && s.alarmed(bgp.ForeignOrigin, "10.10.1.7/32, a part of")
	})
	b.must("enable everything")
	eventually(t, "the alarm", func() bool { return s.alarmed(bgp.Default, "0.0.0.0/0") })
	b.must("enable bad")
	eventually(t, "the alarm", func() bool {
		return s.alarmed(bgp.Refused, "203.0.113.0/24")
	})
	if s.alarmed(bgp.Refused, "10.10.9.0/28") {
		t.Error("an alarm about what a filter rejected")
	}
	if got := s.status().Routes; len(got) != 1 || got[0].Prefix != block4(2) {
		t.Errorf("learned %v", got)
	}

	b.must("enable more")
	eventually(t, "the alarm", func() bool { return s.alarmed(bgp.Limit, "more than 5 prefixes") })
	eventually(t, "two of three", func() bool { return len(s.status().Routes) == 3 })
	if !s.has(block4(2)) || !s.up(v4(2)) {
		t.Error("the old route or the session was lost")
	}

	p.AllowDefault, p.AllowedPrefixes, p.MaxPrefixes = true, nil, 0
	s.setPeers(p)
	eventually(t, "the default route, allowed, and the rest", func() bool { return s.has(prefixes("0.0.0.0/0", "203.0.113.0/24", "10.10.5.0/26")...) })
	if !b.has(block4(1)) {
		t.Error("the hijacker lost our route")
	}
}

// TestBIRDKeepsOurRoutes: our process dies and comes back, and BIRD never has no route.
func TestBIRDKeepsOurRoutes(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	b := r[1].bird(fmt.Sprintf(`
protocol bgp v4 from ours { local 192.0.2.2 as %[1]d; neighbor 192.0.2.1 as %[2]d; direct;
	ipv4 { %[3]s }; ipv6 { %[3]s next hop address 2001:db8::2; }; }
`, theirAS, ourAS, exportMine))
	s := r[0].speak(ourAS)
	s.setPeers(to(2, theirAS))
	s.announce(block4(1), block6(1))
	eventually(t, "routes in BIRD", func() bool { return b.has(block4(1)) && b.has(block6(1)) && s.has(block4(2), block6(2)) })
	eventually(t, "everything from everybody", s.isSynced)

	watch := b.watch(block4(1), block6(1))
	s.kill()
	eventually(t, "BIRD to notice", func() bool { return !strings.Contains(b.must("show protocols v4"), "Established") })
	s = r[0].speak(ourAS)
	s.setPeers(to(2, theirAS)) // before Announce, as an agent may: End-of-RIB must wait for it
	s.announce(block4(1), block6(1))
	eventually(t, "the end of the restart", func() bool {
		out := b.must("show protocols all v4")
		return s.has(block4(2), block6(2)) && s.isSynced() && strings.Contains(out, "Established") && !strings.Contains(out, "graceful restart active")
	})
	if missing := watch(); missing != "" {
		t.Error(missing)
	}

	// Gone for good, gracefully: kept for the restart time. Not gracefully: not kept.
	start := time.Now()
	s.close(true)
	eventually(t, "BIRD to notice", func() bool { return !strings.Contains(b.must("show protocols v4"), "Established") })
	if !b.has(block4(1)) {
		t.Error("BIRD dropped our route at once")
	}
	eventually(t, "the end of the restart time", func() bool { return !b.has(block4(1)) })
	if d := time.Since(start); d < restartTime-time.Second {
		t.Errorf("BIRD kept our route for %s", d)
	}
	s.kill()
	s = r[0].speak(ourAS)
	s.setPeers(to(2, theirAS))
	s.announce(block4(1))
	eventually(t, "the route in BIRD", func() bool { return b.has(block4(1)) })
	start = time.Now()
	s.close(false)
	eventually(t, "BIRD to drop our route", func() bool { return !b.has(block4(1)) })
	if d := time.Since(start); d > restartTime-time.Second {
		t.Errorf("BIRD kept our route for %s", d)
	}
}

// watch looks at routes until the result is called, which says what was missing.
func (b *bird) watch(all ...netip.Prefix) func() string {
	stop, result := make(chan struct{}), make(chan string)
	go func() {
		missing := ""
		for {
			select {
			case <-stop:
				result <- missing
				return
			case <-time.After(30 * time.Millisecond):
			}
			for _, p := range all {
				if missing == "" && !b.has(p) {
					missing = fmt.Sprintf("BIRD lost %s for a while", p)
				}
			}
		}
	}()
	return func() string { close(stop); return <-result }
}

// TestBIRDRestarts: BIRD dies and comes back, and our Sink hears nothing of it.
func TestBIRDRestarts(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	const birdRestarts = 12 * time.Second // what BIRD asks for: GoBGP lets a broken session rest for 5 s
	config := session4(ourAS, "graceful restart time 12;")
	b := r[1].bird(config)
	s := r[0].speak(ourAS)
	s.setPeers(to(2, ourAS))
	s.announce(block4(1))
	eventually(t, "the session", func() bool { return s.has(block4(2)) })
	told := s.told()

	b.kill()
	eventually(t, "the route to be stale", func() bool { routes := s.status().Routes; return len(routes) == 1 && routes[0].Stale && !s.up(v4(2)) })
	b = r[1].bird(config)
	eventually(t, "the route to be fresh", func() bool { routes := s.status().Routes; return len(routes) == 1 && !routes[0].Stale && s.up(v4(2)) })
	if got := s.told(); got != told {
		t.Errorf("the Sink was called %d times", got-told)
	}

	start := time.Now()
	b.kill()
	eventually(t, "the withdrawal", func() bool { return !s.has(block4(2)) })
	if d := time.Since(start); d < birdRestarts-time.Second {
		t.Errorf("the route was withdrawn after %s", d)
	}
	if got := s.told(); got != told+1 {
		t.Errorf("the Sink was called %d times", got-told)
	}
}

func TestBIRDTTLSecurity(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	b := r[1].bird(session4(theirAS, "ttl security on;"))
	s := r[0].speak(ourAS)
	p := to(2, theirAS)
	p.TTLSecurity, p.Passive = 1, true // BIRD dials, so the listening socket's TTL counts too
	s.setPeers(p)
	s.announce(block4(1))
	eventually(t, "the session", func() bool { return s.has(block4(2)) && b.has(block4(1)) })

	b.configure(session4(theirAS, "")) // sends with TTL 1 now, as eBGP does
	eventually(t, "the kernel to drop what comes with a low TTL", func() bool {
		out, err := r[0].exec("nstat", "-asz", "TcpExtTCPMinTTLDrop")
		return err == nil && !strings.Contains(out, "TcpExtTCPMinTTLDrop             0 ")
	})
	if s.up(v4(2)) {
		t.Error("a session with a low TTL")
	}
	p.TTLSecurity = 0
	s.setPeers(p)
	eventually(t, "the session without TTL security", func() bool { return s.up(v4(2)) && s.has(block4(2)) })
}
