package maps

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// pinnedMaps pins the dataplane's maps, small, in a bpffs of the test's own.
func pinnedMaps(t *testing.T) *Maps {
	t.Helper()
	root := bpffs.Mount(t)
	dir := filepath.Join(root, "node")
	if _, err := Open(dir); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("open of nothing: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object()))
	if err != nil {
		t.Fatal(err)
	}
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		s := spec.Maps[name]
		if s.Type != ebpf.RingBuf {
			s.MaxEntries = min(s.MaxEntries, 1024)
		}
		m, err := ebpf.NewMap(s)
		if err != nil {
			t.Fatalf("create map %s: %v", name, err)
		}
		defer m.Close()
		if err := m.Pin(bpf.MapPath(dir, name)); err != nil {
			t.Fatalf("pin map %s: %v", name, err)
		}
	}
	m, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// A quota that a pod has keeps its limit; without one there is ErrNotFound, and removing is no error.
func TestQuota(t *testing.T) {
	m := pinnedMaps(t)
	if _, err := m.Quota(7); !errors.Is(err, ErrNotFound) {
		t.Errorf("quota of nobody: %v", err)
	}
	for _, limit := range []uint32{100, 200} {
		if err := m.NewQuota(7, limit); err != nil {
			t.Fatal(err)
		}
	}
	if q, err := m.Quota(7); err != nil || q != (Quota{Limit: 100}) {
		t.Errorf("%+v (%v), want the first limit", q, err)
	}
	for range 2 {
		if err := m.RemoveQuota(7); err != nil {
			t.Error(err)
		}
	}
}

// Loaded programs of an earlier build have no place for what newer ones count.
func TestCounts(t *testing.T) {
	m := pinnedMaps(t)
	path := bpf.MapPath(m.dir, bpf.DataplaneMapCaracalCounts)
	small, err := ebpf.NewMap(&ebpf.MapSpec{Name: "caracal_counts", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: bpf.VerdictSpace})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	perCPU := make([]bpf.DataplaneCount, ebpf.MustPossibleCPU())
	perCPU[0] = bpf.DataplaneCount{Packets: 5, Bytes: 500}
	if err := errors.Join(small.Put(uint32(1), perCPU), os.Remove(path), small.Pin(path)); err != nil {
		t.Fatal(err)
	}
	counts, err := m.Counts()
	if err != nil || len(counts) != len(bpf.Hooks)*len(bpf.Verdicts) || counts[1].Packets != 5 || counts[len(counts)-1].Packets != 0 {
		t.Errorf("%d counts: %v, %v", len(counts), counts, err)
	}
}

func TestRoutes(t *testing.T) {
	m := pinnedMaps(t)
	want := []Route{
		{Prefix: netip.MustParsePrefix("10.244.0.0/26"), Kind: RouteBlackhole},
		{Prefix: netip.MustParsePrefix("10.244.0.7/32"), Kind: RouteLocalPod, IfIndex: 7},
		{Prefix: netip.MustParsePrefix("10.244.0.64/26"), Kind: RouteRemote, IfIndex: 2, NextHop: netip.MustParseAddr("192.0.2.2"), MTU: 1450},
		{Prefix: netip.MustParsePrefix("2001:db8:244::40/122"), Kind: RouteRemote, IfIndex: 2, NextHop: netip.MustParseAddr("2001:db8::2")},
	}
	for _, r := range want {
		if err := m.PutRoute(r); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Routes(); err != nil || !slices.Equal(got, want) {
		t.Errorf("routes %v (%v), want %v", got, err, want)
	}
	for range 2 {
		if err := m.RemoveRoute(want[0].Prefix); err != nil {
			t.Error(err)
		}
	}
	if got, err := m.Routes(); err != nil || !slices.Equal(got, want[1:]) {
		t.Errorf("after a removal: %v (%v)", got, err)
	}
}

func TestAddress(t *testing.T) {
	for _, s := range []string{"0.0.0.0", "10.1.2.3", "::1", "2001:db8::1"} {
		a := netip.MustParseAddr(s)
		if got := FromAddress(Address(a)); got != a {
			t.Errorf("%s came back as %s", a, got)
		}
	}
	if got := FromAddress([16]byte{}); got.IsValid() {
		t.Errorf(":: is the address %s", got)
	}
}

// A new prefix is, until the next epoch, what the longest one that covers it is, whatever else is staged with it.
func TestPeers(t *testing.T) {
	m := pinnedMaps(t)
	prefix := netip.MustParsePrefix
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	epoch := func() {
		t.Helper()
		_, err := m.RaiseEpoch()
		must(err)
	}
	want := func(want ...Peer) {
		t.Helper()
		if got, err := m.Peers(); err != nil || !slices.Equal(got, want) {
			t.Errorf("peers %+v (%v), want %+v", got, err, want)
		}
	}
	wide := prefix("10.0.0.0/8")
	must(m.StagePeers([]Peer{{Prefix: wide, Next: 5}}))
	want(Peer{wide, 0, 5})
	epoch()
	want(Peer{wide, 5, 0})
	must(m.SettlePeers([]netip.Prefix{wide}))
	want(Peer{wide, 5, 5})

	narrow, pod, six := prefix("10.244.0.0/16"), prefix("10.244.0.7/32"), prefix("2001:db8::7/128")
	must(m.StagePeers([]Peer{{Prefix: narrow, Next: 6}, {Prefix: pod, Next: 7}, {Prefix: six, Next: 8}, {Prefix: wide, Next: 9}}))
	want(Peer{wide, 5, 9}, Peer{narrow, 5, 6}, Peer{pod, 5, 7}, Peer{six, 0, 8})
	epoch()
	must(m.SettlePeers([]netip.Prefix{wide, narrow, pod, six}))
	want(Peer{wide, 9, 9}, Peer{narrow, 6, 6}, Peer{pod, 7, 7}, Peer{six, 8, 8})
	for a, identity := range map[string]uint32{"10.244.0.7": 7, "10.244.0.8": 6, "10.1.1.1": 9, "192.0.2.1": 0, "2001:db8::7": 8} {
		addr := netip.MustParseAddr(a)
		if p, err := m.Peer(addr); err != nil || p != (Peer{netip.PrefixFrom(addr, addr.BitLen()), identity, identity}) {
			t.Errorf("%s: %+v (%v), want identity %d", a, p, err, identity)
		}
	}
	must(m.RemovePeers([]netip.Prefix{narrow, prefix("10.9.0.0/16"), pod, narrow}))
	want(Peer{wide, 9, 9}, Peer{six, 8, 8})

	var many []Peer
	for i := range 2000 {
		many = append(many, Peer{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 32), Next: 1})
	}
	if err := m.StagePeers(many); !errors.Is(err, ErrFull) {
		t.Errorf("more peers than there is room for: %v", err)
	}
}

func TestPolicy(t *testing.T) {
	m := pinnedMaps(t)
	want := []PolicyRow{
		{PolicyKey: PolicyKey{1, 0, BitsAny, 0, 0}, Action: PolicyDeny, Rule: 1},
		{PolicyKey: PolicyKey{1, 0, BitsProtocol, 6, 0}, Action: PolicyAllow, Rule: 2},
		{PolicyKey: PolicyKey{1, 0, BitsProtocol + 13, 6, 8000}, Action: PolicyAllow, Log: true, Rule: 3},
		{PolicyKey: PolicyKey{1, 0, BitsPort, 6, 8000}, SourcePorts: true, Rule: 1 << 31},
		{PolicyKey: PolicyKey{1, 1 << 20, BitsAny, 0, 0}, Action: PolicyAllow},
		{PolicyKey: PolicyKey{1 << 31, IdentitySourcePorts, BitsPort, 17, 65535}, Action: PolicyAllow, Rule: 4},
	}
	written := slices.Clone(want)
	written[2].Port, written[0].Port, written[0].Protocol = 8007, 99, 17 // what does not count
	if err := m.PutPolicy(written); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Policy(); err != nil || !slices.Equal(got, want) {
		t.Errorf("rows %+v (%v), want %+v", got, err, want)
	}
	for _, d := range []struct {
		identity     uint32
		protocol     uint8
		port, source uint16
		want         PolicyRow
	}{
		{0, 6, 8007, 0, PolicyRow{PolicyKey: PolicyKey{Policy: 1}, Action: PolicyAllow, Log: true, Rule: 3}},
		{0, 6, 8008, 0, PolicyRow{PolicyKey: PolicyKey{Policy: 1}, Action: PolicyAllow, Rule: 2}},
		{0, 17, 8007, 0, PolicyRow{PolicyKey: PolicyKey{Policy: 1}, Action: PolicyDeny, Rule: 1}},
		{99, 17, 8007, 0, PolicyRow{PolicyKey: PolicyKey{Policy: 1}, Action: PolicyDeny, Rule: 1}},
		{1 << 20, 17, 8007, 0, PolicyRow{PolicyKey: PolicyKey{Policy: 1, Identity: 1 << 20}, Action: PolicyAllow}},
		{0, 6, 8000, 1, PolicyRow{}},
	} {
		got, err := m.Decide(1, d.identity, d.protocol, d.port, d.source)
		if got != d.want || errors.Is(err, ErrNotFound) != (d.want == PolicyRow{}) {
			t.Errorf("%+v: %+v (%v)", d, got, err)
		}
	}
	if _, err := m.Decide(3, 0, 6, 80, 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("a policy id without rows decides: %v", err)
	}
	source := PolicyKey{1 << 31, IdentitySourcePorts, BitsPort, 6, 4000}
	if err := m.PutPolicy([]PolicyRow{{PolicyKey: source, Action: PolicyAllow, Rule: 5}}); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Decide(1, 0, 6, 8000, 4000); err != nil || got.Action != PolicyAllow || got.Rule != 5 {
		t.Errorf("by source port: %+v (%v)", got, err)
	}
	if err := m.RemovePolicy([]PolicyKey{source}); err != nil {
		t.Fatal(err)
	}
	for _, bits := range []uint8{0, 63, 65, 79, 97} {
		bad := PolicyKey{Policy: 1, Bits: bits}
		if err := m.PutPolicy([]PolicyRow{want[0], {PolicyKey: bad}}); err == nil {
			t.Errorf("a row with %d bits was taken", bits)
		}
		if err := m.RemovePolicy([]PolicyKey{bad}); err == nil {
			t.Errorf("a row with %d bits was removed", bits)
		}
	}
	for range 2 {
		if err := m.RemovePolicy([]PolicyKey{written[2].PolicyKey, {Policy: 7, Bits: BitsAny}, want[4].PolicyKey}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Policy(); err != nil || !slices.Equal(got, append(slices.Clone(want[:2]), want[3], want[5])) {
		t.Errorf("after a removal: %+v (%v)", got, err)
	}
	many := make([]PolicyRow, 2000)
	for i := range many {
		many[i] = PolicyRow{PolicyKey: PolicyKey{Policy: uint32(i), Bits: BitsAny}, Action: PolicyAllow}
	}
	if err := m.PutPolicy(many); !errors.Is(err, ErrFull) {
		t.Errorf("more rows than there is room for: %v", err)
	}
}

// A negative sum is what a missed flow took back: nothing.
func TestRules(t *testing.T) {
	m := pinnedMaps(t)
	pinned, err := m.pinned(bpf.DataplaneMapCaracalRules)
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	cpus := ebpf.MustPossibleCPU()
	for rule, packets := range map[uint32]int64{1: 5, 2: -3} {
		perCPU := make([]bpf.DataplaneCount, cpus)
		perCPU[0] = bpf.DataplaneCount{Packets: uint64(packets + 1), Bytes: 60}
		perCPU[cpus-1].Packets--
		if err := pinned.Put(rule, perCPU); err != nil {
			t.Fatal(err)
		}
	}
	want := []RuleCount{{1, 5, 60}, {2, 0, 60}}
	if got, err := m.Rules(); err != nil || !slices.Equal(got, want) {
		t.Errorf("rules %+v (%v), want %+v", got, err, want)
	}
	if err := m.RemoveRules([]uint32{3, 1}); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Rules(); err != nil || !slices.Equal(got, want[1:]) {
		t.Errorf("after a removal: %+v (%v)", got, err)
	}
}

func FuzzEvent(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(make([]byte, binary.Size(bpf.DataplaneEvent{})))
	f.Add(bytes.Repeat([]byte{255}, binary.Size(bpf.DataplaneEvent{})))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := decodeEvent(raw, time.Now(), 1)
		if (err == nil) != (len(raw) == binary.Size(bpf.DataplaneEvent{})) {
			t.Fatalf("%d bytes: %+v, %v", len(raw), e, err)
		}
		if _, err := json.Marshal(e); err != nil {
			t.Fatal(err)
		}
	})
}

func TestServices(t *testing.T) {
	m := pinnedMaps(t)
	vip, host := netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00::1")
	all := []Service{
		{Protocol: "tcp", Port: 30080, Name: "default/web"}, {Address: vip, Protocol: "udp", Port: 53, Name: "kube-system/dns"},
		{Address: host, Protocol: "sctp", Port: 80, Name: strings.Repeat("x", MaxServiceName)},
	}
	put := slices.Clone(all)
	put[2].Name += "y"
	if err := m.PutServices(put); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Services(); err != nil || !slices.Equal(got, all) {
		t.Errorf("%+v, want %+v (%v)", got, all, err)
	}
	for _, test := range []struct {
		to       netip.AddrPort
		protocol string
		own      bool
		want     string
	}{
		{netip.AddrPortFrom(vip, 53), "udp", false, "kube-system/dns"}, {netip.AddrPortFrom(vip, 53), "tcp", true, ""},
		{netip.AddrPortFrom(host, 30080), "tcp", true, "default/web"}, {netip.AddrPortFrom(host, 30080), "tcp", false, ""},
	} {
		got, err := m.FindService(test.to, test.protocol, test.own)
		if got.Name != test.want || (test.want == "") != errors.Is(err, ErrNotFound) {
			t.Errorf("%s/%s: %+v, want %q (%v)", test.to, test.protocol, got, test.want, err)
		}
	}
	for range 2 {
		if err := m.RemoveServices(all); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Services(); err != nil || len(got) != 0 {
		t.Errorf("%+v after removal (%v)", got, err)
	}
	if err := m.PutServices([]Service{{Protocol: "none", Port: 1}}); err == nil {
		t.Error("took a protocol that there is not")
	}
}
