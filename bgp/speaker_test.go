package bgp

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// recorder is a Sink that remembers.
type recorder struct {
	mu     sync.Mutex
	routes map[netip.Prefix]Route
	calls  int
	alarms []Alarm
}

func newRecorder() *recorder { return &recorder{routes: map[netip.Prefix]Route{}} }

func (r *recorder) Learned(route Route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.routes[route.Prefix] = route
	r.calls++
}

func (r *recorder) Withdrawn(p netip.Prefix) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.routes, p)
	r.calls++
}

func (r *recorder) Alarm(a Alarm) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.alarms = append(r.alarms, a)
}

func (r *recorder) has(prefixes ...string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range prefixes {
		if _, ok := r.routes[netip.MustParsePrefix(p)]; !ok {
			return false
		}
	}
	return true
}

func (r *recorder) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.routes)
}

func (r *recorder) alarmed(kind AlarmKind, words ...string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.alarms, func(a Alarm) bool {
		return a.Kind == kind && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(a.Text, w) })
	})
}

// eventually waits until what is true.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// freePort is a TCP port that is free at both addresses of a loopback pair.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func loopback(n int) netip.Addr { return netip.AddrFrom4([4]byte{127, 9, 0, byte(n)}) }

// startLoopback starts speaker n of AS asn at 127.9.0.n.
func startLoopback(t testing.TB, n int, asn uint32, port int, sink Sink) *Speaker {
	t.Helper()
	s, err := Start(t.Context(), Config{
		ASN: asn, RouterID: loopback(n), ListenAddresses: []netip.Addr{loopback(n)}, ListenPort: port,
		HoldTime: 9 * time.Second, RestartTime: 5 * time.Second, Log: quiet,
	}, sink)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(false); err != nil {
			t.Error(err)
		}
	})
	return s
}

// toLoopback is speaker from's peer at 127.9.0.to; the one with the smaller number waits.
func toLoopback(from, to int, asn uint32, port int) Peer {
	return Peer{Address: loopback(to), Port: port, ASN: asn, Source: loopback(from), Passive: from < to}
}

func prefixes(all ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range all {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTwoSpeakers(t *testing.T) {
	port, sink1, sink2 := freePort(t), newRecorder(), newRecorder()
	one, two := startLoopback(t, 1, 64512, port, sink1), startLoopback(t, 2, 64512, port, sink2)
	do(t, one.SetPeers([]Peer{toLoopback(1, 2, 64512, port)}))
	do(t, two.SetPeers([]Peer{toLoopback(2, 1, 64512, port)}))
	eventually(t, "a peer that waits for Announce", func() bool { st := one.Peers(); return len(st) == 1 && st[0].State == "down" })
	do(t, one.Announce(prefixes("10.10.1.0/26", "10.10.1.64/26")))
	do(t, two.Announce(prefixes("10.10.2.0/26")))
	eventually(t, "routes both ways", func() bool { return sink1.has("10.10.2.0/26") && sink2.has("10.10.1.0/26", "10.10.1.64/26") })
	<-one.Synced()
	<-two.Synced()

	r := two.Routes()
	if len(r) != 2 || r[0].NextHop != loopback(1) || r[0].From != loopback(1) || r[0].Stale || r[0].ASPath != nil {
		t.Errorf("routes of two: %+v", r)
	}
	eventually(t, "counts", func() bool {
		st := one.Peers()[0]
		return st.State == "up" && st.Info == "Established" && st.IPv4 == Counts{Received: 1, Accepted: 1, Announced: 2}
	})

	do(t, one.Announce(prefixes("10.10.1.64/26")))
	eventually(t, "the withdrawal", func() bool { return !sink2.has("10.10.1.0/26") && sink2.has("10.10.1.64/26") })

	// Our own block, and a part of it, from the peer: known to the Sink as alarms only, until it is not ours any more.
	do(t, two.Announce(prefixes("10.10.2.0/26", "10.10.1.64/26", "10.10.1.65/32")))
	eventually(t, "the alarms", func() bool {
		return sink1.alarmed(ForeignOrigin, "our block 10.10.1.64/26") && sink1.alarmed(ForeignOrigin, "10.10.1.65/32, a part of our block 10.10.1.64/26")
	})
	if sink1.count() != 1 {
		t.Errorf("one learned %v", one.Routes())
	}
	do(t, one.Announce(nil))
	eventually(t, "what is not ours any more", func() bool { return sink1.has("10.10.1.64/26", "10.10.1.65/32") })
	do(t, one.Announce(prefixes("10.10.1.64/26")))
	eventually(t, "what is ours again", func() bool { return sink1.count() == 1 })

	do(t, two.SetPeers(nil))
	eventually(t, "nothing left", func() bool { return sink1.count() == 0 && sink2.count() == 0 })
}

func TestSetPeersTouchesOnlyWhatDiffers(t *testing.T) {
	port, sink1, sink2 := freePort(t), newRecorder(), newRecorder()
	one, two := startLoopback(t, 1, 64512, port, sink1), startLoopback(t, 2, 64513, port, sink2)
	do(t, one.Announce(prefixes("10.10.1.0/26", "192.0.2.0/24")))
	do(t, two.Announce(prefixes("10.10.2.0/26", "198.51.100.0/24", "198.51.100.0/25")))
	p := toLoopback(1, 2, 64513, port)
	do(t, one.SetPeers([]Peer{p}))
	do(t, two.SetPeers([]Peer{toLoopback(2, 1, 64512, port)}))
	eventually(t, "all routes", func() bool { return sink1.count() == 3 && sink2.count() == 2 })
	since, calls := one.Peers()[0].Since, sink1.calls

	do(t, one.SetPeers([]Peer{p}))
	if got := one.Peers()[0].Since; got != since || sink1.calls != calls {
		t.Error("the same set again changed something")
	}

	p.Import = []Filter{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Min: 25, Max: 32}}
	p.Communities = []string{"65001:100", "65001:1:2"}
	do(t, one.SetPeers([]Peer{p}))
	eventually(t, "the filters' work", func() bool { return sink1.count() == 2 && !sink1.has("198.51.100.0/25") })
	if sink1.alarmed(Refused) {
		t.Error("an alarm about what a filter rejected")
	}
	eventually(t, "communities", func() bool {
		r := two.Routes()
		return len(r) == 2 && slices.Equal(r[0].Communities, p.Communities) && slices.Equal(r[0].ASPath, []uint32{64512})
	})

	p.Import, p.AllowedPrefixes, p.Communities = nil, prefixes("10.0.0.0/8", "10.10.0.0/16"), nil
	do(t, one.SetPeers([]Peer{p}))
	eventually(t, "what is allowed", func() bool {
		return sink1.count() == 1 && sink1.has("10.10.2.0/26") && sink1.alarmed(Refused, "198.51.100.0/25")
	})
	p.AllowedPrefixes = nil
	do(t, one.SetPeers([]Peer{p}))
	eventually(t, "all routes again", func() bool { return sink1.count() == 3 && sink2.count() == 2 })

	p.Export = []Filter{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Min: 24, Max: 32}}
	do(t, one.SetPeers([]Peer{p}))
	eventually(t, "the export filter's work", func() bool { return sink1.count() == 3 && sink2.count() == 1 && sink2.has("10.10.1.0/26") })
	if got := one.Peers()[0].IPv4.Announced; got != 1 {
		t.Errorf("%d prefixes are announced", got)
	}
	do(t, one.Announce(prefixes("10.10.1.0/26", "192.0.2.0/24", "192.0.2.0/25", "203.0.113.0/24")))
	eventually(t, "what the filter has nothing against", func() bool { return sink2.count() == 2 && sink2.has("203.0.113.0/24") })
	p.Export = nil
	do(t, one.SetPeers([]Peer{p}))
	eventually(t, "all that we announce", func() bool { return sink2.count() == 4 })
	if got := one.Peers()[0].Since; got != since {
		t.Errorf("a change of filters changed the session: %s, then %s", since, got)
	}
}

func TestMaxPrefixes(t *testing.T) {
	port, sink1, sink2 := freePort(t), newRecorder(), newRecorder()
	one, two := startLoopback(t, 1, 64512, port, sink1), startLoopback(t, 2, 64513, port, sink2)
	p := toLoopback(1, 2, 64513, port)
	p.MaxPrefixes = 2
	do(t, one.Announce(nil))
	do(t, two.Announce(prefixes("10.10.2.0/26", "10.10.3.0/26")))
	do(t, one.SetPeers([]Peer{p}))
	do(t, two.SetPeers([]Peer{toLoopback(2, 1, 64512, port)}))
	eventually(t, "two routes", func() bool { return sink1.count() == 2 })
	do(t, two.Announce(prefixes("10.10.2.0/26", "10.10.3.0/26", "10.10.4.0/26")))
	eventually(t, "the alarm", func() bool { return sink1.alarmed(Limit, "more than 2 prefixes") })
	if !sink1.has("10.10.2.0/26", "10.10.3.0/26") || sink1.count() != 2 {
		t.Errorf("kept %v", one.Routes())
	}
	do(t, two.Announce(prefixes("10.10.3.0/26", "10.10.4.0/26")))
	eventually(t, "the freed place to be taken", func() bool { return sink1.has("10.10.3.0/26", "10.10.4.0/26") && sink1.count() == 2 })
}

func TestClosed(t *testing.T) {
	s := startLoopback(t, 1, 64512, freePort(t), newRecorder())
	do(t, s.Close(true))
	do(t, s.Close(false))
	if err := s.Announce(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Announce: %v", err)
	}
	if err := s.SetPeers(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("SetPeers: %v", err)
	}
	s.Peers()
	s.Routes()
}

// TestManyPrefixes logs what 100,000 prefixes cost, both speakers in one process.
func TestManyPrefixes(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	const n = 100_000
	var all []netip.Prefix
	for i := range n {
		all = append(all, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 14), byte(i >> 6), byte(i << 2)}), 30))
	}
	port, sink1, sink2 := freePort(t), newRecorder(), newRecorder()
	one, two := startLoopback(t, 1, 64512, port, sink1), startLoopback(t, 2, 64512, port, sink2)
	do(t, one.Announce(nil))
	before := heap()
	start := time.Now()
	do(t, two.Announce(all))
	announced, told := heap(), time.Since(start)
	start = time.Now()
	do(t, one.SetPeers([]Peer{toLoopback(1, 2, 64512, port)}))
	do(t, two.SetPeers([]Peer{toLoopback(2, 1, 64512, port)}))
	deadline := time.Now().Add(time.Minute)
	for sink1.count() < n && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if got := sink1.count(); got != n {
		t.Fatalf("learned %d of %d", got, n)
	}
	took := time.Since(start)
	t.Logf("%d prefixes: announced in %s (%d MB), session and learning %s, %d MB on top for both speakers and the test's copy",
		n, told.Round(time.Millisecond), (announced-before)>>20, took.Round(time.Millisecond), (heap()-announced)>>20)
	runtime.KeepAlive(one)
	runtime.KeepAlive(two)
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
