package policytest

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/policy"
)

// TestHealthy counts what random models and packets lead to: what a test of them means to hold must occur, and often.
func TestHealthy(t *testing.T) {
	const models, packets = 400, 100
	count := make(map[string]int)
	total := 0
	for seed := range uint64(models) {
		g := New(seed)
		m := g.Model()
		for range packets {
			p := g.Packet(m)
			if p.Source == p.Destination || p.Source.Is6() != p.Destination.Is6() || (p.Protocol == icmp) && p.Source.Is6() || p.Protocol == icmpv6 && p.Source.Is4() || !routable(p.Source) || !routable(p.Destination) {
				t.Fatalf("no such packet: %s", p)
			}
			f := m.Flow(p)
			for d, v := range map[policy.Direction]*policy.Verdict{policy.Egress: f.Egress, policy.Ingress: f.Ingress} {
				if v == nil {
					count[d.String()+" of a stranger"]++
					continue
				}
				total++
				tally(count, m, d, *v, p)
			}
			count["flow "+f.Action().String()]++
			count[fmt.Sprintf("protocol %d", p.Protocol)]++
			count[fmt.Sprintf("IPv6 %t", p.Source.Is6())]++
		}
	}
	for _, want := range []struct {
		percent float64
		names   string
	}{
		{15, "allow, deny, flow allow, flow deny, IPv6 false, IPv6 true"},
		{5, "by rule allow, by rule deny, by end of tier, by profile allow, by no policy, pass by default, pass by rule, egress of a stranger, ingress of a stranger, protocol 6, protocol 17, protocol 132"},
		{2, "logged, by profile deny, by end of profiles, by missing profile, no rule looked at, protocol 1, protocol 58, protocol 47, allow after pass, deny after pass, local side"},
		{1, "decided by source Selector, decided by source Nets, decided by destination Selector, decided by destination Nets, decided by destination Ports, decided by Protocol, decided by NotProtocol, named port"},
		{0.2, "decided by IPVersion, decided by ICMP, decided by NotICMP, decided by source NotSelector, decided by source NotNets, decided by source Ports, decided by destination NotSelector, decided by destination NotNets, decided by destination NotPorts, ports without protocol"},
		{0.05, "decided by source NotPorts"},
	} {
		for _, name := range strings.Split(want.names, ", ") {
			if got := 100 * float64(count[name]) / float64(total); got < want.percent {
				t.Errorf("%s: %.2f %% of %d verdicts, want %v %%", name, got, total, want.percent)
			}
		}
	}
	for _, term := range terms {
		if n := count["only "+term+" missed"]; n < total/2000 {
			t.Errorf("a rule of which only %s does not hold: %d of %d verdicts", term, n, total)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(count)) {
		t.Logf("%6.2f %% %s", 100*float64(count[name])/float64(total), name)
	}
}

var terms = []string{"IPVersion", "Protocol", "NotProtocol", "ICMP", "NotICMP", "source Selector", "source NotSelector", "source Nets", "source NotNets", "source Ports",
	"destination Selector", "destination NotSelector", "destination Nets", "destination NotNets", "destination Ports", "destination NotPorts"}

// tally counts what a verdict came from.
func tally(count map[string]int, m *policy.Model, d policy.Direction, v policy.Verdict, p policy.Packet) {
	count[v.Action.String()]++
	if v.Logged {
		count["logged"]++
	}
	if len(v.Trace) == 0 {
		count["no rule looked at"]++
	}
	passed := false
	for i, l := range v.Trace {
		switch {
		case len(l.Missed) == 1:
			count["only "+strings.TrimSpace(l.Missed[0].End+" "+l.Missed[0].Field)+" missed"]++
		case len(l.Missed) == 0 && l.Rule.Action == policy.Pass:
			count["pass by rule"]++
			passed = true
		}
		if l.Ref.Tier != "" && len(l.Missed) > 0 && (i+1 == len(v.Trace) || v.Trace[i+1].Ref.Tier != l.Ref.Tier) && v.Rule.Tier != l.Ref.Tier {
			count["pass by default"]++
		}
	}
	if passed {
		count[v.Action.String()+" after pass"]++
	}
	switch {
	case v.Rule.Policy == "":
		count["by no policy"]++
	case v.Rule.Tier != "" && v.Rule.Index == policy.NoRule:
		count["by end of tier"]++
	case v.Rule.Tier == "" && v.Rule.Policy == "missing":
		count["by missing profile"]++
	case v.Rule.Index == policy.NoRule:
		count["by end of profiles"]++
	default:
		if v.Rule.Tier == "" {
			count["by profile "+v.Action.String()]++
		} else {
			count["by rule "+v.Action.String()]++
		}
		r := v.Trace[len(v.Trace)-1].Rule
		for term, asked := range conditionsOf(r) {
			if asked {
				count["decided by "+term]++
			}
		}
		local, ports := r.Destination, slices.Concat(r.Source.Ports, r.Destination.Ports)
		if d == policy.Egress {
			local = r.Source
		}
		if local.Selector != nil || local.Nets != nil || local.NotSelector != nil || local.NotNets != nil {
			count["local side"]++
		}
		if slices.ContainsFunc(ports, func(p policy.Ports) bool { return p.Name != "" }) {
			count["named port"]++
		}
		if ports != nil && r.Protocol == nil {
			count["ports without protocol"]++
		}
	}
}

func conditionsOf(r *policy.Rule) map[string]bool {
	all := map[string]bool{"IPVersion": r.IPVersion != 0, "Protocol": r.Protocol != nil, "NotProtocol": r.NotProtocol != nil, "ICMP": r.ICMP != nil, "NotICMP": r.NotICMP != nil}
	for end, p := range map[string]policy.Peer{"source ": r.Source, "destination ": r.Destination} {
		all[end+"Selector"], all[end+"NotSelector"] = p.Selector != nil, p.NotSelector != nil
		all[end+"Nets"], all[end+"NotNets"] = p.Nets != nil, p.NotNets != nil
		all[end+"Ports"], all[end+"NotPorts"] = p.Ports != nil, p.NotPorts != nil
	}
	return all
}

// TestSound holds random and changed models to what a Model promises.
func TestSound(t *testing.T) {
	for seed := range uint64(300) {
		g := New(seed)
		m := g.Model()
		for range 10 {
			before := List(m, policy.Packet{})
			changed := g.Change(m)
			if List(m, policy.Packet{}) != before {
				t.Fatalf("seed %d: Change changed what it was given", seed)
			}
			m = changed
			holders, ids := make(map[netip.Addr]string), make(map[string]bool)
			for id, e := range m.Endpoints {
				for _, a := range e.Addresses {
					if other := holders[a]; other != "" || e.ID != id {
						t.Fatalf("seed %d: %s is %s's, %s's", seed, a, other, id)
					}
					holders[a] = id
				}
			}
			for _, tier := range m.Tiers {
				for _, p := range tier.Policies {
					if ids[p.ID] {
						t.Fatalf("seed %d: two policies %s", seed, p.ID)
					}
					ids[p.ID] = true
				}
			}
			for _, r := range rulesOf(m) {
				if (r.ICMP != nil || r.NotICMP != nil) && (r.Protocol == nil || *r.Protocol != icmp && *r.Protocol != icmpv6) {
					t.Fatalf("seed %d: ICMP without its protocol: %s", seed, r)
				}
				for _, n := range slices.Concat(r.Source.Nets, r.Source.NotNets, r.Destination.Nets, r.Destination.NotNets) {
					if n != n.Masked() {
						t.Fatalf("seed %d: %s is not masked", seed, n)
					}
				}
			}
		}
	}
	if a, b := New(7), New(7); List(a.Model(), policy.Packet{}) != List(b.Model(), policy.Packet{}) {
		t.Error("one seed made two models")
	}
	one, two := New(1), New(2)
	if cmp.Equal(List(one.Model(), policy.Packet{}), List(two.Model(), policy.Packet{})) {
		t.Error("two seeds made one model")
	}
}

// TestShrink plants faults in the evaluator and wants of each the few lines that show it.
func TestShrink(t *testing.T) {
	for _, c := range []struct {
		name  string
		wrong func(*policy.Model, policy.Packet) bool
		lines int // at most
	}{
		{"takes Log for Allow", func(m *policy.Model, p policy.Packet) bool {
			for _, v := range verdicts(m, p) {
				if v.Logged && v.Action == policy.Deny {
					return true
				}
			}
			return false
		}, 6},
		{"takes a net's last address out of it", func(m *policy.Model, p policy.Packet) bool {
			for _, v := range verdicts(m, p) {
				for _, l := range v.Trace {
					for _, n := range l.Rule.Destination.Nets {
						if n.Bits() < 32 && lastOf(n) == p.Destination && len(l.Missed) == 0 {
							return true
						}
					}
				}
			}
			return false
		}, 5},
		{"forgets the profiles behind Pass", func(m *policy.Model, p policy.Packet) bool {
			for _, v := range verdicts(m, p) {
				if v.Rule.Tier == "" && v.Action == policy.Deny && slices.ContainsFunc(v.Trace, func(l policy.Look) bool { return len(l.Missed) == 0 && l.Rule.Action == policy.Pass }) {
					return true
				}
			}
			return false
		}, 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := uint64(0); ; seed++ {
				if seed == 1000 {
					t.Fatal("no model shows it")
				}
				g := New(seed)
				m := g.Model()
				for range 50 {
					p := g.Packet(m)
					if !c.wrong(m, p) {
						continue
					}
					before := List(m, p)
					small, q := Shrink(m, p, c.wrong)
					text := List(small, q)
					if !c.wrong(small, q) || strings.Count(text, "\n") > c.lines {
						t.Fatalf("became, from %d lines:\n%s", strings.Count(before, "\n"), text)
					}
					if List(m, p) != before {
						t.Fatal("Shrink changed what it was given")
					}
					t.Logf("from %d lines:\n%s", strings.Count(before, "\n"), text)
					return
				}
			}
		})
	}
}

func verdicts(m *policy.Model, p policy.Packet) []policy.Verdict {
	var all []policy.Verdict
	f := m.Flow(p)
	for _, v := range []*policy.Verdict{f.Egress, f.Ingress} {
		if v != nil {
			all = append(all, *v)
		}
	}
	return all
}

// recorder is a test that fails; it keeps what was said.
type recorder struct {
	testing.TB
	said string
}

func (r *recorder) Helper() {}
func (r *recorder) Fatalf(format string, args ...any) {
	r.said = fmt.Sprintf(format, args...)
	panic(r)
}

func TestCheck(t *testing.T) {
	Check(t, 1, 3, 5, func(m *policy.Model, all []policy.Packet) (int, error) {
		if len(all) != 5 {
			t.Errorf("%d packets", len(all))
		}
		return 0, nil
	})
	r := &recorder{TB: t}
	func() {
		defer func() { _ = recover() }()
		Check(r, 1, 300, 50, func(m *policy.Model, all []policy.Packet) (int, error) {
			for i, p := range all {
				if slices.ContainsFunc(verdicts(m, p), func(v policy.Verdict) bool { return v.Logged }) {
					return i, errors.New("logged")
				}
			}
			return 0, nil
		})
	}()
	if !strings.Contains(r.said, ": logged\nendpoint ") || !strings.Contains(r.said, " 0: log everything\npacket ") || strings.Count(r.said, "\n") > 6 {
		t.Errorf("said %q", r.said)
	}
}

func TestList(t *testing.T) {
	m := &policy.Model{
		Endpoints: map[string]*policy.Endpoint{"a": {ID: "a", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Labels: map[string]string{"x": "y", "b": "c"}, Ports: []policy.NamedPort{{Name: "http", Protocol: tcp, Port: 80}}, Profiles: []string{"p"}}},
		Sets:      map[string]*policy.Set{"s": {ID: "s", Nets: prefixes("192.0.2.0/24"), Labels: map[string]string{"x": "y"}}},
		Profiles:  map[string]*policy.Profile{"p": {ID: "Profile p", Egress: []policy.Rule{{Action: policy.Allow}}}},
		Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{
			{ID: "q", Selector: selector.Selector{}, Ingress: &policy.Rules{}, Egress: &policy.Rules{Rules: []policy.Rule{{Action: policy.Deny}}}},
		}}},
	}
	want := `endpoint a [10.0.0.1] b=c x=y
    port http is 80 of protocol 6
    profiles p
set s [192.0.2.0/24] x=y
tier default, default deny
  policy q for all()
    ingress: no rules
    egress 0: deny everything
profile p
    egress 0: allow everything
packet TCP 10.0.0.1:1 -> 192.0.2.1:2
`
	if got := List(m, policy.Packet{Protocol: tcp, Source: netip.MustParseAddr("10.0.0.1"), Destination: netip.MustParseAddr("192.0.2.1"), SourcePort: 1, TargetPort: 2}); got != want {
		t.Error(cmp.Diff(want, got))
	}
}
