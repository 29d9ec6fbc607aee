package dataplane

import (
	"errors"
	"fmt"
	gomaps "maps"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// row is a row of policy. bits are those of the protocol and port that count: 0, 16 or 16 + n.
func row(policy, identity uint32, bits, protocol uint8, port uint16, action maps.PolicyAction, rule uint32) maps.PolicyRow {
	return maps.PolicyRow{
		PolicyKey: maps.PolicyKey{Policy: policy, Identity: identity, Bits: maps.BitsAny + bits, Protocol: protocol, Port: port},
		Action:    action, Rule: rule,
	}
}

const (
	allow = maps.PolicyAllow
	deny  = maps.PolicyDeny
)

// identify gives addresses an identity, in both epochs.
func (n *node) identify(identity uint32, addrs ...netip.Addr) {
	n.t.Helper()
	var peers []maps.Peer
	var prefixes []netip.Prefix
	for _, a := range addrs {
		p := netip.PrefixFrom(a, a.BitLen())
		peers, prefixes = append(peers, maps.Peer{Prefix: p, Next: identity}), append(prefixes, p)
	}
	for _, step := range []func() error{
		func() error { return n.maps.StagePeers(peers) },
		func() error { _, err := n.maps.RaiseEpoch(); return err },
		func() error { return n.maps.SettlePeers(prefixes) },
	} {
		if err := step(); err != nil {
			n.t.Fatal(err)
		}
	}
}

// ruleCounts reads what every rule has counted: packets.
func (n *node) ruleCounts() map[uint32]uint64 {
	n.t.Helper()
	all, err := n.maps.Rules()
	if err != nil {
		n.t.Fatal(err)
	}
	counts := make(map[uint32]uint64)
	for _, r := range all {
		counts[r.Rule] = r.Packets
	}
	return counts
}

// wantRules fails unless rules have counted so many packets since.
func (n *node) wantRules(before map[uint32]uint64, want map[uint32]uint64) {
	n.t.Helper()
	now := n.ruleCounts()
	for rule, packets := range want {
		if got := now[rule] - before[rule]; got != packets {
			n.t.Errorf("rule %d counted %d packets more, want %d; all: %v, before: %v", rule, got, packets, now, before)
		}
	}
}

// families runs a test with the addresses of pods a and b of either family.
func families(t *testing.T, fn func(t *testing.T, b *bench, x, y netip.Addr)) {
	for name, addr := range map[string]func(*pod) netip.Addr{
		"v4": func(p *pod) netip.Addr { return p.v4 }, "v6": func(p *pod) netip.Addr { return p.v6 },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, loader.Config{})
			fn(t, b, addr(b.a), addr(b.b))
		})
	}
}

// icmpKind is an ICMP message of a type, or its counterpart in ICMPv6, with an identifier.
func icmpKind(p *pod, src, dst netip.Addr, kind, code byte, id uint16) []byte {
	f := echo(p, src, dst, id, false)
	if src.Is4() {
		return patch(f, 34, kind, code)
	}
	return patch(f, 54, kind, code)
}

// What a row says about protocol, port, identity and source port is what happens, and the rule that decided is known and
// counts.
func TestPolicyRows(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		icmp, request := uint8(1), byte(8)
		if x.Is6() {
			icmp, request = 58, 128
		}
		const known, open = 7, 8
		sourcePorts := row(100, 0, 32, 6, 443, 0, 200)
		sourcePorts.SourcePorts = true
		b.rows(
			row(100, 0, 0, 0, 0, deny, 1),
			row(100, 0, 32, 6, 80, allow, 2),
			row(100, 0, 29, 6, 8000, allow, 3), // to 8007
			row(100, 0, 17, 17, 0x8000, allow, 4),
			row(100, 0, 32, icmp, uint16(request)<<8, allow, 5),
			row(100, 0, 16, 132, 0, allow, 6),
			row(100, 0, 24, icmp, 13<<8, allow, 7), // any code
			sourcePorts,
			row(200, maps.IdentitySourcePorts, 0, 0, 0, deny, 20),
			row(200, maps.IdentitySourcePorts, 32, 6, 4000, allow, 21),
			row(100, known, 0, 0, 0, allow, 10),
			row(100, known, 32, 6, 22, deny, 11),
		)
		b.policy(b.b, 0, 100)
		const allowed, denied = "forward_pod", "drop_policy_ingress"
		type rowCase struct {
			name     string
			identity uint32
			frame    []byte
			rule     uint32
			verdict  string
		}
		cases := []rowCase{
			{"tcp 80", 0, tcp(b.a, at(x, 4000), at(y, 80), "S", 0), 2, allowed},
			{"tcp 81", 0, tcp(b.a, at(x, 4000), at(y, 81), "S", 0), 1, denied},
			{"from port 80", 0, tcp(b.a, at(x, 80), at(y, 4000), "S", 0), 1, denied},
			{"udp 80", 0, udp(b.a, at(x, 4000), at(y, 80), 1), 1, denied},
			{"below the range", 0, tcp(b.a, at(x, 4000), at(y, 7999), "S", 0), 1, denied},
			{"first of the range", 0, tcp(b.a, at(x, 4000), at(y, 8000), "S", 0), 3, allowed},
			{"last of the range", 0, tcp(b.a, at(x, 4000), at(y, 8007), "S", 0), 3, allowed},
			{"behind the range", 0, tcp(b.a, at(x, 4000), at(y, 8008), "S", 0), 1, denied},
			{"upper half", 0, udp(b.a, at(x, 4000), at(y, 65535), 1), 4, allowed},
			{"lower half", 0, udp(b.a, at(x, 4000), at(y, 32767), 1), 1, denied},
			{"any port", 0, sctp(b.a, at(x, 4000), at(y, 9), 1), 6, allowed},
			{"no ports", 0, raw(b.a, x, y, 47, make([]byte, 8)), 1, denied},
			{"echo", 0, echo(b.a, x, y, 5, false), 5, allowed},
			{"echo reply", 0, echo(b.a, x, y, 5, true), 1, denied},
			{"echo with a code", 0, icmpKind(b.a, x, y, request, 3, 5), 1, denied},
			{"source port", 0, tcp(b.a, at(x, 4000), at(y, 443), "S", 0), 21, allowed},
			{"other source port", 0, tcp(b.a, at(x, 4001), at(y, 443), "S", 0), 20, denied},
			{"known", known, udp(b.a, at(x, 4000), at(y, 80), 1), 10, allowed},
			{"known, denied", known, tcp(b.a, at(x, 4000), at(y, 22), "S", 0), 11, denied},
			{"known, its own catch-all", known, raw(b.a, x, y, 47, make([]byte, 8)), 10, "stack_protocol"},
			{"without rows of its own", open, tcp(b.a, at(x, 4000), at(y, 80), "S", 0), 2, allowed},
			{"without rows of its own, denied", open, tcp(b.a, at(x, 4000), at(y, 81), "S", 0), 1, denied},
		}
		if x.Is4() { // in ICMPv6 that number is an error
			cases = append(cases, rowCase{"type with any code", 0, icmpKind(b.a, x, y, 13, 3, 5), 7, allowed})
		}
		for _, c := range cases {
			b.purge(t)
			b.identify(c.identity, x)
			before := b.ruleCounts()
			if r := b.fromA(c.frame); r.verdict != c.verdict {
				t.Fatalf("%s: verdict %s, want %s", c.name, r.verdict, c.verdict)
			}
			b.wantRules(before, map[uint32]uint64{c.rule: 1})
			flows, err := b.maps.Flows()
			if err != nil {
				t.Fatal(err)
			}
			if c.verdict == denied {
				if len(flows) != 0 {
					t.Errorf("%s: denied, but there are flows %+v", c.name, flows)
				}
				continue
			}
			if len(flows) != 1 || flows[0].RuleIngress != c.rule || flows[0].RuleEgress != 0 {
				t.Errorf("%s: flows %+v, want one by rule %d", c.name, flows, c.rule)
			}
		}
	})
}

// Both ends are judged, each by who the other is, at every hook; a flow has the rules of both.
func TestPolicyEnds(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		remote := b.r.v4
		if x.Is6() {
			remote = b.r.v6
		}
		const front, back, far = 7, 8, 9
		b.rows(
			row(100, 0, 0, 0, 0, deny, 1), row(100, back, 0, 0, 0, deny, 2), row(100, back, 32, 17, 80, allow, 3),
			row(100, far, 0, 0, 0, deny, 8), row(100, far, 32, 17, 53, allow, 9),
			row(101, 0, 0, 0, 0, deny, 4), row(101, front, 0, 0, 0, deny, 5), row(101, front, 32, 17, 80, allow, 6), row(101, far, 0, 0, 0, allow, 7),
		)
		b.identify(front, x)
		b.identify(back, y)
		b.policy(b.a, 100, 0)
		b.policy(b.b, 0, 101)

		// From a to b, and its answer.
		there, answer := udp(b.a, at(x, 4000), at(y, 80), 1), udp(b.b, at(y, 80), at(x, 4000), 1)
		check(t, answer, b.fromB(answer), "forward_pod") // b may open: no egress policy, and a has no ingress policy
		b.purge(t)
		check(t, there, b.fromA(there), "forward_pod")
		check(t, answer, b.fromB(answer), "forward_pod")
		if f := b.wantFlow("udp", at(x, 4000), at(y, 80)); f.RuleEgress != 3 || f.RuleIngress != 6 || !f.Confirmed {
			t.Errorf("flow %+v, want rules 3 and 6", f)
		}
		other := udp(b.a, at(x, 4000), at(y, 81), 1)
		check(t, other, b.fromA(other), "drop_policy_egress")
		b.policy(b.a, 0, 0)
		check(t, other, b.fromA(other), "drop_policy_ingress")
		b.policy(b.a, 100, 0)

		// Between hosts: the egress policy there, the ingress policy here.
		out := udp(b.a, at(x, 4000), at(remote, 53), 1)
		check(t, out, b.fromA(out), "drop_policy_egress")
		in := udp(b.r, at(remote, 4000), at(y, 80), 1)
		check(t, in, b.fromNet(in), "drop_policy_ingress")
		check(t, in, b.stackToB(in, uint32(b.up)), "drop_policy_ingress")
		b.identify(far, remote)
		check(t, out, b.fromA(out), "forward_net")
		if f := b.wantFlow("udp", at(x, 4000), at(remote, 53)); f.RuleEgress != 9 || f.RuleIngress != 0 {
			t.Errorf("flow to the other host %+v, want rule 9", f)
		}
		reply := udp(b.r, at(remote, 53), at(x, 4000), 1)
		check(t, reply, b.fromNet(reply), "forward_pod")
		check(t, in, b.fromNet(in), "forward_pod")
		if f := b.wantFlow("udp", at(remote, 4000), at(y, 80)); f.RuleEgress != 0 || f.RuleIngress != 7 {
			t.Errorf("flow from the other host %+v, want rule 7", f)
		}
		viaStack := udp(b.r, at(remote, 4001), at(y, 80), 1)
		check(t, viaStack, b.stackToB(viaStack, uint32(b.up)), "forward_from_stack")
		if f := b.wantFlow("udp", at(remote, 4001), at(y, 80)); f.RuleIngress != 7 {
			t.Errorf("flow out of the host's stack %+v, want rule 7", f)
		}
		// What a pod's packet became in the host's stack, at to_pod and to_net.
		translated := udp(b.a, at(x, 4002), at(y, 80), 1)
		check(t, translated, b.stackToB(translated, uint32(b.a.commit.IfIndex)), "forward_from_stack")
		if f := b.wantFlow("udp", at(x, 4002), at(y, 80)); f.RuleEgress != 3 || f.RuleIngress != 6 {
			t.Errorf("translated flow %+v, want rules 3 and 6", f)
		}
		up := skb{ifindex: uint32(b.up), ingress: uint32(b.a.commit.IfIndex)}
		dns, web := udp(b.a, at(x, 4003), at(remote, 53), 1), udp(b.a, at(x, 4003), at(remote, 80), 1)
		check(t, dns, b.run("to_net", dns, up), "forward_from_stack")
		check(t, web, b.run("to_net", web, up), "drop_policy_egress")

		// A pod always reaches itself, and a process of the host every pod.
		b.policy(b.a, 9, 9)
		self := udp(b.a, at(x, 1), at(x, 2), 1)
		check(t, self, b.fromA(self), "forward_pod")
		b.policy(b.b, 9, 9)
		probe := udp(b.r, at(remote, 4009), at(y, 80), 1)
		before := b.ruleCounts()
		check(t, probe, b.stackToB(probe, 0), "forward_from_stack")
		if f := b.wantFlow("udp", at(remote, 4009), at(y, 80)); f.RuleEgress != 0 || f.RuleIngress != 0 {
			t.Errorf("flow of the host %+v has rules", f)
		}
		if now := b.ruleCounts(); !gomaps.Equal(before, now) {
			t.Errorf("rules counted what was not judged: %v, before %v", now, before)
		}
	})
}

// A policy id without rows allows nothing, and says so.
func TestPolicyUnknown(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		sourcePorts := row(102, 0, 0, 0, 0, 0, 300) // a table without rows
		sourcePorts.SourcePorts = true
		b.rows(sourcePorts)
		f := udp(b.a, at(x, 1), at(y, 2), 1)
		for _, ids := range [][2]uint32{{77, 0}, {0, 77}, {102, 0}, {maps.PolicyUnknown, 0}, {0, maps.PolicyUnknown}} {
			b.policy(b.a, ids[0], 0)
			b.policy(b.b, 0, ids[1])
			check(t, f, b.fromA(f), "drop_policy_unknown")
		}
		b.policy(b.a, 0, 0)
		b.policy(b.b, 0, 0)
		check(t, f, b.fromA(f), "forward_pod")
	})
}

// ICMP is judged by what opened the flow, also when an answer comes first in a new epoch; one query allows no other.
func TestPolicyICMP(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		icmp, request := uint8(1), byte(8)
		if x.Is6() {
			icmp, request = 58, 128
		}
		b.rows(row(100, 0, 0, 0, 0, deny, 1), row(100, 0, 32, icmp, uint16(request)<<8, allow, 2), row(100, 0, 32, 17, 53, allow, 3))
		b.policy(b.b, 0, 100)
		there, answer := echo(b.a, x, y, 5, false), echo(b.b, y, x, 5, true)
		for range 3 {
			check(t, there, b.fromA(there), "forward_pod")
			check(t, answer, b.fromB(answer), "forward_pod")
			b.raise()
			check(t, answer, b.fromB(answer), "forward_pod")
			b.raise()
		}
		if f := b.wantFlow(map[uint8]string{1: "icmp", 58: "icmpv6"}[icmp], at(x, 5), at(y, 5)); f.ICMPType != request || f.RuleIngress != 2 {
			t.Errorf("flow %+v, want one of type %d by rule 2", f, request)
		}
		if x.Is4() { // timestamp, with the same identifier
			f := icmpKind(b.a, x, y, 13, 0, 5)
			check(t, f, b.fromA(f), "drop_policy_ingress")
		}
		odd := icmpKind(b.a, x, y, request, 1, 5)
		check(t, odd, b.fromA(odd), "drop_policy_ingress")

		// Errors go with the flow that they are about.
		question, unheard := udp(b.a, at(x, 4000), at(y, 53), 1), udp(b.a, at(x, 4000), at(y, 54), 1)
		check(t, question, b.fromA(question), "forward_pod")
		e := unreachable(b.b, y, x, question)
		check(t, e, b.fromB(e), "forward_pod")
		e2 := unreachable(b.b, y, x, unheard)
		check(t, e2, b.fromB(e2), "drop_icmp_error")
		b.rows(row(100, 0, 32, 17, 53, deny, 4))
		b.raise()
		before := b.ruleCounts()
		check(t, e, b.fromB(e), "drop_policy_ingress")
		b.wantRules(before, map[uint32]uint64{4: 1})
	})
}

func (n *node) raise() {
	n.t.Helper()
	if _, err := n.maps.RaiseEpoch(); err != nil {
		n.t.Fatal(err)
	}
}

// Rules count what they denied at once, and what they allowed whether its flow lives, was displaced, moved to another rule or
// is gone; never twice.
func TestRuleCounts(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		b.rows(row(100, 0, 0, 0, 0, deny, 1), row(100, 0, 32, 17, 53, allow, 2), row(100, 0, 32, 6, 80, allow, 3),
			row(101, 0, 0, 0, 0, allow, 4), row(101, 0, 32, 17, 54, deny, 5))
		b.policy(b.b, 0, 100)
		b.policy(b.a, 101, 0)
		zero := map[uint32]uint64{}
		there, answer := udp(b.a, at(x, 4000), at(y, 53), 1), udp(b.b, at(y, 53), at(x, 4000), 1)
		for range 3 { // not confirmed
			check(t, there, b.fromA(there), "forward_pod")
		}
		b.wantRules(zero, map[uint32]uint64{1: 0, 2: 3, 4: 3})
		check(t, answer, b.fromB(answer), "forward_pod") // confirms it
		b.wantRules(zero, map[uint32]uint64{2: 4, 4: 4})
		for range 5 {
			check(t, there, b.fromA(there), "forward_pod")
			check(t, answer, b.fromB(answer), "forward_pod")
		}
		b.wantRules(zero, map[uint32]uint64{2: 14, 4: 14})

		// Another rule allows it from here on.
		b.rows(row(100, 0, 32, 17, 53, allow, 6))
		b.raise()
		check(t, answer, b.fromB(answer), "forward_pod")
		check(t, there, b.fromA(there), "forward_pod")
		b.wantRules(zero, map[uint32]uint64{2: 14, 4: 16, 6: 2})
		if f := b.wantFlow("udp", at(x, 4000), at(y, 53)); f.RuleIngress != 6 || f.RuleEgress != 4 {
			t.Errorf("flow %+v, want rules 4 and 6", f)
		}
		b.purge(t)
		b.wantRules(zero, map[uint32]uint64{2: 14, 4: 16, 6: 2})

		// TCP, opened, closed by a reset, and its ports taken again.
		sizes := uint64(0)
		for range 2 {
			b.handshake(at(x, 4000), at(y, 80))
			reset := tcp(b.b, at(y, 80), at(x, 4000), "R", 0)
			check(t, reset, b.fromB(reset), "forward_pod")
			sizes = uint64(4 * len(reset))
		}
		b.wantRules(zero, map[uint32]uint64{3: 8, 4: 24})
		rules, err := b.maps.Rules()
		if err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(rules, func(r maps.RuleCount) bool { return r.Rule == 3 }); i < 0 || rules[i].Bytes != 2*sizes {
			t.Errorf("rules %+v, want %d bytes at rule 3", rules, 2*sizes)
		}

		// Denied, at either end; the rule that allowed at the other end does not count it. One large packet counts as its segments.
		no, no2 := udp(b.a, at(x, 1), at(y, 55), 1), udp(b.a, at(x, 1), at(y, 54), 1)
		for range 3 {
			check(t, no, b.fromA(no), "drop_policy_ingress")
		}
		check(t, no2, b.fromA(no2), "drop_policy_egress")
		b.wantRules(zero, map[uint32]uint64{1: 3, 4: 24, 5: 1})
		large := tcp(b.a, at(x, 1), at(y, 81), "S", 3000)
		if r := b.run("from_pod", large, skb{ifindex: uint32(b.a.commit.IfIndex), gsoSize: 1000, gsoSegs: 3}); r.verdict != "drop_policy_ingress" {
			t.Errorf("verdict %s", r.verdict)
		}
		b.wantRules(zero, map[uint32]uint64{1: 6})
		if err := b.maps.RemoveRules([]uint32{1, 99, 2}); err != nil {
			t.Fatal(err)
		}
		b.wantRules(zero, map[uint32]uint64{1: 0, 2: 0, 6: 2})
	})
}

// drain reads the events that there are.
func drain(t testing.TB, e *maps.Events) []maps.Event {
	t.Helper()
	e.SetDeadline(time.Now())
	var all []maps.Event
	for {
		ev, err := e.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, ev)
	}
}

func (n *node) events() *maps.Events {
	n.t.Helper()
	e, err := n.maps.Events()
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { e.Close() })
	return e
}

// Every drop is told with who decided, and the opening of a flow that a rule logs; nothing else.
func TestEvents(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		logged, loud := row(100, 0, 32, 17, 53, allow, 2), row(100, 0, 32, 17, 54, deny, 3)
		logged.Log, loud.Log = true, true
		b.rows(row(100, 0, 0, 0, 0, deny, 1), logged, loud, row(100, 0, 32, 17, 55, allow, 4), row(101, 0, 0, 0, 0, allow, 5))
		b.policy(b.b, 0, 100)
		b.policy(b.a, 101, 0)
		e := b.events()
		drain(t, e)
		want := func(frame []byte, verdict string, want ...maps.Event) {
			t.Helper()
			check(t, frame, b.fromA(frame), verdict)
			got := drain(t, e)
			for i := range got {
				if age := time.Since(got[i].Time); age < 0 || age > patience {
					t.Errorf("event of %s ago", age)
				}
				got[i].Time = time.Time{}
			}
			for i := range want {
				want[i].Hook, want[i].IfIndex, want[i].Length, want[i].Epoch = "from_pod", uint32(b.a.commit.IfIndex), uint32(len(frame)), b.state().Epoch
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: events %+v, want %+v", verdict, got, want)
			}
		}
		between := func(kind, verdict string, port uint16, egress, ingress uint32, log bool) maps.Event {
			return maps.Event{Kind: kind, Verdict: verdict, Protocol: "udp", Source: at(x, 4000), Destination: at(y, port),
				RuleEgress: egress, RuleIngress: ingress, Log: log}
		}
		to := func(port uint16) []byte { return udp(b.a, at(x, 4000), at(y, port), 1) }
		want(to(53), "forward_pod", between("log", "", 53, 5, 2, true))
		want(to(53), "forward_pod") // the flow is open
		b.raise()
		want(to(53), "forward_pod") // judged again, not opened
		want(to(54), "drop_policy_ingress", between("drop", "drop_policy_ingress", 54, 5, 3, true))
		want(to(55), "forward_pod")
		want(to(56), "drop_policy_ingress", between("drop", "drop_policy_ingress", 56, 5, 1, false))
		spoofed := between("drop", "drop_spoof", 56, 0, 0, false)
		spoofed.Source = at(y, 4000)
		want(udp(b.a, at(y, 4000), at(y, 56), 1), "drop_spoof", spoofed)
		b.policy(b.b, 0, 77)
		want(to(56), "drop_policy_unknown", between("drop", "drop_policy_unknown", 56, 5, 0, false))

		// A flood is told of in part; the rest is counted.
		lost, err := b.maps.EventsLost()
		if err != nil {
			t.Fatal(err)
		}
		const flood = 5000
		b.do(func() error {
			_, err := b.programs["from_pod"].Run(&ebpf.RunOptions{Data: to(56), Repeat: flood, Context: ctxOf(b.a)})
			return err
		})
		now, err := b.maps.EventsLost()
		if err != nil {
			t.Fatal(err)
		}
		if told := len(drain(t, e)); told == 0 || told > flood/2 || uint64(told)+now-lost != flood {
			t.Errorf("of %d drops %d were told and %d counted", flood, told, now-lost)
		}
	})
}

// ctxOf is the struct __sk_buff of a packet that a pod sends.
func ctxOf(p *pod) []byte {
	ctx := make([]byte, 192)
	ctx[40] = byte(p.commit.IfIndex)
	return ctx
}

// A staged change is in force from the next epoch on and not before, and cuts an open connection in both directions; another
// flow loses nothing.
func TestPolicyCutsConnection(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%t", v6), func(t *testing.T) {
			n := newNode(t, loader.Config{})
			a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
			c, d := n.addPod("c", 3, loader.TCX), n.addPod("d", 4, loader.TCX)
			x, y := a.addr(v6), b.addr(v6)
			const friend, stranger = 7, 8
			n.rows(row(100, 0, 0, 0, 0, deny, 1), row(100, friend, 0, 0, 0, allow, 2), row(101, 0, 0, 0, 0, allow, 3))
			n.identify(friend, a.v4, a.v6)
			n.policy(b, 0, 100)
			n.policy(d, 101, 101)
			client, server := connect(t, a, b, v6)
			for fd, other := range map[int]int{client: server, server: client} {
				pass(t, fd, other)
			}
			e := n.events()
			drain(t, e)
			before := n.counts()
			lossless(t, n, c, d, 4000, func() {
				// a is one of the strangers, which policy 100 does not name.
				peers := []maps.Peer{{Prefix: netip.PrefixFrom(x, x.BitLen()), Next: stranger}}
				if err := n.maps.StagePeers(peers); err != nil {
					t.Fatal(err)
				}
				pass(t, client, server)
				pass(t, server, client)
				if got := n.since(before); got["from_pod drop_policy_ingress"] != 0 {
					t.Errorf("dropped before the epoch: %v", got)
				}
				n.raise()
				if err := n.maps.SettlePeers([]netip.Prefix{peers[0].Prefix}); err != nil {
					t.Fatal(err)
				}
				for _, fd := range []int{client, server} {
					if _, err := writeTo(fd, []byte("x")); err != nil {
						t.Fatal(err)
					}
				}
				dropped := make(map[netip.Addr]bool) // by sender
				until(t, "packets of both directions to be dropped", func() bool {
					for _, ev := range drain(t, e) {
						if ev.Verdict == "drop_policy_ingress" && ev.RuleIngress == 1 && ev.Protocol == "tcp" {
							dropped[ev.Source.Addr()] = true
						}
					}
					return dropped[x] && dropped[y]
				})
				silent(t, client)
				silent(t, server)
				for range 10 { // more epochs, in which nothing changes for c and d
					n.raise()
				}
			})
			n.identify(friend, x)
			for _, fd := range []int{client, server} { // TCP sends again what was dropped
				if k, err := readFrom(fd, make([]byte, 10)); err != nil || k != 1 {
					t.Errorf("allowed again: read %d bytes: %v", k, err)
				}
			}
		})
	}
}

// pass sends a byte over a connection.
func pass(t testing.TB, from, to int) {
	t.Helper()
	if _, err := writeTo(from, []byte("y")); err != nil {
		t.Fatal(err)
	}
	if k, err := readFrom(to, make([]byte, 10)); err != nil || k != 1 {
		t.Fatalf("read %d bytes: %v", k, err)
	}
}

// Staged policy ids of a pod are in force from the next epoch on.
func TestStagedPod(t *testing.T) {
	b := newBench(t, loader.Config{})
	f := udp(b.a, b.v4pair()[0], b.v4pair()[1], 1)
	ifindex := uint32(b.b.commit.IfIndex)
	if err := b.maps.StagePod(ifindex, 0, 9); err != nil {
		t.Fatal(err)
	}
	check(t, f, b.fromA(f), "forward_pod")
	b.raise()
	check(t, f, b.fromA(f), "drop_policy_ingress")
	if err := b.maps.SettlePod(ifindex); err != nil {
		t.Fatal(err)
	}
	b.raise()
	check(t, f, b.fromA(f), "drop_policy_ingress")
	if err := b.maps.StagePod(99, 0, 9); !errors.Is(err, maps.ErrNotFound) {
		t.Errorf("staging a pod that is not there: %v", err)
	}
}

// A pod that is put again keeps what it is judged by, unless it is given something else; one that comes after it, at its
// interface or with its addresses, begins anew, and nobody is left with its identity.
func TestPodPolicy(t *testing.T) {
	b := newBench(t, loader.Config{})
	b.rows(row(100, 0, 0, 0, 0, allow, 1), row(100, 7, 0, 0, 0, deny, 2))
	port := uint16(0)
	want := func(verdict string, fail error) {
		t.Helper()
		if fail != nil {
			t.Fatal(fail)
		}
		port++
		f := udp(b.a, at(b.a.v4, port), at(b.b.v4, 53), 1)
		check(t, f, b.fromA(f), verdict)
	}
	p := b.b.commit
	again := func(ids *policy.PodPolicies) error {
		p.Policy = ids
		return commit.AddPod(b.maps, p)
	}
	want("forward_pod", again(nil))
	want("drop_policy_ingress", again(&policy.PodPolicies{Ingress: 9}))
	p.MTU--
	want("drop_policy_ingress", again(nil))
	b.policy(b.b, 0, 100)
	want("forward_pod", again(nil))
	b.identify(7, b.a.v4, b.a.v6)
	want("drop_policy_ingress", again(nil))
	p.Masquerade4 = true
	want("drop_policy_ingress", again(nil))
	want("forward_pod", again(&policy.PodPolicies{}))

	want("drop_policy_ingress", again(&policy.PodPolicies{Ingress: 100}))
	if err := commit.RemovePod(b.maps, b.a.commit); err != nil {
		t.Fatal(err)
	}
	for _, p := range peersOf(t, b.node) {
		t.Errorf("%s is still %d", p.Prefix, p.Identity)
	}
	want("forward_pod", commit.AddPod(b.maps, b.a.commit)) // as anyone else
	if err := commit.RemovePod(b.maps, p); err != nil {
		t.Fatal(err)
	}
	want("forward_pod", again(nil))
}

// A staged identity is in force from the next epoch on, for flows that open too; where it is new, what covered it is until then.
func TestStagedPeers(t *testing.T) {
	families(t, func(t *testing.T, b *bench, x, y netip.Addr) {
		b.rows(row(100, 0, 0, 0, 0, deny, 1), row(100, 7, 0, 0, 0, allow, 2))
		b.policy(b.b, 0, 100)
		wide, err := x.Prefix(x.BitLen() - 8)
		if err != nil {
			t.Fatal(err)
		}
		pod := netip.PrefixFrom(x, x.BitLen())
		next := uint16(1)
		want := func(verdict string) {
			t.Helper()
			f := udp(b.a, at(x, next), at(y, 53), 1)
			next++
			check(t, f, b.fromA(f), verdict)
		}
		for _, step := range []struct {
			peer          maps.Peer
			before, after string
		}{
			{maps.Peer{Prefix: wide, Next: 7}, "drop_policy_ingress", "forward_pod"},
			{maps.Peer{Prefix: pod, Next: 8}, "forward_pod", "drop_policy_ingress"},
			{maps.Peer{Prefix: pod, Next: 7}, "drop_policy_ingress", "forward_pod"},
		} {
			if err := b.maps.StagePeers([]maps.Peer{step.peer}); err != nil {
				t.Fatal(err)
			}
			want(step.before)
			b.raise()
			want(step.after)
			if err := b.maps.SettlePeers([]netip.Prefix{step.peer.Prefix}); err != nil {
				t.Fatal(err)
			}
			want(step.after)
			b.raise()
			want(step.after)
		}
	})
}

// A node whose maps are from before policy gets those that it lacks, and its flows go on.
func TestUpgradeToPolicy(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	client, server := connect(t, a, b, false)
	pass(t, client, server)
	for _, name := range []string{
		bpf.DataplaneMapCaracalPeers, bpf.DataplaneMapCaracalPolicy, bpf.DataplaneMapCaracalRules,
		bpf.DataplaneMapCaracalEvents, bpf.DataplaneMapCaracalTold, bpf.DataplaneMapCaracalChurn,
	} {
		if err := os.Remove(bpf.MapPath(n.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	spec, err := bpf.LoadDataplane()
	if err != nil {
		t.Fatal(err)
	}
	path := bpf.MapPath(n.dir, bpf.DataplaneMapCaracalWork)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	small := spec.Maps[bpf.DataplaneMapCaracalWork].Copy()
	small.ValueSize, small.Value = 456, nil
	work, err := ebpf.NewMap(small)
	if err != nil {
		t.Fatal(err)
	}
	defer work.Close()
	if err := work.Pin(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(bpf.ProgramPath(n.dir, bpf.DataplaneProgSweep)); err != nil {
		t.Fatal(err)
	}
	if _, err := n.maps.SweepFlows(0, 1); !errors.Is(err, maps.ErrNotLoaded) {
		t.Errorf("sweep by programs that can't: %v", err)
	}
	n.do(func() error { return loader.Upgrade(loader.Config{Dir: n.dir}) })
	pass(t, server, client)
	if c := n.churn(); c.Displaced != 0 {
		t.Errorf("churn %+v of flows that are older than it", c)
	}
	n.rows(row(100, 0, 0, 0, 0, deny, 1))
	n.policy(b, 0, 100)
	before := n.counts()
	if _, err := writeTo(client, []byte("x")); err != nil {
		t.Fatal(err)
	}
	until(t, "a drop", func() bool { return n.since(before)["from_pod drop_policy_ingress"] > 0 })
	if got := n.ruleCounts()[1]; got == 0 {
		t.Error("the rule counted nothing")
	}
}
