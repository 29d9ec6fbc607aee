package policy_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	. "github.com/caracal-net/caracal/policy"

	"github.com/caracal-net/caracal/api/selector"
)

func sel(t testing.TB, text string) selector.Selector {
	t.Helper()
	s, err := selector.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func to[T any](v T) *T { return &v }

func nets(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

const (
	icmp, tcp, udp, gre, icmpv6, sctp = 1, 6, 17, 47, 58, 132
)

// neighbours are a server and a client with both IP versions, and a set.
func neighbours() *Model {
	return &Model{
		Endpoints: map[string]*Endpoint{
			"server": {ID: "server", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, Labels: map[string]string{"role": "server"},
				Ports: []NamedPort{{"web", tcp, 8080}, {"dns", udp, 53}, {"dns", tcp, 5353}}},
			"client": {ID: "client", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}, Labels: map[string]string{"role": "client"},
				Ports: []NamedPort{{"web", tcp, 80}}},
		},
		Sets: map[string]*Set{
			"office": {ID: "office", Labels: map[string]string{"role": "office"}, Nets: nets("192.0.2.0/24", "10.0.0.2/32")},
		},
	}
}

// packet is from the client to the server, over IPv4.
func packet(protocol uint8, change func(*Packet)) Packet {
	p := Packet{Protocol: protocol, Source: netip.MustParseAddr("10.0.0.2"), Destination: netip.MustParseAddr("10.0.0.1")}
	if protocol == tcp || protocol == udp || protocol == sctp {
		p.SourcePort, p.TargetPort = 40000, 8080
	}
	if change != nil {
		change(&p)
	}
	return p
}

func from(source string) func(*Packet) {
	return func(p *Packet) { p.Source = netip.MustParseAddr(source) }
}

func port(n uint16) func(*Packet) { return func(p *Packet) { p.TargetPort = n } }

// TestRule holds every condition of a rule against packets that just meet it and that just do not.
func TestRule(t *testing.T) {
	v6 := packet(tcp, func(p *Packet) {
		p.Source, p.Destination = netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::1")
	})
	echo := packet(icmp, func(p *Packet) { p.ICMPType, p.ICMPCode = 8, 0 })
	plain := packet(tcp, nil)
	stranger := packet(tcp, from("198.51.100.1"))
	client, office := to(sel(t, "role == 'client'")), to(sel(t, "role == 'office'"))
	for _, c := range []struct {
		name   string
		rule   Rule
		packet Packet
		miss   string // "": it matches
	}{
		{"everything", Rule{}, plain, ""},
		{"IPv4", Rule{IPVersion: 4}, plain, ""},
		{"not IPv6", Rule{IPVersion: 6}, plain, "IPVersion"},
		{"IPv6", Rule{IPVersion: 6}, v6, ""},
		{"protocol", Rule{Protocol: to[uint8](tcp)}, plain, ""},
		{"another protocol", Rule{Protocol: to[uint8](udp)}, plain, "Protocol"},
		{"protocol 0 is one", Rule{Protocol: to[uint8](0)}, plain, "Protocol"},
		{"not protocol", Rule{NotProtocol: to[uint8](udp)}, plain, ""},
		{"not this protocol", Rule{NotProtocol: to[uint8](tcp)}, plain, "NotProtocol"},
		{"ICMP type", Rule{ICMP: &ICMP{Type: 8}}, echo, ""},
		{"ICMP type and code", Rule{ICMP: &ICMP{Type: 8, Code: to[uint8](0)}}, echo, ""},
		{"another ICMP code", Rule{ICMP: &ICMP{Type: 8, Code: to[uint8](1)}}, echo, "ICMP"},
		{"another ICMP type", Rule{ICMP: &ICMP{Type: 0}}, echo, "ICMP"},
		{"no ICMP at all", Rule{ICMP: &ICMP{Type: 0}}, plain, "ICMP"},
		{"not this ICMP type", Rule{NotICMP: &ICMP{Type: 8}}, echo, "NotICMP"},
		{"not another ICMP code", Rule{NotICMP: &ICMP{Type: 8, Code: to[uint8](1)}}, echo, ""},

		{"selector", Rule{Source: Peer{Selector: client}}, plain, ""},
		{"selector of a set", Rule{Source: Peer{Selector: office}}, packet(tcp, from("192.0.2.255")), ""},
		{"selector of a set that holds an endpoint", Rule{Source: Peer{Selector: office}}, plain, ""},
		{"beside the set", Rule{Source: Peer{Selector: office}}, packet(tcp, from("192.0.3.0")), "source Selector"},
		{"all() is not the world", Rule{Source: Peer{Selector: &selector.Selector{}}}, stranger, "source Selector"},
		{"no selector is true of a stranger", Rule{Source: Peer{Selector: to(sel(t, "!has(role)"))}}, stranger, "source Selector"},
		{"every not selector is true of a stranger", Rule{Source: Peer{NotSelector: &selector.Selector{}}}, stranger, ""},
		{"not selector", Rule{Source: Peer{NotSelector: client}}, plain, "source NotSelector"},
		{"not the selector of one of its sets", Rule{Source: Peer{NotSelector: office}}, plain, "source NotSelector"},
		{"selector of the other end", Rule{Destination: Peer{Selector: client}}, plain, "destination Selector"},

		{"first of a net", Rule{Source: Peer{Nets: nets("10.0.0.2/31")}}, plain, ""},
		{"before a net", Rule{Destination: Peer{Nets: nets("10.0.0.2/31")}}, plain, "destination Nets"},
		{"one of two nets", Rule{Source: Peer{Nets: nets("192.0.2.0/24", "10.0.0.2/32")}}, plain, ""},
		{"0.0.0.0/0", Rule{Source: Peer{Nets: nets("0.0.0.0/0")}}, plain, ""},
		{"0.0.0.0/0 is not IPv6", Rule{Source: Peer{Nets: nets("0.0.0.0/0")}}, v6, "source Nets"},
		{"nets of which there are none", Rule{Source: Peer{Nets: nets()}}, plain, ""},
		{"an empty list of nets", Rule{Source: Peer{Nets: []netip.Prefix{}}}, plain, "source Nets"},
		{"not net", Rule{Source: Peer{Nets: nets("10.0.0.0/8"), NotNets: nets("10.0.0.2/32")}}, plain, "source NotNets"},
		{"not another net", Rule{Source: Peer{Nets: nets("10.0.0.0/8"), NotNets: nets("10.0.0.3/32")}}, plain, ""},
		{"not 0.0.0.0/0 is IPv6", Rule{Source: Peer{NotNets: nets("0.0.0.0/0")}}, v6, ""},

		{"port", Rule{Destination: Peer{Ports: []Ports{{First: 80, Last: 80}, {First: 8080, Last: 8080}}}}, plain, ""},
		{"last port", Rule{Destination: Peer{Ports: []Ports{{First: 8000, Last: 8080}}}}, plain, ""},
		{"first port", Rule{Destination: Peer{Ports: []Ports{{First: 8080, Last: 65535}}}}, plain, ""},
		{"after the port", Rule{Destination: Peer{Ports: []Ports{{First: 8000, Last: 8079}}}}, plain, "destination Ports"},
		{"source port", Rule{Source: Peer{Ports: []Ports{{First: 40000, Last: 40000}}}}, plain, ""},
		{"another source port", Rule{Source: Peer{Ports: []Ports{{First: 8080, Last: 8080}}}}, plain, "source Ports"},
		{"all ports of what has none", Rule{Destination: Peer{Ports: []Ports{{First: 0, Last: 65535}}}}, packet(gre, nil), "destination Ports"},
		{"not a port of what has none", Rule{Destination: Peer{NotPorts: []Ports{{First: 0, Last: 65535}}}}, packet(gre, nil), ""},
		{"not port", Rule{Destination: Peer{NotPorts: []Ports{{First: 8080, Last: 8081}}}}, plain, "destination NotPorts"},
		{"not another port", Rule{Destination: Peer{NotPorts: []Ports{{First: 8081, Last: 8081}}}}, plain, ""},

		{"named port", Rule{Destination: Peer{Ports: []Ports{{Name: "web"}}}}, plain, ""},
		{"named port as another endpoint has it", Rule{Destination: Peer{Ports: []Ports{{Name: "web"}}}}, packet(tcp, port(80)), "destination Ports"},
		{"named port of another protocol", Rule{Destination: Peer{Ports: []Ports{{Name: "web"}}}}, packet(udp, nil), "destination Ports"},
		{"a name for two protocols: UDP", Rule{Destination: Peer{Ports: []Ports{{Name: "dns"}}}}, packet(udp, port(53)), ""},
		{"a name for two protocols: TCP", Rule{Destination: Peer{Ports: []Ports{{Name: "dns"}}}}, packet(tcp, port(53)), "destination Ports"},
		{"a name nobody has", Rule{Destination: Peer{Ports: []Ports{{Name: "none"}}}}, plain, "destination Ports"},
		{"not named port", Rule{Destination: Peer{NotPorts: []Ports{{Name: "web"}}}}, plain, "destination NotPorts"},
		{"not a name nobody has", Rule{Destination: Peer{NotPorts: []Ports{{Name: "none"}}}}, plain, ""},
		{"named source port", Rule{Source: Peer{Ports: []Ports{{Name: "web"}}}}, packet(tcp, func(p *Packet) { p.SourcePort = 80 }), ""},
		{"named port of a stranger", Rule{Source: Peer{Ports: []Ports{{Name: "web"}}}}, packet(tcp, func(p *Packet) { from("198.51.100.1")(p); p.SourcePort = 80 }), "source Ports"},

		{"the first condition that fails leads", Rule{Protocol: to[uint8](udp), Source: Peer{Selector: office}, Destination: Peer{Nets: nets("10.9.0.0/16")}}, plain, "Protocol"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := neighbours()
			c.rule.Action = Allow
			m.Tiers = []Tier{{Name: "default", Default: Deny, Policies: []*Policy{{ID: "p", Ingress: &Rules{[]Rule{c.rule}}}}}}
			v := m.Evaluate("server", Ingress, c.packet)
			want, rule := Allow, RuleRef{"default", "p", 0}
			if c.miss != "" {
				want, rule = Deny, RuleRef{"default", "p", NoRule}
			}
			missed := ""
			if len(v.Trace) == 1 && len(v.Trace[0].Missed) > 0 {
				first := v.Trace[0].Missed[0]
				missed = first.Field
				if first.End != "" {
					missed = first.End + " " + first.Field
				}
			}
			if v.Action != want || v.Rule != rule || missed != c.miss {
				t.Errorf("%+v: want %d by %v, missed %q", v, want, rule, c.miss)
			}
		})
	}
}

// TestOrder is how tiers, policies, rules, defaults and profiles follow each other.
func TestOrder(t *testing.T) {
	rules := func(actions ...Action) *Rules {
		r := &Rules{Rules: []Rule{}}
		for _, a := range actions {
			rule := Rule{Action: a}
			if a > Log { // not for this packet
				rule = Rule{Action: a - 10, Protocol: to[uint8](gre)}
			}
			r.Rules = append(r.Rules, rule)
		}
		return r
	}
	const no = 10 // no+Allow: an Allow that does not match
	everyone, nobody := selector.Selector{}, sel(t, "role == 'nobody'")
	for _, c := range []struct {
		name     string
		tiers    []Tier
		profiles []string
		want     Action
		rule     RuleRef
		logged   bool
		looks    int
	}{
		{name: "nothing", want: Allow, rule: RuleRef{Index: NoRule}},
		{name: "a tier without policies", tiers: []Tier{{"a", nil, Deny}}, want: Allow, rule: RuleRef{Index: NoRule}},
		{name: "a policy for others", tiers: []Tier{{"a", []*Policy{{"p", nobody, rules(Deny), nil}}, Deny}}, want: Allow, rule: RuleRef{Index: NoRule}},
		{name: "a policy for the other direction", tiers: []Tier{{"a", []*Policy{{"p", everyone, nil, rules(Deny)}}, Deny}}, want: Allow, rule: RuleRef{Index: NoRule}},
		{name: "a policy without rules", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(), nil}}, Deny}}, want: Deny, rule: RuleRef{"a", "p", NoRule}},
		{name: "and one that allows behind it", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(), nil}, {"q", everyone, rules(no+Deny, Allow, Deny), nil}}, Deny}}, want: Allow, rule: RuleRef{"a", "q", 1}, looks: 2},
		{name: "the first that matches decides", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(no+Allow, Deny, Allow), nil}, {"q", everyone, rules(Allow), nil}}, Deny}}, want: Deny, rule: RuleRef{"a", "p", 1}, looks: 2},
		{name: "the end of a tier is the last policy's that selects", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(no + Allow), nil}, {"q", everyone, rules(), nil}, {"r", nobody, rules(Allow), nil}}, Deny}}, want: Deny, rule: RuleRef{"a", "q", NoRule}, looks: 1},
		{name: "a tier whose default is Pass", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(no + Deny), nil}}, Pass}}, want: Allow, rule: RuleRef{Index: NoRule}, looks: 1},
		{name: "Log goes on", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Log, Deny), nil}}, Deny}}, want: Deny, rule: RuleRef{"a", "p", 1}, logged: true, looks: 2},
		{name: "Log that does not match", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(no+Log, Allow), nil}}, Deny}}, want: Allow, rule: RuleRef{"a", "p", 1}, looks: 2},
		{name: "Log behind what decides", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Allow, Log), nil}}, Deny}}, want: Allow, rule: RuleRef{"a", "p", 0}, looks: 1},
		{name: "Log and the default", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Log), nil}}, Deny}}, want: Deny, rule: RuleRef{"a", "p", NoRule}, logged: true, looks: 1},
		{name: "Pass leaves the tier", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Log, Pass, Deny), nil}, {"q", everyone, rules(Deny), nil}}, Deny}, {"b", []*Policy{{"r", everyone, rules(Deny), nil}}, Deny}}, want: Deny, rule: RuleRef{"b", "r", 0}, logged: true, looks: 3},
		{name: "a decision ends with its tier", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Allow), nil}}, Deny}, {"b", []*Policy{{"r", everyone, rules(Deny), nil}}, Deny}}, want: Allow, rule: RuleRef{"a", "p", 0}, looks: 1},
		{name: "Pass of the last tier, no profile", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Pass), nil}}, Deny}}, want: Allow, rule: RuleRef{Index: NoRule}, looks: 1},
		{name: "Pass of the last tier to a profile", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(Pass), nil}}, Deny}}, profiles: []string{"open"}, want: Allow, rule: RuleRef{"", "Profile open", 0}, looks: 2},
		{name: "a profile is not asked when a tier decides", tiers: []Tier{{"a", []*Policy{{"p", everyone, rules(), nil}}, Deny}}, profiles: []string{"open"}, want: Deny, rule: RuleRef{"a", "p", NoRule}},
		{name: "profiles in order", profiles: []string{"deaf", "open", "shut"}, want: Allow, rule: RuleRef{"", "Profile open", 0}, looks: 2},
		{name: "profiles in another order", profiles: []string{"deaf", "shut", "open"}, want: Deny, rule: RuleRef{"", "Profile shut", 1}, logged: true, looks: 3},
		{name: "the end of the profiles", profiles: []string{"deaf"}, want: Deny, rule: RuleRef{"", "Profile deaf", NoRule}, looks: 1},
		{name: "a profile that does not exist", profiles: []string{"none"}, want: Deny, rule: RuleRef{"", "none", NoRule}},
		{name: "one behind a profile that does not exist", profiles: []string{"none", "open"}, want: Allow, rule: RuleRef{"", "Profile open", 0}, looks: 1},
		{name: "Pass of a profile", profiles: []string{"lost", "open"}, want: Deny, rule: RuleRef{"", "Profile lost", 0}, looks: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := neighbours()
			m.Tiers = c.tiers
			m.Profiles = map[string]*Profile{
				"open": {"Profile open", rules(Allow).Rules, nil},
				"shut": {"Profile shut", rules(Log, Deny).Rules, nil},
				"deaf": {"Profile deaf", rules(no + Allow).Rules, rules(Allow).Rules},
				"lost": {"Profile lost", rules(Pass).Rules, nil},
			}
			m.Endpoints["server"].Profiles = c.profiles
			v := m.Evaluate("server", Ingress, packet(tcp, nil))
			if v.Action != c.want || v.Rule != c.rule || v.Logged != c.logged || len(v.Trace) != c.looks {
				t.Errorf("%+v: want %d by %v, logged %t, %d looks", v, c.want, c.rule, c.logged, c.looks)
			}
		})
	}
}

func TestFlow(t *testing.T) {
	m := neighbours()
	only := func(protocol uint8) *Rules { return &Rules{[]Rule{{Action: Allow, Protocol: &protocol}}} }
	m.Tiers = []Tier{{"default", []*Policy{{"out", sel(t, "role == 'client'"), nil, only(tcp)}, {"in", sel(t, "role == 'server'"), only(udp), nil}}, Deny}}
	type ends struct{ Egress, Ingress Action } // 0: nobody there
	for _, c := range []struct {
		name   string
		packet Packet
		want   ends
		action Action
	}{
		{"egress allows, ingress denies", packet(tcp, nil), ends{Allow, Deny}, Deny},
		{"egress denies, ingress allows", packet(udp, nil), ends{Deny, Allow}, Deny},
		{"from a stranger", packet(udp, from("198.51.100.1")), ends{0, Allow}, Allow},
		{"to a stranger", packet(tcp, func(p *Packet) { p.Destination = netip.MustParseAddr("198.51.100.1") }), ends{Allow, 0}, Allow},
		{"the way back is not selected", packet(gre, func(p *Packet) { p.Source, p.Destination = p.Destination, p.Source }), ends{Allow, Allow}, Allow},
		{"between strangers", packet(gre, func(p *Packet) {
			p.Source, p.Destination = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("192.0.2.1")
		}), ends{}, Allow},
	} {
		f := m.Flow(c.packet)
		var got ends
		if f.Egress != nil {
			got.Egress = f.Egress.Action
		}
		if f.Ingress != nil {
			got.Ingress = f.Ingress.Action
		}
		if got != c.want || f.Action() != c.action {
			t.Errorf("%s: %v, %d; want %v, %d", c.name, got, f.Action(), c.want, c.action)
		}
	}
	if v := m.Evaluate("gone", Ingress, packet(tcp, nil)); !cmp.Equal(v, Verdict{Action: Allow, Rule: RuleRef{Index: NoRule}}) {
		t.Errorf("an endpoint that is not there: %+v", v)
	}
}

func TestNearest(t *testing.T) {
	m := neighbours()
	m.Tiers = []Tier{{"default", []*Policy{{"p", selector.Selector{}, &Rules{[]Rule{
		{Action: Deny, Protocol: to[uint8](gre)},
		{Action: Allow, Protocol: to[uint8](udp), Destination: Peer{Ports: []Ports{{First: 53, Last: 53}}}},
		{Action: Log, Destination: Peer{Ports: []Ports{{First: 9, Last: 9}}}},
		{Action: Allow, Protocol: to[uint8](tcp), Destination: Peer{Ports: []Ports{{First: 80, Last: 80}}}},
		{Action: Allow, Protocol: to[uint8](tcp), Destination: Peer{Ports: []Ports{{First: 81, Last: 81}}}},
		{Action: Allow, Protocol: to[uint8](sctp)},
	}}, nil}}, Deny}}
	if l, ok := m.Evaluate("server", Ingress, packet(tcp, nil)).Nearest(); !ok || l.Ref.Index != 3 || !cmp.Equal(l.Missed, []Term{{"destination", "Ports"}}) {
		t.Errorf("what was denied: %+v, %t", l, ok)
	}
	if l, ok := m.Evaluate("server", Ingress, packet(sctp, nil)).Nearest(); !ok || l.Ref.Index != 0 {
		t.Errorf("what was allowed: %+v, %t", l, ok)
	}
	if l, ok := m.Evaluate("client", Egress, packet(tcp, nil)).Nearest(); ok {
		t.Errorf("what no policy is about: %+v", l)
	}
}
