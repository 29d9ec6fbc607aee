package policytest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/policy"
)

// Shrink takes from a model what can be taken, piece by piece, as long as fails says that it fails with the packet, and makes
// the packet plainer in the same way. fails must not change what it is given.
func Shrink(m *policy.Model, p policy.Packet, fails func(*policy.Model, policy.Packet) bool) (*policy.Model, policy.Packet) {
	for smaller := true; smaller; {
		smaller = false
		for _, c := range cuts(m) {
			// The piece may have gone with an earlier one, or have had nothing in it.
			if next := c(m); next != nil && size(next) < size(m) && fails(next, p) {
				m, smaller = next, true
			}
		}
		for _, next := range plainer(p) {
			if fails(m, next) {
				p, smaller = next, true
				break
			}
		}
	}
	return m, p
}

// Check verifies random models, each with random packets. verify says of which packet the subject is wrong, by its index, and
// in what; nil if of none. The first failure is made small and ends the test.
func Check(t testing.TB, seed uint64, models, packets int, verify func(*policy.Model, []policy.Packet) (int, error)) {
	t.Helper()
	for n := range uint64(models) {
		g := New(seed + n)
		m := g.Model()
		var all []policy.Packet
		for range packets {
			all = append(all, g.Packet(m))
		}
		i, err := verify(m, all)
		if err == nil {
			continue
		}
		small, p := Shrink(m, all[i], func(m *policy.Model, p policy.Packet) bool {
			_, err := verify(m, []policy.Packet{p})
			return err != nil
		})
		if _, alone := verify(small, []policy.Packet{p}); alone != nil {
			err = alone
		}
		t.Fatalf("seed %d: %v\n%s", seed+n, err, List(small, p))
	}
}

// size goes down with every piece that is taken. "everything" is what a rule says that asks for nothing.
func size(m *policy.Model) int {
	return len(strings.ReplaceAll(List(m, policy.Packet{}), "everything", ""))
}

// cut makes a copy of a model without one piece; nil if there is no such piece.
type cut func(*policy.Model) *policy.Model

// cuts are all cuts of a model, those of the largest pieces first.
func cuts(m *policy.Model) []cut {
	var all []cut
	for i := len(m.Tiers) - 1; i >= 0; i-- {
		all = append(all, func(m *policy.Model) *policy.Model {
			m = Clone(m)
			m.Tiers = slices.Delete(m.Tiers, i, i+1)
			return m
		})
	}
	for i, t := range m.Tiers {
		for j := len(t.Policies) - 1; j >= 0; j-- {
			all = append(all, func(m *policy.Model) *policy.Model {
				if i >= len(m.Tiers) || j >= len(m.Tiers[i].Policies) {
					return nil
				}
				m = Clone(m)
				m.Tiers[i].Policies = slices.Delete(m.Tiers[i].Policies, j, j+1)
				return m
			})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.Endpoints)) {
		all = append(all, func(m *policy.Model) *policy.Model { m = Clone(m); delete(m.Endpoints, id); return m })
		for _, piece := range []func(*policy.Endpoint){
			func(e *policy.Endpoint) { e.Profiles = nil },
			func(e *policy.Endpoint) { e.Profiles = e.Profiles[:max(len(e.Profiles)-1, 0)] },
			func(e *policy.Endpoint) { e.Profiles = e.Profiles[min(len(e.Profiles), 1):] },
			func(e *policy.Endpoint) { e.Ports = nil },
			func(e *policy.Endpoint) { e.Ports = e.Ports[:max(len(e.Ports)-1, 0)] },
			func(e *policy.Endpoint) { e.Ports = e.Ports[min(len(e.Ports), 1):] },
			func(e *policy.Endpoint) { e.Addresses = e.Addresses[:min(len(e.Addresses), 1)] },
			func(e *policy.Endpoint) { e.Addresses = e.Addresses[max(len(e.Addresses)-1, 0):] },
		} {
			all = append(all, ofEndpoint(id, piece))
		}
		for _, key := range slices.Sorted(maps.Keys(m.Endpoints[id].Labels)) {
			all = append(all, ofEndpoint(id, func(e *policy.Endpoint) { e.Labels = maps.Clone(e.Labels); delete(e.Labels, key) }))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.Sets)) {
		all = append(all, func(m *policy.Model) *policy.Model { m = Clone(m); delete(m.Sets, id); return m })
		for i := len(m.Sets[id].Nets) - 1; i >= 0; i-- {
			all = append(all, func(m *policy.Model) *policy.Model {
				if m.Sets[id] == nil || i >= len(m.Sets[id].Nets) {
					return nil
				}
				m = Clone(m)
				s := *m.Sets[id]
				s.Nets = slices.Delete(slices.Clone(s.Nets), i, i+1)
				m.Sets[id] = &s
				return m
			})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Profiles)) {
		all = append(all, func(m *policy.Model) *policy.Model { m = Clone(m); delete(m.Profiles, name); return m })
		for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
			all = append(all, ofRules(m.Profiles[name].Rules(d), func(m *policy.Model, change func([]policy.Rule) []policy.Rule) *policy.Model {
				if m.Profiles[name] == nil {
					return nil
				}
				m = Clone(m)
				profile := *m.Profiles[name]
				rules := &profile.Ingress
				if d == policy.Egress {
					rules = &profile.Egress
				}
				*rules = change(*rules)
				m.Profiles[name] = &profile
				return m
			})...)
		}
	}
	for i, t := range m.Tiers {
		for j, pol := range t.Policies {
			ofPolicy := func(m *policy.Model, change func(*policy.Policy)) *policy.Model {
				if i >= len(m.Tiers) || j >= len(m.Tiers[i].Policies) {
					return nil
				}
				m = Clone(m)
				changed := *m.Tiers[i].Policies[j]
				change(&changed)
				m.Tiers[i].Policies[j] = &changed
				return m
			}
			all = append(all,
				func(m *policy.Model) *policy.Model { return ofPolicy(m, func(p *policy.Policy) { p.Ingress = nil }) },
				func(m *policy.Model) *policy.Model { return ofPolicy(m, func(p *policy.Policy) { p.Egress = nil }) },
				func(m *policy.Model) *policy.Model {
					return ofPolicy(m, func(p *policy.Policy) { p.Selector = selector.Selector{} })
				})
			for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
				if pol.Rules(d) == nil {
					continue
				}
				all = append(all, ofRules(pol.Rules(d).Rules, func(m *policy.Model, change func([]policy.Rule) []policy.Rule) *policy.Model {
					return ofPolicy(m, func(p *policy.Policy) {
						rules := &p.Ingress
						if d == policy.Egress {
							rules = &p.Egress
						}
						if *rules != nil {
							*rules = &policy.Rules{Rules: change((*rules).Rules)}
						}
					})
				})...)
			}
		}
	}
	return all
}

func ofEndpoint(id string, change func(*policy.Endpoint)) cut {
	return func(m *policy.Model) *policy.Model {
		if m.Endpoints[id] == nil {
			return nil
		}
		m = Clone(m)
		e := *m.Endpoints[id]
		change(&e)
		m.Endpoints[id] = &e
		return m
	}
}

// conditions take one condition off a rule, or part of one.
var conditions = func() []func(*policy.Rule) {
	all := []func(*policy.Rule){
		func(r *policy.Rule) { r.IPVersion = 0 },
		func(r *policy.Rule) { r.ICMP = nil },
		func(r *policy.Rule) { r.NotICMP = nil },
		func(r *policy.Rule) { // ICMP needs its protocol
			if r.ICMP == nil && r.NotICMP == nil {
				r.Protocol = nil
			}
		},
		func(r *policy.Rule) { r.NotProtocol = nil },
		func(r *policy.Rule) { r.Source = policy.Peer{} },
		func(r *policy.Rule) { r.Destination = policy.Peer{} },
	}
	for _, change := range []func(*policy.Peer){
		func(p *policy.Peer) { p.Selector = nil },
		func(p *policy.Peer) {
			if p.Selector != nil {
				p.Selector = &selector.Selector{}
			}
		},
		func(p *policy.Peer) { p.NotSelector = nil },
		func(p *policy.Peer) { p.Nets = nil },
		func(p *policy.Peer) { p.Nets = p.Nets[min(1, max(len(p.Nets)-1, 0)):] },
		func(p *policy.Peer) { p.Nets = p.Nets[:max(len(p.Nets)-1, min(1, len(p.Nets)))] },
		func(p *policy.Peer) { p.NotNets = nil },
		func(p *policy.Peer) { p.NotNets = p.NotNets[min(1, max(len(p.NotNets)-1, 0)):] },
		func(p *policy.Peer) { p.NotNets = p.NotNets[:max(len(p.NotNets)-1, min(1, len(p.NotNets)))] },
		func(p *policy.Peer) { p.Ports = nil },
		func(p *policy.Peer) { p.Ports = p.Ports[min(1, max(len(p.Ports)-1, 0)):] },
		func(p *policy.Peer) { p.Ports = p.Ports[:max(len(p.Ports)-1, min(1, len(p.Ports)))] },
		func(p *policy.Peer) { p.NotPorts = nil },
	} {
		all = append(all, func(r *policy.Rule) { change(&r.Source) }, func(r *policy.Rule) { change(&r.Destination) })
	}
	return all
}()

// ofRules are the cuts of a list of rules; within puts a changed one into a copy of a model.
func ofRules(rules []policy.Rule, within func(*policy.Model, func([]policy.Rule) []policy.Rule) *policy.Model) []cut {
	var all []cut
	for i := len(rules) - 1; i >= 0; i-- {
		change := func(do func([]policy.Rule) []policy.Rule) cut {
			return func(m *policy.Model) *policy.Model {
				there := false
				next := within(m, func(rules []policy.Rule) []policy.Rule {
					if there = i < len(rules); !there {
						return rules
					}
					return do(slices.Clone(rules))
				})
				if !there {
					return nil
				}
				return next
			}
		}
		all = append(all, change(func(rules []policy.Rule) []policy.Rule { return slices.Delete(rules, i, i+1) }))
		for _, c := range conditions {
			all = append(all, change(func(rules []policy.Rule) []policy.Rule { c(&rules[i]); return rules }))
		}
	}
	return all
}

// plainer are packets that are the same but for a field that is plainer.
func plainer(p policy.Packet) []policy.Packet {
	var all []policy.Packet
	for _, change := range []func(*policy.Packet){
		func(p *policy.Packet) { p.SourcePort = min(p.SourcePort, 40000) },
		func(p *policy.Packet) { p.TargetPort = min(p.TargetPort, 80) },
		func(p *policy.Packet) { p.ICMPCode = 0 },
		func(p *policy.Packet) { p.ICMPType = min(p.ICMPType, 8) },
		func(p *policy.Packet) {
			if p.Protocol == udp || p.Protocol == sctp {
				p.Protocol = tcp
			}
		},
		func(p *policy.Packet) { p.Source = stranger(p.Source, 1) },
		func(p *policy.Packet) { p.Destination = stranger(p.Destination, 2) },
	} {
		q := p
		if change(&q); q != p {
			all = append(all, q)
		}
	}
	return all
}

// stranger is an address of the same IP version that is in none of the nets of random models but the widest.
func stranger(a netip.Addr, host byte) netip.Addr {
	if a.Is4() {
		return netip.AddrFrom4([4]byte{203, 0, 113, host})
	}
	return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0xff, 0xff, 15: host})
}

// List is a model and a packet to read: what is there, in what order it is asked, and what the packet is.
func List(m *policy.Model, p policy.Packet) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	labels := func(l map[string]string) string {
		var words []string
		for _, key := range slices.Sorted(maps.Keys(l)) {
			words = append(words, key+"="+l[key])
		}
		return strings.Join(words, " ")
	}
	rules := func(d policy.Direction, all []policy.Rule) {
		for i, r := range all {
			line("    %s %d: %s", d, i, r)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.Endpoints)) {
		e := m.Endpoints[id]
		line("endpoint %s %v %s", id, e.Addresses, labels(e.Labels))
		for _, n := range e.Ports {
			line("    port %s is %d of protocol %d", n.Name, n.Port, n.Protocol)
		}
		if len(e.Profiles) > 0 {
			line("    profiles %s", strings.Join(e.Profiles, ", "))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.Sets)) {
		line("set %s %v %s", id, m.Sets[id].Nets, labels(m.Sets[id].Labels))
	}
	for _, t := range m.Tiers {
		line("tier %s, default %s", t.Name, t.Default)
		for _, pol := range t.Policies {
			line("  policy %s for %s", pol.ID, pol.Selector)
			for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
				if r := pol.Rules(d); r != nil && len(r.Rules) == 0 {
					line("    %s: no rules", d)
				} else if r != nil {
					rules(d, r.Rules)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Profiles)) {
		line("profile %s", name)
		rules(policy.Ingress, m.Profiles[name].Ingress)
		rules(policy.Egress, m.Profiles[name].Egress)
	}
	line("packet %s", p)
	return b.String()
}
