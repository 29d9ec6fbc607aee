package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// until waits for a condition.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	within(t, patience, what, ok)
}

// within waits for a condition at most so long.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain for: %s", limit, what)
		}
	}
}

// wantFlow fails unless the flow is known.
func (n *node) wantFlow(protocol string, a, b netip.AddrPort) maps.Flow {
	n.t.Helper()
	f, ok := n.flow(protocol, a, b)
	if !ok {
		flows, _ := n.maps.Flows()
		n.t.Fatalf("no flow %s %s %s among %+v", protocol, a, b, flows)
	}
	return f
}

// handshake opens a TCP connection by TEST_RUN.
func (b *bench) handshake(x, y netip.AddrPort) {
	b.t.Helper()
	for _, s := range []struct {
		fromA bool
		flags string
	}{{true, "S"}, {false, "SA"}, {true, "A"}} {
		f := tcp(b.a, x, y, s.flags, 0)
		run := b.fromA
		if !s.fromA {
			f, run = tcp(b.b, y, x, s.flags, 0), b.fromB
		}
		check(b.t, f, run(f), "forward_pod")
	}
}

// An epoch makes each leg be judged again, and a leg refreshes only itself.
func TestEpochOfLegs(t *testing.T) {
	b := newBench(t, loader.Config{})
	for _, ends := range [][2]netip.AddrPort{b.v4pair(), b.v6pair()} {
		there, back := udp(b.a, ends[0], ends[1], 1), udp(b.b, ends[1], ends[0], 1)
		for range 2 {
			check(t, there, b.fromA(there), "forward_pod")
			check(t, back, b.fromB(back), "forward_pod")
		}
		old := b.state().Epoch
		want := func(sent, received uint32) {
			t.Helper()
			if f := b.wantFlow("udp", ends[0], ends[1]); f.Sent.Epoch != sent || f.Received.Epoch != received {
				t.Errorf("epochs %d and %d, want %d and %d", f.Sent.Epoch, f.Received.Epoch, sent, received)
			}
		}
		want(old, old)
		if _, err := b.maps.RaiseEpoch(); err != nil {
			t.Fatal(err)
		}
		want(old, old)
		check(t, there, b.fromA(there), "forward_pod")
		want(old+1, old)
		check(t, back, b.fromB(back), "forward_pod")
		want(old+1, old+1)
		if f := b.wantFlow("udp", ends[0], ends[1]); f.Sent.Packets != 3 || f.Received.Packets != 3 {
			t.Errorf("%d and %d packets, want 3 and 3", f.Sent.Packets, f.Received.Packets)
		}
	}
}

// Once one direction was judged in an epoch the other one is not, unless its packets were the host's own: these always pass,
// and say nothing of the pod's.
func TestJudgedOncePerEpoch(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		there, back := udp(b.a, at(x, 4000), at(y, 80), 1), udp(b.b, at(y, 80), at(x, 4000), 1)
		allowed := []maps.PolicyRow{row(100, 0, 0, 0, 0, allow, 1)}
		b.rows(allowed...)
		b.policy(b.a, 100, 0)
		check(t, there, b.fromA(there), "forward_pod")
		check(t, back, b.fromB(back), "forward_pod")
		fromA := func() { t.Helper(); check(t, there, b.fromA(there), "forward_pod") }
		fromB := func() { t.Helper(); check(t, back, b.fromB(back), "forward_pod") }
		for _, order := range [][2]func(){{fromA, fromB}, {fromB, fromA}} {
			b.rows(allowed...)
			b.raise()
			order[0]()
			if err := b.maps.RemovePolicy([]maps.PolicyKey{allowed[0].PolicyKey}); err != nil { // who asks is denied
				t.Fatal(err)
			}
			order[1]()
		}
		b.raise()
		check(t, back, b.fromB(back), "drop_policy_unknown")

		if x.Is6() {
			return // the node has no IPv6 address
		}
		b.policy(b.a, 0, 0)
		there, back = udp(b.a, at(x, 4000), at(outside, 53), 1), udp(b.a, at(outside, 53), at(x, 4000), 1)
		fromHost := func() result { return b.run("to_pod", back, skb{ifindex: uint32(b.a.commit.IfIndex)}) }
		check(t, there, b.fromA(there), "stack_routed")
		check(t, back, fromHost(), "forward_from_stack")
		b.policy(b.a, 9, 0)
		check(t, back, fromHost(), "forward_from_stack")
		check(t, there, b.fromA(there), "drop_policy_egress")
	})
}

// Policy is judged as opener's egress and responder's ingress, whoever speaks.
func TestOrientation(t *testing.T) {
	for name, pair := range map[string]func(*bench) [2]netip.AddrPort{"v4": (*bench).v4pair, "v6": (*bench).v6pair} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, loader.Config{})
			ends := pair(b)
			x, y := ends[0], ends[1]
			data, reply := tcp(b.a, x, y, "A", 10), tcp(b.b, y, x, "A", 10)
			takeover := tcp(b.b, y, x, "S", 0)

			b.policy(b.b, 9, 0) // b may open nothing
			b.handshake(x, y)
			check(t, reply, b.fromB(reply), "forward_pod")
			check(t, takeover, b.fromB(takeover), "drop_policy_egress")
			if f := b.wantFlow("tcp", x, y); f.State != "open" || f.Opener != x {
				t.Errorf("after a denied SYN of the responder the flow is %+v", f)
			}
			check(t, data, b.fromA(data), "forward_pod")
			check(t, reply, b.fromB(reply), "forward_pod")

			b.policy(b.b, 0, 9) // nothing may be opened to b: cut in both directions
			check(t, reply, b.fromB(reply), "drop_policy_ingress")
			check(t, data, b.fromA(data), "drop_policy_ingress")
			b.policy(b.b, 0, 0)
			check(t, data, b.fromA(data), "forward_pod")
			b.policy(b.a, 9, 0)
			check(t, reply, b.fromB(reply), "drop_policy_egress")
			check(t, data, b.fromA(data), "drop_policy_egress")
			b.policy(b.a, 0, 9) // a's ingress has no say in what a opened
			check(t, reply, b.fromB(reply), "forward_pod")
			check(t, data, b.fromA(data), "forward_pod")
			b.policy(b.a, 0, 0)

			// An allowed SYN of the other side takes the ports over.
			check(t, takeover, b.fromB(takeover), "forward_pod")
			if f := b.wantFlow("tcp", x, y); f.State != "opening" || f.Opener != y {
				t.Errorf("after a SYN of the responder the flow is %+v", f)
			}

			// In the middle of a connection, without a flow: either orientation will do, and the flow takes it.
			b.purge(t)
			b.policy(b.b, 9, 0)
			check(t, reply, b.fromB(reply), "forward_pod")
			if f := b.wantFlow("tcp", x, y); f.Opener != x {
				t.Errorf("opener is %s, want %s", f.Opener, x)
			}
			check(t, takeover, b.fromB(takeover), "drop_policy_egress")
			b.purge(t)
			b.policy(b.a, 9, 0)
			check(t, reply, b.fromB(reply), "drop_policy_egress")
			synack := tcp(b.b, y, x, "SA", 0)
			check(t, synack, b.fromB(synack), "drop_policy_egress")
			b.policy(b.a, 0, 0)

			// Protocols without a handshake, and without ports.
			for _, f := range [][2][]byte{
				{udp(b.a, x, y, 1), udp(b.b, y, x, 1)},
				{sctp(b.a, x, y, 1), sctp(b.b, y, x, 2)},
				{echo(b.a, x.Addr(), y.Addr(), 7, false), echo(b.b, y.Addr(), x.Addr(), 7, true)},
			} {
				b.purge(t)
				check(t, f[1], b.fromB(f[1]), "drop_policy_egress")
				check(t, f[0], b.fromA(f[0]), "forward_pod")
				check(t, f[1], b.fromB(f[1]), "forward_pod")
			}
			gre, back := raw(b.a, x.Addr(), y.Addr(), 47, make([]byte, 8)), raw(b.b, y.Addr(), x.Addr(), 47, make([]byte, 8))
			check(t, back, b.fromB(back), "drop_policy_egress")
			check(t, gre, b.fromA(gre), "stack_protocol")
			check(t, back, b.fromB(back), "stack_protocol")
		})
	}
}

// A connection that was silent for longer than its timeout goes on, in the orientation that is allowed.
func TestIdleConnection(t *testing.T) {
	b := newBench(t, loader.Config{Timeouts: loader.Timeouts{TCP: time.Millisecond, Opening: time.Hour}})
	x, y := b.v4pair()[0], b.v4pair()[1]
	b.policy(b.b, 9, 0)
	b.handshake(x, y)
	idle := func() bool { return b.wantFlow("tcp", x, y).Idle > 2*time.Millisecond }
	until(t, "the flow to be idle", idle)
	// Only a new epoch, or five seconds, take the established path's trust away.
	if _, err := b.maps.RaiseEpoch(); err != nil {
		t.Fatal(err)
	}
	reply := tcp(b.b, y, x, "A", 10)
	check(t, reply, b.fromB(reply), "forward_pod")
	if f := b.wantFlow("tcp", x, y); f.Opener != x {
		t.Errorf("opener is %s, want %s", f.Opener, x)
	}
	if s := b.state(); s.Flows != 0 {
		t.Errorf("%d confirmed flows, want none: only one side spoke", s.Flows)
	}
}

// What ends a connection, and what may follow it on the same ports.
func TestTCPStates(t *testing.T) {
	b := newBench(t, loader.Config{})
	x, y := b.v4pair()[0], b.v4pair()[1]
	state := func(want string) {
		t.Helper()
		if f := b.wantFlow("tcp", x, y); f.State != want {
			t.Errorf("state %s, want %s", f.State, want)
		}
	}
	step := func(p *pod, flags string) {
		t.Helper()
		if p == b.a {
			f := tcp(p, x, y, flags, 0)
			check(t, f, b.fromA(f), "forward_pod")
			return
		}
		f := tcp(p, y, x, flags, 0)
		check(t, f, b.fromB(f), "forward_pod")
	}
	step(b.a, "S")
	state("opening")
	step(b.a, "S")
	state("opening")
	step(b.b, "RA") // refused
	state("closed")
	step(b.a, "S")
	step(b.b, "SA")
	state("answered")
	step(b.a, "A")
	state("open")
	step(b.a, "FA")
	state("open")
	step(b.b, "FA")
	state("closing")
	step(b.a, "A")
	step(b.a, "S") // the same ports again
	state("opening")
	step(b.b, "SA")
	step(b.a, "A")
	step(b.a, "R")
	state("closed")
	if s := b.state(); s.Flows != 1 {
		t.Errorf("%d confirmed flows, want 1", s.Flows)
	}

	// SCTP: an INIT after the end starts anew.
	for _, c := range []struct {
		p     *pod
		chunk byte
		state string
	}{{b.a, 1, "opening"}, {b.b, 2, "open"}, {b.a, 10, "open"}, {b.b, 3, "open"}, {b.a, 14, "closing"}, {b.a, 1, "opening"}, {b.b, 2, "open"}, {b.b, 6, "closed"}, {b.a, 1, "opening"}} {
		src, dst, run := x, y, b.fromA
		if c.p == b.b {
			src, dst, run = y, x, b.fromB
		}
		f := sctp(c.p, src, dst, c.chunk)
		check(t, f, run(f), "forward_pod")
		if got := b.wantFlow("sctp", x, y); got.State != c.state {
			t.Errorf("after chunk %d: %s, want %s", c.chunk, got.State, c.state)
		}
	}
}

// A flood of half-open connections displaces only its own kind.
func TestSYNFlood(t *testing.T) {
	b := newBench(t, loader.Config{})
	x, y := b.v4pair()[0], b.v4pair()[1]
	b.handshake(x, y)
	flood := tcp(b.a, at(x.Addr(), 1), at(y.Addr(), 443), "S", 0)
	b.do(func() error {
		for i := range 50_000 {
			flood[34], flood[35], flood[37] = byte(i>>8), byte(i), byte(i>>16)
			if r, err := b.exec("from_pod", flood, skb{ifindex: uint32(b.a.commit.IfIndex)}); err != nil || r.action != actionRedirect {
				return fmt.Errorf("SYN %d: action %d, %w", i, r.action, err)
			}
		}
		return nil
	})
	if got := b.counted("from_pod", 50_000); got != "forward_pod" {
		t.Errorf("flood: %s", got)
	}
	if f := b.wantFlow("tcp", x, y); !f.Confirmed {
		t.Errorf("flow %+v is not confirmed any more", f)
	}
	if s := b.state(); s.Flows != 1 {
		t.Errorf("%d confirmed flows, want 1", s.Flows)
	}
	c := b.churn()
	if c.Opened != 50_001 || c.Confirmed != 1 || c.Opening > c.MaxOpens || c.Opening < c.MaxOpens/2 || c.Displaced != uint64(50_000-c.Opening) {
		t.Errorf("churn %+v after 50,000 SYNs and a connection", c)
	}
	b.handshake(at(x.Addr(), 60_001), y)
}

// talk opens and confirms a UDP flow of a with b and returns the verdicts of both packets.
func (b *bench) talk(port uint16) (string, string) {
	b.t.Helper()
	x, y := at(b.a.v4, port), b.v4pair()[1]
	return b.fromA(udp(b.a, x, y, 1)).verdict, b.fromB(udp(b.b, y, x, 1)).verdict
}

// A full table refuses new flows and keeps the old ones; expired ones make room.
func TestFullTable(t *testing.T) {
	const room = 16
	const life = 100 * time.Millisecond
	b := newBench(t, loader.Config{MaxFlows: room, Timeouts: loader.Timeouts{UDP: life}})
	b.quota(t, b.a, 1000)
	x, y := b.a.v4, b.b.v4
	for id := range uint16(room) {
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
		f = echo(b.b, y, x, id, true)
		check(t, f, b.fromB(f), "forward_pod")
	}
	if s := b.state(); s.Flows != room {
		t.Fatalf("%d confirmed flows, want %d", s.Flows, room)
	}
	refused := echo(b.a, x, y, 999, false)
	check(t, refused, b.fromA(refused), "drop_flows_full")
	probe := udp(b.a, at(outside, 1), at(b.b.v4, 80), 1)
	check(t, probe, b.stackToB(probe, 0), "forward_from_stack") // a process of the host arrives all the same
	check(t, probe, b.stackToB(probe, 77), "drop_flows_full")
	for id := range uint16(room) {
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
	}

	b.purge(t)
	if s := b.state(); s.Flows != 0 {
		t.Fatalf("%d confirmed flows after purge, want none", s.Flows)
	}
	for round := range 4 {
		for i := range uint16(room) {
			if there, back := b.talk(1000*uint16(round+1) + i); there != "forward_pod" || back != "forward_pod" {
				t.Fatalf("round %d, flow %d: %s, %s", round, i, there, back)
			}
		}
		until(t, "flows to expire", func() bool {
			flows, err := b.maps.Flows()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range flows {
				if f.Idle <= life+8*time.Millisecond {
					return false
				}
			}
			return true
		})
	}
	if s := b.state(); s.Flows > room {
		t.Errorf("%d confirmed flows, want %d at most", s.Flows, room)
	}
}

// quota gives a pod another limit.
func (n *node) quota(t testing.TB, p *pod, limit uint32) {
	t.Helper()
	if err := n.maps.RemoveQuota(uint32(p.commit.IfIndex)); err != nil {
		t.Fatal(err)
	}
	if err := n.maps.NewQuota(uint32(p.commit.IfIndex), limit); err != nil {
		t.Fatal(err)
	}
}

func (n *node) held(t testing.TB, p *pod) uint32 {
	t.Helper()
	q, err := n.maps.Quota(uint32(p.commit.IfIndex))
	if err != nil {
		t.Fatal(err)
	}
	return q.Flows
}

// A pod holds no more flows than its quota, and expired ones do not keep it from opening others, however empty the table.
func TestQuota(t *testing.T) {
	const limit = 40
	const life = 50 * time.Millisecond
	b := newBench(t, loader.Config{MaxFlows: 128, Timeouts: loader.Timeouts{UDP: life, ICMP: time.Hour}})
	b.quota(t, b.a, limit)
	x, y := b.a.v4, b.b.v4
	// Half-open flows are not counted, so they are refused when they are confirmed.
	for id := range uint16(limit + 5) {
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
	}
	for id := range uint16(limit + 5) {
		f := echo(b.b, y, x, id, true)
		want := "forward_pod"
		if id >= limit {
			want = "drop_quota"
		}
		check(t, f, b.fromB(f), want)
	}
	f := echo(b.a, x, y, 500, false)
	check(t, f, b.fromA(f), "drop_quota")
	if got := b.held(t, b.a); got != limit {
		t.Errorf("a holds %d flows, want %d", got, limit)
	}
	f = echo(b.b, y, x, 501, false) // b has a quota of its own
	check(t, f, b.fromB(f), "forward_pod")
	b.purge(t)
	if got := b.held(t, b.a); got != 0 {
		t.Errorf("a holds %d flows after purge", got)
	}

	for i := range uint16(limit) {
		if there, back := b.talk(1000 + i); there != "forward_pod" || back != "forward_pod" {
			t.Fatalf("flow %d: %s, %s", i, there, back)
		}
	}
	until(t, "flows to expire", func() bool { return b.wantFlow("udp", at(x, 1000+limit-1), at(y, 80)).Idle > life+8*time.Millisecond })
	for try := 1; ; try++ {
		there, _ := b.talk(3000)
		if there == "forward_pod" {
			break
		}
		if there != "drop_quota" || try == 20 {
			t.Fatalf("new flow after all had expired, try %d: %s", try, there)
		}
	}

	if err := commit.RemovePod(b.maps, b.a.commit); err != nil {
		t.Fatal(err)
	}
	if _, err := b.maps.Quota(uint32(b.a.commit.IfIndex)); !errors.Is(err, maps.ErrNotFound) {
		t.Errorf("quota of a removed pod: %v", err)
	}
	if err := commit.RemovePod(b.maps, b.b.commit); err != nil {
		t.Fatal(err)
	}
	if s := b.state(); s.Flows != 0 {
		t.Errorf("%d confirmed flows after both pods were removed", s.Flows)
	}
}

// Many packets of few flows on all CPUs at once, with flows removed under them: no packet is sent to a pod that it is
// not for, every flow is counted once, and nothing stays behind.
func TestRaces(t *testing.T) {
	b := newBench(t, loader.Config{MaxFlows: 64, Timeouts: loader.Timeouts{UDP: time.Millisecond, TCP: 2 * time.Millisecond, Closed: time.Microsecond}})
	pods := []*pod{b.a, b.b, b.quietPod("c", 3), b.quietPod("d", 4)}
	type packet struct {
		frame []byte
		skb   skb
		to    []byte
	}
	var packets []packet
	for i, p := range pods {
		for j, q := range pods {
			if i == j {
				continue
			}
			port := func(k int) uint16 { return uint16(100 + k) }
			for _, f := range [][]byte{
				udp(p, at(p.v4, port(i)), at(q.v4, port(j)), 1), udp(p, at(p.v6, port(i)), at(q.v6, port(j)), 1),
				tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "S", 0), tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "SA", 0),
				tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "A", 0), tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "A", 0),
				tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "FA", 0), tcp(p, at(p.v4, port(i)), at(q.v4, port(j)), "R", 0),
			} {
				packets = append(packets, packet{f, skb{ifindex: uint32(p.commit.IfIndex)}, q.commit.MAC})
			}
		}
	}
	var wg sync.WaitGroup
	errs := make(chan error, 16)
	stop := make(chan struct{})
	for w := range 6 {
		wg.Go(func() {
			errs <- b.ns.Do(func() error {
				r := rand.New(rand.NewPCG(uint64(w), 1))
				for range 20_000 {
					p := packets[r.IntN(len(packets))]
					got, err := b.exec("from_pod", p.frame, p.skb)
					if err != nil {
						return err
					}
					if got.action == actionRedirect && !bytes.Equal(got.out[:6], p.to) {
						return fmt.Errorf("packet for %x was sent to %x", p.to, got.out[:6])
					}
				}
				return nil
			})
		})
	}
	var background sync.WaitGroup
	background.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := b.maps.PurgeFlows(pods[rand.IntN(len(pods))].commit.Addrs); err != nil {
				errs <- err
				return
			}
			if _, err := b.maps.SweepFlows(0, 64); err != nil {
				errs <- err
				return
			}
			if _, err := b.maps.SweepOpens(); err != nil {
				errs <- err
				return
			}
			if _, err := b.maps.RaiseEpoch(); err != nil {
				errs <- err
				return
			}
		}
	})
	wg.Wait()
	close(stop)
	background.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	flows, err := b.maps.Flows()
	if err != nil {
		t.Fatal(err)
	}
	confirmed := uint32(0)
	for _, f := range flows {
		if f.Confirmed {
			confirmed++
		}
	}
	held := uint32(0)
	for _, p := range pods {
		held += b.held(t, p)
	}
	if s := b.state(); s.Flows != confirmed || held != confirmed {
		t.Errorf("%d confirmed flows in the table, %d in the state, %d in the quotas", confirmed, s.Flows, held)
	}
	if c := b.churn(); c.Opened == 0 || c.Displaced != 0 || c.Swept == 0 {
		t.Errorf("churn %+v: some were swept, and there was room for all that opened", c)
	}
	for _, p := range pods {
		if _, err := b.maps.PurgeFlows(p.commit.Addrs); err != nil {
			t.Fatal(err)
		}
		if n := b.held(t, p); n > uint32(len(pods))*8 {
			t.Errorf("pod %s holds %d flows", p.name, n)
		}
	}
	if s := b.state(); s.Flows != 0 {
		t.Errorf("%d confirmed flows after purge", s.Flows)
	}
	for _, p := range pods {
		if n := b.held(t, p); n != 0 {
			t.Errorf("pod %s holds %d flows after purge", p.name, n)
		}
	}
}
