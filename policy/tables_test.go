package policy_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/policy"
)

func endpoint(id, labels string, addresses ...string) *policy.Endpoint {
	e := &policy.Endpoint{ID: id, Labels: make(map[string]string)}
	for _, a := range addresses {
		e.Addresses = append(e.Addresses, netip.MustParseAddr(a))
	}
	for _, l := range strings.Fields(labels) {
		key, value, _ := strings.Cut(l, "=")
		e.Labels[key] = value
	}
	return e
}

// model has one tier with one policy, of ingress rules, for "role == 'server'".
func model(t testing.TB, rules []policy.Rule, endpoints ...*policy.Endpoint) *policy.Model {
	m := &policy.Model{Endpoints: make(map[string]*policy.Endpoint)}
	for _, e := range endpoints {
		m.Endpoints[e.ID] = e
	}
	m.Tiers = []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{
		{ID: "servers", Selector: sel(t, "role == 'server'"), Ingress: &policy.Rules{Rules: rules}},
	}}}
	return m
}

// rowsOf are rows to read, in order.
func rowsOf(tables *policy.Tables) string {
	var lines []string
	for k, r := range tables.Rows() {
		what := r.Action.String()
		if r.Flags&policy.FlagSource != 0 {
			what = "source"
		}
		if r.Flags&policy.FlagLog != 0 {
			what += "+log"
		}
		identity := fmt.Sprint(k.Identity)
		if k.Identity == policy.SourceIdentity {
			identity = "source"
		}
		lines = append(lines, fmt.Sprintf("%d %s protocol %d port %d/%d: %s %d", k.Policy, identity, k.Protocol, k.Port, k.Bits, what, r.Rule))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestRows shows what rules become.
func TestRows(t *testing.T) {
	client := sel(t, "role == 'client'")
	tcp, icmp := to(uint8(6)), to(uint8(1))
	m := model(t, []policy.Rule{
		{Action: policy.Allow, Protocol: tcp, Source: policy.Peer{Selector: &client}, Destination: policy.Peer{Ports: []policy.Ports{{First: 80, Last: 83}, {First: 443, Last: 443}}}},
		{Action: policy.Allow, Protocol: icmp, ICMP: &policy.ICMP{Type: 8}},
		{Action: policy.Log, Protocol: tcp, Source: policy.Peer{Nets: nets("192.0.2.0/24")}},
		{Action: policy.Allow, Protocol: tcp, Source: policy.Peer{Nets: nets("192.0.2.0/24"), Ports: []policy.Ports{{First: 1024, Last: 65535}}}, Destination: policy.Peer{Ports: []policy.Ports{{First: 22, Last: 22}}}},
	}, endpoint("server", "role=server", "10.65.0.1"), endpoint("client", "role=client", "10.65.0.2", "fd00:65::2"), endpoint("other", "", "10.65.0.3"))
	tables, err := policy.Compile(m, policy.Options{Local: func(id string) bool { return id == "server" }})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(tables.Peers), "map[10.65.0.2/32:2 192.0.2.0/24:1 fd00:65::2/128:2]"; got != want {
		t.Errorf("peers are %s; want %s", got, want)
	}
	if got, want := fmt.Sprintf("%+v", tables.Pods), "map[server:{Ingress:1 Egress:0}]"; got != want {
		t.Errorf("pods are %s; want %s", got, want)
	}
	// Rules are numbered from 1, the end of the policy is 5.
	want := strings.Join([]string{
		"1 0 protocol 0 port 0/64: deny 5",
		"1 0 protocol 1 port 2048/88: allow 2",
		"1 1 protocol 0 port 0/64: deny 5",
		"1 1 protocol 1 port 2048/88: allow 2",
		"1 1 protocol 6 port 0/80: deny+log 5",
		"1 1 protocol 6 port 22/96: source 2",
		"1 2 protocol 0 port 0/64: deny 5",
		"1 2 protocol 1 port 2048/88: allow 2",
		"1 2 protocol 6 port 443/96: allow 1",
		"1 2 protocol 6 port 80/94: allow 1",
		"2 source protocol 0 port 0/64: deny+log 5",
		"2 source protocol 6 port 0/80: allow+log 4",
		"2 source protocol 6 port 0/86: deny+log 5",
	}, "\n")
	if got := rowsOf(tables); got != want {
		t.Errorf("rows are\n%s\nwant\n%s", got, want)
	}
	if info := tables.Rules[4]; info.RuleRef != (policy.RuleRef{Tier: "default", Policy: "servers", Index: 3}) || info.Rule != &m.Tiers[0].Policies[0].Ingress.Rules[3] {
		t.Errorf("rule 4 is %+v", info)
	}
}

// TestPolicyIDs: endpoints to which the same happens share one, and only those of this node have one.
func TestPolicyIDs(t *testing.T) {
	rules := []policy.Rule{{Action: policy.Allow, Protocol: to(uint8(6)), Destination: policy.Peer{Nets: nets("10.65.0.0/30"), Ports: []policy.Ports{{Name: "http"}}}}}
	with := func(e *policy.Endpoint, ports ...policy.NamedPort) *policy.Endpoint {
		e.Ports = ports
		return e
	}
	http, metrics := policy.NamedPort{Name: "http", Protocol: 6, Port: 8080}, policy.NamedPort{Name: "metrics", Protocol: 6, Port: 9090}
	tables, err := policy.Compile(model(t, rules,
		with(endpoint("a", "role=server", "10.65.0.1"), http),
		with(endpoint("b", "role=server app=x", "10.65.0.2"), metrics, http),                                   // what nobody asks for makes no other
		with(endpoint("c", "role=server", "10.65.0.9"), http),                                                  // outside of the net
		with(endpoint("d", "role=server", "10.65.0.0"), policy.NamedPort{Name: "http", Protocol: 6, Port: 80}), // another port
		with(endpoint("e", "role=server", "10.65.0.3", "fd00::3"), http),                                       // inside with one of two families
		with(endpoint("f", "role=client", "10.65.0.4"), http),
		with(endpoint("elsewhere", "role=server", "10.65.0.5"), http),
	), policy.Options{Local: func(id string) bool { return len(id) == 1 }})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(tables.Pods), "map[a:{1 0} b:{1 0} c:{2 0} d:{3 0} e:{4 0} f:{0 0}]"; got != want {
		t.Errorf("pods are %s; want %s", got, want)
	}
	// Only for e does it matter which family a packet is of: everybody's rows are those of IPv6.
	for _, c := range []struct {
		policy uint32
		remote string
		want   policy.Action
	}{{1, "192.0.2.1", policy.Allow}, {4, "192.0.2.1", policy.Allow}, {4, "2001:db8::1", policy.Deny}, {2, "192.0.2.1", policy.Deny}} {
		if got := tables.Lookup(c.policy, netip.MustParseAddr(c.remote), policy.Packet{Protocol: 6, TargetPort: 8080}); got.Action != c.want {
			t.Errorf("policy %d, from %s: %s, want %s", c.policy, c.remote, got.Action, c.want)
		}
	}
}

// TestTwoAddresses: an endpoint with two of a family is refused only by a rule that tells them apart; until that is mended
// the tables stay.
func TestTwoAddresses(t *testing.T) {
	rules := func(net string) []policy.Rule {
		return []policy.Rule{{Action: policy.Allow, Destination: policy.Peer{Nets: nets(net)}}}
	}
	e := endpoint("a", "role=server", "10.65.0.1", "10.65.0.2")
	c := policy.NewCompiler(policy.Options{Local: everybody})
	if err := c.SetModel(model(t, rules("10.65.0.0/24"), e)); err != nil {
		t.Fatal(err)
	}
	update(t, c)
	before := rowsOf(c.Tables())
	bad := model(t, rules("10.65.0.1/32"), e, endpoint("b", "role=server", "10.65.0.7"))
	if err := c.SetModel(bad); err != nil {
		t.Fatal(err)
	}
	_, err := c.Update()
	if err == nil || !strings.Contains(err.Error(), "servers, rule 0") || !strings.Contains(err.Error(), "addresses of a ") {
		t.Fatalf("error %v", err)
	}
	if after := rowsOf(c.Tables()); after != before || len(c.Tables().Pods) != 1 {
		t.Errorf("refused, the tables became\n%s\nfrom\n%s", after, before)
	}
	if err := c.PutEndpoint(endpoint("a", "role=server", "10.65.0.1")); err != nil {
		t.Fatal(err)
	}
	if d := update(t, c); len(d.PutPods) != 2 {
		t.Errorf("mended: %+v", d)
	}
}

// TestIPv4InIPv6: what contains all IPv6 addresses contains no IPv4 address, though the map has these inside.
func TestIPv4InIPv6(t *testing.T) {
	for _, net := range []string{"::/0", "::/80", "::fffe:0:0/95"} {
		tables, err := policy.Compile(model(t, []policy.Rule{{Action: policy.Allow, Source: policy.Peer{Nets: nets(net)}}},
			endpoint("a", "role=server", "10.65.0.1", "fd00::1")), policy.Options{Local: everybody})
		if err != nil {
			t.Fatal(err)
		}
		for remote, want := range map[string]bool{"::fffe:1:1": true, "10.1.2.3": false} {
			id := tables.Identity(netip.MustParseAddr(remote))
			if got := tables.Lookup(tables.Pods["a"].Ingress, netip.MustParseAddr(remote), policy.Packet{Protocol: 6}).Action == policy.Allow; got != want {
				t.Errorf("%s contains %s: %t (identity %d)", net, remote, got, id)
			}
		}
	}
}

// TestNumbers: a compiler after another gives the same ids, or none of its.
func TestNumbers(t *testing.T) {
	m := node(t, 20, 50, 10, 20)
	first := compile(t, m)
	numbers := first.Numbers()
	same, err := policy.Compile(m, policy.Options{Local: here, Numbers: numbers})
	if err != nil {
		t.Fatal(err)
	}
	if d := policy.Diff(first.Tables(), same); !d.Empty() {
		t.Errorf("with the numbers of the first: %+v", d)
	}
	ids := func(tables *policy.Tables) map[uint32]bool {
		all := make(map[uint32]bool)
		for k := range tables.Rows() {
			all[k.Policy] = true
		}
		return all
	}
	for _, n := range []*policy.Numbering{&numbers.Policies, &numbers.Identities, &numbers.Rules} {
		n.IDs = nil
	}
	other, err := policy.Compile(m, policy.Options{Local: here, Numbers: numbers})
	if err != nil {
		t.Fatal(err)
	}
	for id := range ids(other) {
		if ids(first.Tables())[id] {
			t.Errorf("policy id %d was given out before", id)
		}
	}

	// The last ids of all: after them come the first again, but none that is in use.
	numbers.Policies = policy.Numbering{Next: 1<<32 - 5, IDs: map[string]uint32{strings.Repeat("00", 16): 2}}
	last, err := policy.Compile(m, policy.Options{Local: here, Numbers: numbers})
	if err != nil {
		t.Fatal(err)
	}
	got := slices.Sorted(maps.Keys(ids(last)))
	if len(got) != len(ids(other)) || slices.Contains(got, 0) || slices.Contains(got, 2) || slices.Contains(got, policy.SourceIdentity) || slices.Contains(got, 1<<32-2) || !slices.Contains(got, 1<<32-3) {
		t.Errorf("policy ids are %d", got)
	}
}

// TestRefused names what cannot be compiled, and changes nothing.
func TestRefused(t *testing.T) {
	allow := []policy.Rule{{Action: policy.Allow}}
	c := policy.NewCompiler(policy.Options{Local: everybody})
	if err := c.SetModel(model(t, allow, endpoint("a", "role=server", "10.65.0.1"))); err != nil {
		t.Fatal(err)
	}
	update(t, c)
	tier := func(name string, byDefault policy.Action, rules ...policy.Rule) policy.Tier {
		return policy.Tier{Name: name, Default: byDefault, Policies: []*policy.Policy{{ID: "p", Ingress: &policy.Rules{Rules: rules}}}}
	}
	unmasked := []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 8)}
	for want, err := range map[string]error{
		`tier "": `:                             c.SetTiers([]policy.Tier{tier("", policy.Deny)}),
		`tier "x": there is another`:            c.SetTiers([]policy.Tier{tier("x", policy.Deny), tier("x", policy.Deny)}),
		"tier x: the default is":                c.SetTiers([]policy.Tier{tier("x", policy.Log)}),
		"p, ingress: rule 0: action 0":          c.SetTiers([]policy.Tier{tier("x", policy.Deny, policy.Rule{})}),
		"rule 1: 5 is no IP version":            c.SetTiers([]policy.Tier{tier("x", policy.Deny, allow[0], policy.Rule{Action: policy.Allow, IPVersion: 5})}),
		"needs the protocol ICMP":               c.SetTiers([]policy.Tier{tier("x", policy.Deny, policy.Rule{Action: policy.Deny, ICMP: &policy.ICMP{}})}),
		"net 10.0.0.1/8 is not 10.0.0.0/8":      c.SetTiers([]policy.Tier{tier("x", policy.Deny, policy.Rule{Action: policy.Deny, Source: policy.Peer{NotNets: unmasked}})}),
		"ports 2-1 end before they begin":       c.SetTiers([]policy.Tier{tier("x", policy.Deny, policy.Rule{Action: policy.Deny, Source: policy.Peer{Ports: []policy.Ports{{First: 2, Last: 1}}}})}),
		"endpoint b: ::ffff:10.0.0.1 is no":     c.PutEndpoint(endpoint("b", "", "::ffff:10.0.0.1")),
		"network set s: net 10.0.0.1/8 is not ": c.PutSet(&policy.Set{ID: "s", Nets: unmasked}),
		"P, egress: rule 0: action 9":           c.PutProfile("p", &policy.Profile{ID: "P", Egress: []policy.Rule{{Action: 9}}}),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v; want %q", err, want)
		}
	}
	if d := update(t, c); !d.Empty() {
		t.Errorf("what was refused changed %+v", d)
	}
}
