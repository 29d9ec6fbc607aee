package dataplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	gomaps "maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
	"github.com/caracal-net/caracal/whatif"
)

// sight is a packet where a program sees it.
type sight struct {
	hook  string
	frame []byte
	skb
}

// conversation is a flow: the packets that open it, and those with which it goes on.
type conversation struct {
	name     string
	open, on []sight
}

// dialogues are flows of every protocol, seen at every hook, between pods a and b, pod r behind the uplink, the host and the
// outside.
func (b *bench) dialogues(x, y, far, world netip.Addr) []conversation {
	var (
		a, bb, r = b.a, b.b, b.r
		fromA    = func(f []byte) sight { return sight{"from_pod", f, skb{ifindex: uint32(a.commit.IfIndex)}} }
		fromB    = func(f []byte) sight { return sight{"from_pod", f, skb{ifindex: uint32(bb.commit.IfIndex)}} }
		fromNet  = func(f []byte) sight { return sight{"from_net", f, skb{ifindex: uint32(b.up)}} }
		toA      = func(f []byte) sight {
			return sight{"to_pod", f, skb{ifindex: uint32(a.commit.IfIndex), ingress: uint32(b.up)}}
		}
		toB = func(f []byte) sight {
			return sight{"to_pod", f, skb{ifindex: uint32(bb.commit.IfIndex), ingress: uint32(b.up)}}
		}
		fromHost = func(f []byte) sight { return sight{"to_pod", f, skb{ifindex: uint32(bb.commit.IfIndex)}} }
		toNet    = func(f []byte) sight {
			return sight{"to_net", f, skb{ifindex: uint32(b.up), ingress: uint32(a.commit.IfIndex)}}
		}
		one     = func(s ...sight) []sight { return s }
		port    = uint16(4000)
		all     []conversation
		add     = func(name string, open, on []sight) { all = append(all, conversation{name, open, on}) }
		pairUDP = func(from, to *pod, src, dst netip.Addr, d uint16) (there, back []byte) {
			port++
			return udp(from, at(src, port), at(dst, d), 8), udp(to, at(dst, d), at(src, port), 8)
		}
		connection = func(name string, from, to *pod, src, dst netip.Addr, d uint16, there, back func([]byte) sight) {
			port++
			s, t := at(src, port), at(dst, d)
			add(name, one(there(tcp(from, s, t, "S", 0)), back(tcp(to, t, s, "SA", 0)), there(tcp(from, s, t, "A", 0))),
				one(there(tcp(from, s, t, "A", 10)), back(tcp(to, t, s, "A", 10))))
		}
		datagrams = func(name string, from, to *pod, src, dst netip.Addr, d uint16, there, back func([]byte) sight) {
			q, ans := pairUDP(from, to, src, dst, d)
			add(name, one(there(q), back(ans)), one(there(q), back(ans)))
		}
	)
	for _, d := range []uint16{80, 443, 8080} {
		connection(fmt.Sprintf("a to b, TCP %d", d), a, bb, x, y, d, fromA, fromB)
		connection(fmt.Sprintf("r to b, TCP %d", d), r, bb, far, y, d, fromNet, fromB)
		connection(fmt.Sprintf("a to r, TCP %d", d), a, r, x, far, d, fromA, fromNet)
	}
	connection("b to a", bb, a, y, x, 80, fromB, fromA)
	connection("from outside by the stack", r, bb, world, y, 80, toB, fromB)
	connection("to the outside", a, r, x, world, 443, fromA, toA)
	connection("translated to b", a, bb, x, y, 81, toB, fromB)
	connection("host to b", r, bb, world.Next(), y, 80, fromHost, fromB)
	datagrams("a to b, UDP", a, bb, x, y, 53, fromA, fromB)
	datagrams("b to a, UDP", bb, a, y, x, 53, fromB, fromA)
	datagrams("r to b, UDP", r, bb, far, y, 53, fromNet, fromB)
	datagrams("translated to r", a, r, x, far, 53, toNet, fromNet)
	q, _ := pairUDP(a, bb, x, y, 53)
	add("unanswered", one(fromA(q)), one(fromA(q)))
	q, _ = pairUDP(r, bb, far, y, 53)
	add("unanswered from r", one(fromNet(q)), one(fromNet(q)))
	syn := tcp(a, at(x, 3999), at(y, 80), "S", 0)
	add("half open", one(fromA(syn)), one(fromA(syn)))
	add("echo", one(fromA(echo(a, x, y, 7, false)), fromB(echo(bb, y, x, 7, true))), one(fromA(echo(a, x, y, 7, false)), fromB(echo(bb, y, x, 7, true))))
	add("echo from r", one(fromNet(echo(r, far, y, 8, false)), fromB(echo(bb, y, far, 8, true))), one(fromNet(echo(r, far, y, 8, false)), fromB(echo(bb, y, far, 8, true))))
	add("echo reply alone", one(fromA(echo(a, x, y, 9, true))), one(fromA(echo(a, x, y, 9, true))))
	s, t := at(x, 5000), at(y, 9)
	add("sctp", one(fromA(sctp(a, s, t, 1)), fromB(sctp(bb, t, s, 2))), one(fromA(sctp(a, s, t, 0)), fromB(sctp(bb, t, s, 0))))
	gre, back := raw(a, x, y, layers.IPProtocolGRE, make([]byte, 8)), raw(bb, y, x, layers.IPProtocolGRE, make([]byte, 8))
	add("gre", one(fromA(gre), fromB(back)), one(fromA(gre), fromB(back)))
	return all
}

func flowName(f maps.Flow) string {
	return fmt.Sprintf("%s %s %s %d/%d", f.Protocol, f.Opener, f.Responder, f.ICMPType, f.ICMPCode)
}

// opened opens flows, and returns their names in the table of flows with what they are.
func (b *bench) opened(all []conversation) map[string]conversation {
	b.t.Helper()
	known := make(map[string]conversation)
	for _, e := range all {
		for _, s := range e.open {
			if r := b.run(s.hook, s.frame, s.skb); r.action == actionShot {
				b.t.Fatalf("%s: %s at %s", e.name, r.verdict, s.hook)
			}
		}
		flows, err := b.maps.Flows()
		if err != nil {
			b.t.Fatal(err)
		}
		before := len(known)
		for _, f := range flows {
			if _, ok := known[flowName(f)]; !ok {
				known[flowName(f)] = e
			}
		}
		if len(known) != before+1 {
			b.t.Fatalf("%s: %d flows, %d before: %+v", e.name, len(known), before, flows)
		}
	}
	return known
}

// stopped tells which flows policy does not let go on.
func (b *bench) stopped(flows map[string]conversation) []string {
	b.t.Helper()
	var names []string
	for name, e := range flows {
		cut := 0
		for _, s := range e.on {
			r := b.run(s.hook, s.frame, s.skb)
			if strings.HasPrefix(r.verdict, "drop_policy_") {
				cut++
			} else if r.action == actionShot {
				b.t.Fatalf("%s: %s at %s", e.name, r.verdict, s.hook)
			}
		}
		if cut != 0 && cut != len(e.on) {
			b.t.Errorf("%s: %d of %d directions are cut", e.name, cut, len(e.on))
		}
		if cut != 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// dump is what all maps hold, byte by byte, and the names of those that change by being looked at.
func (n *node) dump() map[string]map[string]string {
	n.t.Helper()
	all := make(map[string]map[string]string)
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		m, err := ebpf.LoadPinnedMap(bpf.MapPath(n.dir, name), nil)
		if err != nil {
			n.t.Fatal(err)
		}
		defer m.Close()
		if m.Type() == ebpf.RingBuf {
			continue
		}
		all[name] = make(map[string]string)
		var key []byte
		entries := m.Iterate()
		if m.Type() == ebpf.PerCPUArray || m.Type() == ebpf.PerCPUHash {
			var values [][]byte
			for entries.Next(&key, &values) {
				all[name][string(key)] = string(bytes.Join(values, nil))
			}
		} else {
			var value []byte
			for entries.Next(&key, &value) {
				all[name][string(key)] = string(value)
			}
		}
		if err := entries.Err(); err != nil {
			n.t.Fatalf("list %s: %v", name, err)
		}
	}
	return all
}

// whatIf asks, and checks that nothing changed on the node by it.
func (b *bench) whatIf(e *enforcer, inForce, candidate *policy.Model) (*whatif.Report, error) {
	b.t.Helper()
	events, err := b.maps.Events()
	if err != nil {
		b.t.Fatal(err)
	}
	defer events.Close()
	events.SetDeadline(time.Unix(1, 0))
	for err == nil {
		_, err = events.Read()
	}
	before := b.dump()
	var report *whatif.Report
	var failed error
	b.do(func() error {
		report, failed = whatif.Run(context.Background(), whatif.Config{Maps: b.maps, InForce: inForce, Candidate: candidate, Numbers: e.compiler.Numbers()})
		return nil
	})
	for name, now := range b.dump() {
		if diff := cmp.Diff(before[name], now); diff != "" {
			b.t.Errorf("%s is not what it was: %s", name, diff)
		}
	}
	if ev, err := events.Read(); !errors.Is(err, os.ErrDeadlineExceeded) {
		b.t.Errorf("the node told of something: %+v, %v", ev, err)
	}
	return report, failed
}

// What would be cut is what is cut then, at whatever hook its packets are seen; and asking changes nothing.
func TestWhatIf(t *testing.T) {
	tcpProto, udpProto := uint8(6), uint8(17)
	only := func(s selector.Selector, ingress, egress *policy.Rules) *policy.Policy {
		return &policy.Policy{ID: fmt.Sprintf("policy of %s", s), Selector: s, Ingress: ingress, Egress: egress}
	}
	named := func(name string) selector.Selector { return selector.In("name", name) }
	rules := func(r ...policy.Rule) *policy.Rules { return &policy.Rules{Rules: r} }
	port := func(action policy.Action, protocol *uint8, first, last uint16) policy.Rule {
		return policy.Rule{Action: action, Protocol: protocol, Destination: policy.Peer{Ports: []policy.Ports{{First: first, Last: last}}}}
	}
	any, none := policy.Rule{Action: policy.Allow}, policy.Rule{Action: policy.Deny}
	far := named("r")
	candidates := []struct {
		name     string
		policies []*policy.Policy
		cut      bool // some are, that pass before
	}{
		{"nothing", nil, false},
		{"deny all to b", []*policy.Policy{only(named("b"), rules(none), nil)}, true},
		{"deny all of b", []*policy.Policy{only(named("b"), rules(none), rules(none))}, true},
		{"no HTTP to b", []*policy.Policy{only(named("b"), rules(port(policy.Deny, &tcpProto, 80, 81), any), nil)}, true},
		{"only UDP from a", []*policy.Policy{only(named("a"), nil, rules(policy.Rule{Action: policy.Allow, Protocol: &udpProto}, none))}, true},
		{"not to r", []*policy.Policy{only(named("a"), nil, rules(policy.Rule{Action: policy.Deny, Destination: policy.Peer{Selector: &far}}, any))}, true},
		{"only from r", []*policy.Policy{only(named("b"), rules(policy.Rule{Action: policy.Allow, Source: policy.Peer{Selector: &far}}, none), nil)}, true},
		{"no ICMP", []*policy.Policy{only(selector.Selector{}, rules(policy.Rule{Action: policy.Deny, Protocol: ptr(uint8(1))}, policy.Rule{Action: policy.Deny, Protocol: ptr(uint8(58))}, any), nil)}, true},
		{"by source port", []*policy.Policy{only(named("b"), rules(policy.Rule{Action: policy.Deny, Protocol: &tcpProto, Source: policy.Peer{Ports: []policy.Ports{{First: 4000, Last: 4003}}}}, any), nil)}, true},
	}
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		remote, world := b.r.v4, stranger4
		if x.Is6() {
			remote, world = b.r.v6, stranger6
		}
		b.r.name = "r"
		endpoints := make(map[string]*policy.Endpoint)
		for _, p := range []*pod{b.a, b.b} {
			endpoints[p.name] = endpointOf(p)
		}
		endpoints["r"] = &policy.Endpoint{ID: "r", Addresses: []netip.Addr{remote}, Labels: map[string]string{"name": "r"}}
		model := func(policies ...*policy.Policy) *policy.Model {
			return &policy.Model{Endpoints: endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: policies}}}
		}
		e := b.enforce(b.a, b.b)
		inForce := []*policy.Policy{only(selector.In("name", "a", "b"), rules(port(policy.Deny, &tcpProto, 8080, 8080), any), rules(any))}
		inForce[0].ID = "first"
		for _, c := range candidates {
			t.Run(c.name, func(t *testing.T) {
				b.t, b.node.t = t, t
				b.purge(t)
				e.set(model())
				flows := b.opened(b.dialogues(x, y, remote, world))
				e.set(model(inForce...))
				denied := b.stopped(flows)
				if len(denied) != 2 {
					t.Fatalf("in force %q are denied, want those to port 8080 of b", denied)
				}
				wanted := model(append(slices.Clone(c.policies), inForce...)...)
				report, err := b.whatIf(e, model(inForce...), wanted)
				if err != nil {
					t.Fatal(err)
				}
				if report.Flows != len(flows) || report.Denied != len(denied) || len(report.Unjudged) != 0 {
					t.Errorf("%d flows, %d denied, unjudged %+v; want %d, %d and none", report.Flows, report.Denied, report.Unjudged, len(flows), len(denied))
				}
				e.set(wanted)
				now := b.stopped(flows)
				want := slices.DeleteFunc(slices.Clone(now), func(s string) bool { return slices.Contains(denied, s) })
				got := []string{}
				for _, f := range report.Cut {
					got = append(got, flowName(f.Flow))
					if f.RuleID == 0 || f.Rule.Rule == nil || !strings.HasPrefix(f.Rule.Policy, "policy of") || f.Verdict != "drop_policy_"+f.Rule.Direction.String() {
						t.Errorf("cut by %+v", f)
					}
				}
				slices.Sort(got)
				if diff := cmp.Diff(append([]string{}, want...), got); diff != "" {
					t.Errorf("what is cut (-) is not what would be (+):\n%s", diff)
				}
				if c.cut != (len(got) > 0) {
					t.Errorf("%d are cut", len(got))
				}
				if c.name == "nothing" && len(now) != len(denied) {
					t.Errorf("%q", now)
				}
				e.set(model())
			})
		}
	})
}

func ptr[T any](v T) *T { return &v }

// BenchmarkWhatIf asks about 100,000 flows, half of which would be cut.
func BenchmarkWhatIf(bm *testing.B) {
	b := newBench(bm, loader.Config{MaxFlows: 131072})
	e := b.enforce(b.a, b.b)
	endpoints := map[string]*policy.Endpoint{"a": endpointOf(b.a), "b": endpointOf(b.b)}
	inForce := &policy.Model{Endpoints: endpoints}
	nothing := &policy.Policy{ID: "nothing", Selector: selector.In("name", "b"), Ingress: &policy.Rules{}}
	candidate := &policy.Model{Endpoints: endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{nothing}}}}
	e.set(inForce)
	const half = 50_000
	b.do(func() error {
		for i := range half {
			x, y := at(b.a.v4, uint16(10_000+i)), at(b.b.v4, uint16(10_000+i))
			for _, s := range []sight{
				{"from_pod", udp(b.a, x, at(b.b.v4, 53), 8), skb{ifindex: uint32(b.a.commit.IfIndex)}},
				{"from_pod", udp(b.b, at(b.b.v4, 53), x, 8), skb{ifindex: uint32(b.b.commit.IfIndex)}},
				{"from_pod", udp(b.b, y, at(b.a.v4, 53), 8), skb{ifindex: uint32(b.b.commit.IfIndex)}},
				{"from_pod", udp(b.a, at(b.a.v4, 53), y, 8), skb{ifindex: uint32(b.a.commit.IfIndex)}},
			} {
				if _, err := b.exec(s.hook, s.frame, s.skb); err != nil {
					return err
				}
			}
		}
		return nil
	})
	cpu := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			bm.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	began := cpu()
	for bm.Loop() {
		b.do(func() error {
			r, err := whatif.Run(context.Background(), whatif.Config{Maps: b.maps, InForce: inForce, Candidate: candidate})
			if err == nil && (r.Flows != 2*half || len(r.Cut) != half) {
				err = fmt.Errorf("would cut %d of %d flows, %d unjudged", len(r.Cut), r.Flows, len(r.Unjudged))
			}
			return err
		})
	}
	bm.ReportMetric((cpu()-began).Seconds()/float64(bm.N), "cpu-s/op")
}

// TestWhatIfRandom holds what would be cut against the evaluator, and against what is cut then: flows that one random policy allows, under
// another one.
func TestWhatIfRandom(t *testing.T) {
	models, least := 25, 30
	if testing.Short() {
		models, least = 10, 1
	}
	o := newOracle(t, isLocal)
	flows, cut := 0, 0
	for seed := range uint64(models) {
		g := policytest.New(seed)
		m := g.Model()
		changed := m
		for range 3 {
			changed = g.Change(changed)
		}
		changed.Endpoints = make(map[string]*policy.Endpoint) // the same pods, which may have other labels
		for id, e := range m.Endpoints {
			changed.Endpoints[id] = e
			if seed%2 == 1 {
				relabelled := *e
				relabelled.Labels = m.Endpoints[slices.Sorted(gomaps.Keys(m.Endpoints))[0]].Labels
				changed.Endpoints[id] = &relabelled
			}
		}
		var packets []policy.Packet
		for range 60 {
			packets = append(packets, g.Packet(m))
		}
		n, c, err := o.whatIfRandom(m, changed, packets)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		flows, cut = flows+n, cut+c
	}
	if cut < least {
		t.Errorf("%d of %d flows would be cut, want %d", cut, flows, least)
	}
	t.Logf("%d of %d flows would be cut", cut, flows)
}

// whatIfRandom opens the flows that a model allows, and checks what is said of them under another one.
func (o *oracle) whatIfRandom(m, candidate *policy.Model, packets []policy.Packet) (flows, cut int, err error) {
	pods, unwire := o.wire(m)
	defer unwire()
	if !o.set(m, pods) {
		return 0, 0, nil
	}
	opened := make(map[string]policy.Packet)
	again := make(map[string]sight)
	for _, p := range packets {
		frame, hook, s, ok := o.frame(m, pods, p)
		if !ok || o.want(m, p) == policy.Deny {
			continue
		}
		before := o.flowNames()
		o.do(func() error {
			_, err := o.exec(hook, frame, s)
			return err
		})
		for name := range o.flowNames() {
			if !before[name] {
				opened[name], again[name] = p, sight{hook, frame, s}
			}
		}
	}
	report, err := o.whatIf(o.enforcer, m, candidate)
	if errors.Is(err, whatif.ErrCandidate) {
		if o.set(candidate, pods) {
			return 0, 0, fmt.Errorf("it is put in force, but: %w", err)
		}
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	if report.Flows != len(opened) || len(report.Unjudged) > 0 || report.Denied > 0 {
		return 0, 0, fmt.Errorf("%d flows, %d denied, unjudged %+v; opened were %d", report.Flows, report.Denied, report.Unjudged, len(opened))
	}
	said := make(map[string]bool)
	for _, c := range report.Cut {
		said[flowName(c.Flow)] = true
	}
	if !o.set(candidate, pods) {
		return 0, 0, fmt.Errorf("the candidate is refused")
	}
	for name, p := range opened {
		var r result
		s := again[name]
		o.do(func() (err error) {
			r, err = o.exec(s.hook, s.frame, s.skb)
			return err
		})
		evaluated, is := o.want(candidate, p) == policy.Deny, r.action == actionShot
		if said[name] != evaluated || said[name] != is {
			return 0, 0, fmt.Errorf("%s (flow %s): would be cut: %t; the evaluator says %t, it is cut: %t", p, name, said[name], evaluated, is)
		}
	}
	return len(opened), len(said), nil
}

func (o *oracle) flowNames() map[string]bool {
	o.t.Helper()
	flows, err := o.maps.Flows()
	if err != nil {
		o.t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, f := range flows {
		names[flowName(f)] = true
	}
	return names
}

// What is over is no flow to cut; of what can't be told it is said why; and what a node that knows nothing of a pod denies is
// no change.
func TestWhatIfNotCut(t *testing.T) {
	b := newBench(t, loader.Config{})
	ends, far := b.v4pair(), b.r.v4
	endpoints := map[string]*policy.Endpoint{"a": endpointOf(b.a), "b": endpointOf(b.b)}
	model := &policy.Model{Endpoints: endpoints}
	nobody := &policy.Model{Endpoints: endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{
		{ID: "nobody", Ingress: &policy.Rules{}, Egress: &policy.Rules{}},
	}}}}
	e := b.enforce(b.a, b.b)
	e.set(model)
	at2 := func(port uint16) netip.AddrPort { return at(ends[0].Addr(), port) }
	b.handshake(at2(1), ends[1])
	b.handshake(at2(2), ends[1])
	reset := tcp(b.b, ends[1], at2(2), "R", 0)
	check(t, reset, b.fromB(reset), "forward_pod")
	b.handshake(at2(3), ends[1])
	for _, f := range []struct {
		frame []byte
		run   func([]byte) result
	}{{tcp(b.a, at2(3), ends[1], "FA", 0), b.fromA}, {tcp(b.b, ends[1], at2(3), "FA", 0), b.fromB}} {
		check(t, f.frame, f.run(f.frame), "forward_pod")
	}
	in := udp(b.r, at(far, 4), ends[1], 8)
	check(t, in, b.fromNet(in), "forward_pod")
	ask := func(candidate *policy.Model, flows, cut, denied int, unjudged ...string) {
		t.Helper()
		report, err := b.whatIf(e, model, candidate)
		if err != nil {
			t.Fatal(err)
		}
		if report.Flows != flows || len(report.Cut) != cut || report.Denied != denied || len(report.Unjudged) != len(unjudged) {
			t.Fatalf("%+v; want %d flows, %d cut, %d denied, unjudged %q", report, flows, cut, denied, unjudged)
		}
		for i, u := range report.Unjudged {
			if !strings.Contains(u.Why, unjudged[i]) {
				t.Errorf("not judged because %s, want %s", u.Why, unjudged[i])
			}
		}
	}
	ask(nobody, 2, 2, 0)

	// The interface by which a flow's packets came is gone.
	b.do(func() error {
		l, err := netlink.LinkByIndex(b.up)
		if err == nil {
			err = netlink.LinkDel(l)
		}
		return err
	})
	ask(nobody, 2, 1, 0, fmt.Sprintf("interface %d, by which its packets came, is gone", b.up))
	b.raise()
	ask(nobody, 2, 1, 0, "is gone")

	// A pod of which no resource speaks.
	b.policy(b.b, 0, maps.PolicyUnknown)
	ask(nobody, 2, 0, 1, "is gone")
	b.policy(b.b, 0, 0)
	b.rows(row(77, 0, 0, 0, 0, allow, 1))
	b.policy(b.b, 0, 77)
	delete(endpoints, "b")
	nobody.Tiers = nil
	ask(nobody, 2, 0, 0, "is gone", "no resource is about that pod")
}

// What can't be put in force is refused, by name, and nothing is left of it; who is interrupted ends at once.
func TestWhatIfRefuses(t *testing.T) {
	b := newBench(t, loader.Config{MaxPolicy: 100, MaxPeers: 10000})
	e := b.enforce(b.a, b.b)
	model := &policy.Model{Endpoints: map[string]*policy.Endpoint{"a": endpointOf(b.a), "b": endpointOf(b.b)}}
	with := func(p *policy.Policy) *policy.Model {
		return &policy.Model{Endpoints: model.Endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{p}}}}
	}
	e.set(model)
	var many []policy.Rule
	for i := range 500 {
		many = append(many, policy.Rule{Action: policy.Allow, Source: policy.Peer{Nets: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("192.0.%d.%d/32", 2+i/250, i%250))}}})
	}
	_, err := b.whatIf(e, model, with(&policy.Policy{ID: "large", Ingress: &policy.Rules{Rules: many}}))
	if !errors.Is(err, whatif.ErrCandidate) || !errors.Is(err, maps.ErrFull) || !strings.Contains(err.Error(), "room for 100 rows") {
		t.Errorf("a candidate that does not fit: %v", err)
	}
	twins := *model.Endpoints["b"]
	twins.Addresses = append(slices.Clone(twins.Addresses), nobody4)
	other := with(&policy.Policy{ID: "own side", Ingress: &policy.Rules{Rules: []policy.Rule{
		{Action: policy.Allow, Destination: policy.Peer{Nets: []netip.Prefix{netip.PrefixFrom(b.b.v4, 32)}}},
	}}})
	other.Endpoints = map[string]*policy.Endpoint{"b": &twins}
	if _, err := b.whatIf(e, model, other); !errors.Is(err, whatif.ErrCandidate) || !strings.Contains(err.Error(), "own side") {
		t.Errorf("a candidate that does not compile: %v", err)
	}
	if _, err := b.whatIf(e, other, model); !errors.Is(err, whatif.ErrInForce) {
		t.Errorf("a policy in force that does not compile: %v", err)
	}

	b.handshake(b.v4pair()[0], b.v4pair()[1])
	ctx, cancel := context.WithCancel(context.Background())
	b.do(func() error {
		_, err = whatif.Run(ctx, whatif.Config{Maps: b.maps, InForce: model, Candidate: model, Progress: func(string) { cancel() }})
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// It can be asked while packets flow and the epoch is raised all the time.
func TestWhatIfBusy(t *testing.T) {
	b := newBench(t, loader.Config{})
	model := &policy.Model{Endpoints: map[string]*policy.Endpoint{"a": endpointOf(b.a), "b": endpointOf(b.b)}}
	b.enforce(b.a, b.b).set(model)
	nobody := &policy.Model{Endpoints: model.Endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{{ID: "nobody", Ingress: &policy.Rules{}}}}}}
	ends := b.v4pair()
	stop, stopped := make(chan struct{}), make(chan error)
	go func() {
		stopped <- b.ns.Do(func() error {
			there, back := udp(b.a, ends[0], ends[1], 8), udp(b.b, ends[1], ends[0], 8)
			for n := 0; ; n++ {
				select {
				case <-stop:
					return nil
				default:
				}
				for _, s := range []sight{{"from_pod", there, skb{ifindex: uint32(b.a.commit.IfIndex)}}, {"from_pod", back, skb{ifindex: uint32(b.b.commit.IfIndex)}}} {
					if _, err := b.exec(s.hook, s.frame, s.skb); err != nil {
						return err
					}
				}
				if n%16 == 0 {
					if _, err := b.maps.RaiseEpoch(); err != nil {
						return err
					}
				}
			}
		})
	}()
	until(t, "a flow", func() bool { _, ok := b.flow("udp", ends[0], ends[1]); return ok })
	for range 3 {
		b.do(func() error {
			r, err := whatif.Run(context.Background(), whatif.Config{Maps: b.maps, InForce: model, Candidate: nobody})
			if err == nil && (r.Flows != 1 || len(r.Cut) != 1) {
				err = fmt.Errorf("%+v", r)
			}
			return err
		})
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
}

// What leaves with the host's address is judged as any other, also when only to_net sees it.
func TestWhatIfMasquerade(t *testing.T) {
	b := newNATBench(t, loader.Config{})
	endpoints := map[string]*policy.Endpoint{"a": endpointOf(b.a), "b": endpointOf(b.b)}
	e := b.enforce(b.a, b.b)
	inForce := &policy.Model{Endpoints: endpoints}
	protocol := uint8(17)
	only := &policy.Policy{ID: "only UDP", Egress: &policy.Rules{Rules: []policy.Rule{{Action: policy.Allow, Protocol: &protocol}}}}
	candidate := &policy.Model{Endpoints: endpoints, Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{only}}}}
	e.set(inForce)
	translated := func(frame []byte) result {
		return b.run("to_net", frame, skb{ifindex: uint32(b.up), ingress: uint32(b.a.commit.IfIndex)})
	}
	plain := func(frame []byte) result { return b.leave(b.a, frame) }
	for i, ends := range [][2]netip.Addr{{b.a.v4, stranger4}, {b.a.v6, stranger6}} {
		for j, leave := range []func([]byte) result{plain, translated} {
			port := uint16(5000 + 10*i + j)
			src, dst := at(ends[0], port), at(ends[1], 443)
			leaves := func(frame []byte) []byte {
				t.Helper()
				r := leave(frame)
				if r.verdict != "forward_masqueraded" {
					t.Fatal(r.verdict)
				}
				return mirror(r.out)
			}
			answers := func(frame []byte) {
				t.Helper()
				r := b.fromNet(frame)
				if r.verdict != "stack_answer" && r.verdict != "stack_reply" {
					t.Fatal(r.verdict)
				}
				r = b.run("to_pod", r.out, skb{ifindex: uint32(b.a.commit.IfIndex), ingress: uint32(b.up)})
				if r.verdict != "forward_from_stack" {
					t.Fatal(r.verdict)
				}
			}
			answers(leaves(udp(b.a, src, dst, 8)))
			answers(leaves(echo(b.a, ends[0], ends[1], port, false)))
			back := leaves(tcp(b.a, src, dst, "S", 0))
			back[47+20*i] |= 0x10 // SYN and ACK
			answers(summed(back))
			leaves(tcp(b.a, src, dst, "A", 0))
		}
	}
	report, err := b.whatIf(e, inForce, candidate)
	if err != nil {
		t.Fatal(err)
	}
	if report.Flows != 12 || len(report.Cut) != 8 || len(report.Unjudged) != 0 {
		t.Fatalf("%+v; want 12 flows, of which those of TCP and ICMP would be cut", report)
	}
	for _, c := range report.Cut {
		if c.Protocol == "udp" || c.Verdict != "drop_policy_egress" {
			t.Errorf("%+v", c)
		}
	}
	e.set(candidate)
	for i, ends := range [][2]netip.Addr{{b.a.v4, stranger4}, {b.a.v6, stranger6}} {
		for j, leave := range []func([]byte) result{plain, translated} {
			port := uint16(5000 + 10*i + j)
			src, dst := at(ends[0], port), at(ends[1], 443)
			for verdict, frames := range map[string][][]byte{
				"forward_masqueraded": {udp(b.a, src, dst, 8)},
				"drop_policy_egress":  {tcp(b.a, src, dst, "A", 1), echo(b.a, ends[0], ends[1], port, false)},
			} {
				for _, f := range frames {
					if r := leave(f); r.verdict != verdict {
						t.Errorf("%s, want %s", r.verdict, verdict)
					}
				}
			}
		}
	}
}
