package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
)

func resources(t testing.TB, text string) []api.Resource {
	t.Helper()
	all, err := manifest.Parse([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return all
}

// resource writes one with a spec in YAML's flow style.
func resource(apiVersion, kind, name, spec string) string {
	return fmt.Sprintf("---\napiVersion: %s\nkind: %s\nmetadata: %s\nspec: %s\n", apiVersion, kind, name, spec)
}

func netpol(spec string) string {
	return resource("networking.k8s.io/v1", "NetworkPolicy", "{name: p, namespace: web}", spec)
}

func calico(spec string) string {
	return resource("projectcalico.org/v3", "NetworkPolicy", "{name: p, namespace: web}", spec)
}

func global(spec string) string {
	return resource("projectcalico.org/v3", "GlobalNetworkPolicy", "{name: p}", spec)
}

func anp(spec string) string {
	return resource("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "{name: p}", spec)
}

// Texts of a model, one line for each part: what tests compare.

func (p Peer) text() string {
	var words []string
	add := func(name string, value any) { words = append(words, fmt.Sprintf("%s=%v", name, value)) }
	if p.Selector != nil {
		add("pods", "["+p.Selector.String()+"]")
	}
	if p.NotSelector != nil {
		add("notpods", "["+p.NotSelector.String()+"]")
	}
	if p.Nets != nil {
		add("nets", p.Nets)
	}
	if p.NotNets != nil {
		add("notnets", p.NotNets)
	}
	if p.Ports != nil {
		add("ports", p.Ports)
	}
	if p.NotPorts != nil {
		add("notports", p.NotPorts)
	}
	return strings.Join(words, " ")
}

func (r Rule) text() string {
	words := []string{r.Place + ":", map[Action]string{Allow: "allow", Deny: "deny", Pass: "pass", Log: "log"}[r.Action]}
	if r.IPVersion != 0 {
		words = append(words, fmt.Sprintf("v%d", r.IPVersion))
	}
	if r.Protocol != nil {
		words = append(words, fmt.Sprint(*r.Protocol))
	}
	if r.NotProtocol != nil {
		words = append(words, fmt.Sprintf("not %d", *r.NotProtocol))
	}
	for name, m := range map[string]*ICMP{"icmp": r.ICMP, "noticmp": r.NotICMP} {
		if m != nil && m.Code != nil {
			words = append(words, fmt.Sprintf("%s %d/%d", name, m.Type, *m.Code))
		} else if m != nil {
			words = append(words, fmt.Sprintf("%s %d", name, m.Type))
		}
	}
	if s := r.Source.text(); s != "" {
		words = append(words, "from", s)
	}
	if s := r.Destination.text(); s != "" {
		words = append(words, "to", s)
	}
	return strings.Join(words, " ")
}

func (p Policy) text() string {
	lines := []string{p.ID + " for " + p.Selector.String()}
	for _, d := range []struct {
		name  string
		rules *Rules
	}{{"ingress", p.Ingress}, {"egress", p.Egress}} {
		if d.rules == nil {
			continue
		}
		lines = append(lines, d.name)
		for _, r := range d.rules.Rules {
			lines = append(lines, r.text())
		}
	}
	return strings.Join(lines, "\n")
}

func TestFromPolicy(t *testing.T) {
	const web, pods = `projectcalico.org/namespace == "web"`, "has(projectcalico.org/orchestrator)"
	const forWeb, calicoWeb = "NetworkPolicy web/p for " + web, "NetworkPolicy.projectcalico.org web/p for " + web
	const forAll = "GlobalNetworkPolicy p for all()"
	for _, test := range []struct{ name, text, tier, want string }{
		{"nothing said isolates ingress", netpol("{}"), "default 1000", forWeb + "\ningress"},
		{"both directions, nobody", netpol("{policyTypes: [Ingress, Egress]}"), "default 1000", forWeb + "\ningress\negress"},
		{"egress only", netpol("{policyTypes: [Egress], ingress: [{}]}"), "default 1000", forWeb + "\negress"},
		{"egress rules isolate both", netpol("{egress: [{}]}"), "default 1000", forWeb + "\ningress\negress\negress[0]: allow"},
		{"no from is everyone, on all ports", netpol("{ingress: [{}]}"), "default 1000", forWeb + "\ningress\ningress[0]: allow"},
		{"an empty from is everyone", netpol("{ingress: [{from: [], ports: []}]}"), "default 1000", forWeb + "\ningress\ningress[0]: allow"},
		{"pods by all operators", netpol("{podSelector: {matchLabels: {b: x, a: ''}, matchExpressions: [{key: c, operator: In, values: [z, w]}, {key: d, operator: NotIn, values: [w]}, {key: e, operator: Exists}, {key: f, operator: DoesNotExist}]}}"), "default 1000",
			forWeb + ` && a == "" && b == "x" && c in {"w", "z"} && d != "w" && has(e) && !has(f)` + "\ningress"},
		{"peers", netpol("{ingress: [{from: [{podSelector: {}}, {podSelector: {matchLabels: {a: b}}}, {namespaceSelector: {}}, {namespaceSelector: {matchLabels: {c: d}}, podSelector: {matchLabels: {a: b}}}]}]}"), "default 1000",
			forWeb + "\ningress\ningress[0].from[0]: allow from pods=[" + pods + " && " + web + "]\n" +
				"ingress[0].from[1]: allow from pods=[" + pods + " && " + web + ` && a == "b"]` + "\n" +
				"ingress[0].from[2]: allow from pods=[" + pods + "]\n" +
				"ingress[0].from[3]: allow from pods=[" + pods + ` && pcns.c == "d" && a == "b"]`},
		{"blocks are one peer, those with exceptions their own", netpol("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}, {ipBlock: {cidr: 11.0.0.0/8, except: [11.1.0.0/16, 11.2.0.0/16]}}, {ipBlock: {cidr: '2001:db8::/32'}}]}], policyTypes: [Egress]}"), "default 1000",
			forWeb + "\negress\negress[0].to: allow to nets=[10.0.0.0/8 2001:db8::/32]\negress[0].to[1]: allow to nets=[11.0.0.0/8] notnets=[11.1.0.0/16 11.2.0.0/16]"},
		{"ports by protocol", netpol("{ingress: [{ports: [{port: 80}, {port: 53, protocol: UDP}, {port: http}, {port: 1000, endPort: 2000}, {protocol: SCTP, port: 1}, {protocol: SCTP}, {protocol: SCTP, port: 2}]}]}"), "default 1000",
			forWeb + "\ningress\ningress[0]: allow 6 to ports=[80 http 1000-2000]\ningress[0]: allow 17 to ports=[53]\ningress[0]: allow 132"},
		{"peers times protocols", netpol("{egress: [{to: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 53, protocol: UDP}, {port: 53}]}], policyTypes: [Egress]}"), "default 1000",
			forWeb + "\negress\negress[0].to[0]: allow 17 to pods=[" + pods + " && " + web + "] ports=[53]\negress[0].to[0]: allow 6 to pods=[" + pods + " && " + web + "] ports=[53]\n" +
				"egress[0].to[1]: allow 17 to nets=[10.0.0.0/8] ports=[53]\negress[0].to[1]: allow 6 to nets=[10.0.0.0/8] ports=[53]"},

		{"calico: nothing said", calico("{}"), "default +Inf", calicoWeb + "\ningress"},
		{"calico: order and tier", calico("{order: -1.5, tier: t, selector: has(a) || has(b)}"), "t -1.5", calicoWeb + " && (has(a) || has(b))\ningress"},
		{"calico: types by rules", calico("{egress: [{action: Pass}]}"), "default +Inf", calicoWeb + "\negress\negress[0]: pass"},
		{"calico: service accounts", calico("{serviceAccountSelector: role == 'x'}"), "default +Inf", calicoWeb + ` && pcsa.role == "x"` + "\ningress"},
		{"calico: any service account", global("{serviceAccountSelector: all()}"), "default +Inf", "GlobalNetworkPolicy p for has(projectcalico.org/serviceaccount)\ningress"},
		{"calico: all namespaces, one, none", global("{namespaceSelector: all()}") + global("{namespaceSelector: a == 'b', selector: has(c)}") + global("{namespaceSelector: global()}"), "default +Inf",
			"GlobalNetworkPolicy p for has(projectcalico.org/namespace)\ningress\n" + `GlobalNetworkPolicy p for has(c) && pcns.a == "b"` + "\ningress\nGlobalNetworkPolicy p for !has(projectcalico.org/namespace)\ningress"},
		{"calico: a plain selector is one of the namespace", calico("{ingress: [{action: Allow, source: {selector: has(a)}}]}"), "default +Inf",
			calicoWeb + "\ningress\ningress[0]: allow from pods=[" + web + " && has(a)]"},
		{"calico: notSelector too", calico("{ingress: [{action: Allow, source: {notSelector: has(a)}}]}"), "default +Inf",
			calicoWeb + "\ningress\ningress[0]: allow from pods=[" + web + "] notpods=[has(a)]"},
		{"calico: notSelector of all namespaces", global("{ingress: [{action: Allow, source: {notSelector: has(a)}}]}"), "default +Inf", forAll + "\ningress\ningress[0]: allow from notpods=[has(a)]"},
		{"calico: networks and ports are of no namespace", calico("{ingress: [{action: Allow, protocol: TCP, source: {nets: [10.0.0.0/8], notNets: [10.1.0.0/16]}, destination: {ports: [80, '1:9', http], notPorts: [5]}}]}"), "default +Inf",
			calicoWeb + "\ningress\ningress[0]: allow 6 from nets=[10.0.0.0/8] notnets=[10.1.0.0/16] to ports=[80 1-9 http] notports=[5]"},
		{"calico: namespaceSelector", calico("{egress: [{action: Deny, destination: {namespaceSelector: a == 'b', selector: has(c)}}, {action: Deny, destination: {namespaceSelector: global(), selector: has(c)}}, {action: Deny, destination: {namespaceSelector: all()}}]}"), "default +Inf",
			calicoWeb + "\negress\negress[0]: deny to pods=[pcns.a == \"b\" && has(c)]\negress[1]: deny to pods=[!has(projectcalico.org/namespace) && has(c)]\negress[2]: deny to pods=[has(projectcalico.org/namespace)]"},
		{"calico: service accounts of a rule", calico("{ingress: [{action: Allow, source: {serviceAccounts: {names: [b, a], selector: has(x)}}}]}"), "default +Inf",
			calicoWeb + "\ningress\ningress[0]: allow from pods=[" + web + ` && has(pcsa.x) && projectcalico.org/serviceaccount in {"a", "b"}]`},
		{"calico: protocols and messages", global("{ingress: [{action: Log, protocol: 47}, {action: Allow, notProtocol: SCTP, ipVersion: 6}, {action: Allow, protocol: ICMP, icmp: {type: 3, code: 4}}, {action: Allow, protocol: ICMPv6, notICMP: {type: 128}}]}"), "default +Inf",
			forAll + "\ningress\ningress[0]: log 47\ningress[1]: allow v6 not 132\ningress[2]: allow 1 icmp 3/4\ningress[3]: allow 58 noticmp 128"},

		{"admin", anp("{priority: 7, subject: {namespaces: {}}, ingress: [{action: Pass, from: [{namespaces: {matchLabels: {a: b}}}, {pods: {namespaceSelector: {}, podSelector: {matchLabels: {c: d}}}}]}]}"), "adminnetworkpolicy 7",
			"AdminNetworkPolicy p for " + pods + "\ningress\ningress[0].from[0]: pass from pods=[" + pods + ` && pcns.a == "b"]` + "\ningress[0].from[1]: pass from pods=[" + pods + ` && c == "d"]`},
		{"admin: ports, of any protocol when named", anp("{priority: 0, subject: {pods: {podSelector: {matchLabels: {a: b}}}}, egress: [{action: Deny, to: [{namespaces: {}}], ports: [{portNumber: {port: 80}}, {namedPort: dns}, {portRange: {start: 1, end: 9}}]}]}"), "adminnetworkpolicy 0",
			"AdminNetworkPolicy p for " + pods + ` && a == "b"` + "\negress\negress[0].to[0]: deny 6 to pods=[" + pods + "] ports=[80 1-9]\negress[0].to[0]: deny to pods=[" + pods + "] ports=[dns]"},
		{"baseline", resource("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy", "{name: default}", "{subject: {namespaces: {}}, egress: [{action: Allow, to: [{networks: [10.0.0.0/8, 11.0.0.0/8]}]}]}"), "baselineadminnetworkpolicy 1001",
			"BaselineAdminNetworkPolicy default for " + pods + "\negress\negress[0].to[0]: allow to nets=[10.0.0.0/8 11.0.0.0/8]"},
		{"cluster", resource("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "{name: p}", "{tier: Baseline, priority: 3, subject: {namespaces: {}}, ingress: [{action: Accept, from: [{namespaces: {}}], protocols: [{udp: {destinationPort: {range: {start: 1, end: 9}}}}]}]}"), "baselineadminnetworkpolicy 3",
			"ClusterNetworkPolicy p for " + pods + "\ningress\ningress[0].from[0]: allow 17 from pods=[" + pods + "] to ports=[1-9]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var texts []string
			var p Placed
			for _, r := range resources(t, test.text) {
				var err error
				if p, err = FromPolicy(r); err != nil {
					t.Fatal(err)
				}
				texts = append(texts, p.text())
			}
			if got := strings.Join(texts, "\n"); got != test.want {
				t.Errorf("is\n%s\nwant\n%s", got, test.want)
			}
			if got := fmt.Sprintf("%s %v", p.Tier, p.Order); got != test.tier {
				t.Errorf("tier %s, want %s", got, test.tier)
			}
		})
	}
}

const endpoints = `
apiVersion: v1
kind: Namespace
metadata: {name: web, labels: {room: a}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: robot, namespace: web, labels: {role: x}}
---
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: kns.web}
spec: {labelsToApply: {pcns.color: red, app: other, tier: low}, ingress: [{action: Allow}]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: h1-k8s-a-eth0, namespace: web, labels: {app: db, pcns.room: lie, projectcalico.org/serviceaccount: lie}}
spec: {node: h1, orchestrator: k8s, pod: a, endpoint: eth0, serviceAccountName: robot, ipNetworks: [192.0.2.1, '2001:db8::1'], profiles: [kns.web], ports: [{name: sql, protocol: TCP, port: 5432}]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: h1-cni-b-eth0, labels: {projectcalico.org/namespace: web}}
spec: {node: h1, ipNetworks: [192.0.2.2]}
---
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: s, namespace: web, labels: {kind: bank}}
spec: {nets: [198.51.100.0/24]}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkSet
metadata: {name: s, labels: {kind: bank, projectcalico.org/namespace: web, projectcalico.org/orchestrator: k8s}}
spec: {nets: [203.0.113.0/24, '2001:db8:1::/48']}
`

func TestLabels(t *testing.T) {
	m, err := FromResources(resources(t, endpoints))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		got  map[string]string
		want string
	}{
		"a":                {m.Endpoints["web/h1-k8s-a-eth0"].Labels, "map[app:db pcns.color:red pcns.kubernetes.io/metadata.name:web pcns.projectcalico.org/name:web pcns.room:a pcsa.projectcalico.org/name:robot pcsa.role:x projectcalico.org/namespace:web projectcalico.org/orchestrator:k8s projectcalico.org/serviceaccount:robot tier:low]"},
		"b":                {m.Endpoints["default/h1-cni-b-eth0"].Labels, "map[pcns.kubernetes.io/metadata.name:default pcns.projectcalico.org/name:default projectcalico.org/namespace:default projectcalico.org/orchestrator:cni]"},
		"NetworkSet":       {m.Sets["NetworkSet web/s"].Labels, "map[kind:bank pcns.kubernetes.io/metadata.name:web pcns.projectcalico.org/name:web pcns.room:a projectcalico.org/namespace:web]"},
		"GlobalNetworkSet": {m.Sets["GlobalNetworkSet s"].Labels, "map[kind:bank]"},
	} {
		if got := fmt.Sprint(test.got); got != test.want {
			t.Errorf("%s: %s\nwant %s", name, got, test.want)
		}
	}
	a := m.Endpoints["web/h1-k8s-a-eth0"]
	if !slices.Equal(a.Addresses, []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}) || !slices.Equal(a.Ports, []NamedPort{{"sql", 6, 5432}}) || !slices.Equal(a.Profiles, []string{"kns.web"}) {
		t.Errorf("%+v", a)
	}
	if nets := fmt.Sprint(m.Sets["GlobalNetworkSet s"].Nets); nets != "[203.0.113.0/24 2001:db8:1::/48]" {
		t.Error(nets)
	}
	if p := m.Profiles["kns.web"]; p == nil || p.ID != "Profile kns.web" || len(p.Ingress) != 1 || p.Ingress[0].text() != "ingress[0]: allow" {
		t.Errorf("%+v", p)
	}
}

func TestTiers(t *testing.T) {
	const v3 = "projectcalico.org/v3"
	gnp := func(name, spec string) string { return resource(v3, "GlobalNetworkPolicy", "{name: "+name+"}", spec) }
	all := resources(t, resource(v3, "Tier", "{name: last}", "{}")+resource(v3, "Tier", "{name: also-last}", "{defaultAction: Pass}")+
		resource(v3, "Tier", "{name: same}", "{order: 1000}")+resource(v3, "Tier", "{name: first}", "{order: -5}")+
		gnp("z", "{order: 5}")+gnp("b", "{}")+gnp("a", "{}")+gnp("p", "{order: 1000}")+gnp("x", "{tier: first}")+
		netpol("{}")+calico("{order: 1000}")+anp("{priority: 9, subject: {namespaces: {}}}")+
		resource("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "{name: o}", "{priority: 9, subject: {namespaces: {}}}")+
		resource("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "{name: c}", "{tier: Admin, priority: 8, subject: {namespaces: {}}}")+
		resource("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "{name: d}", "{tier: Baseline, priority: 1000, subject: {namespaces: {}}}")+
		resource("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy", "{name: default}", "{subject: {namespaces: {}}}"))
	for range 3 {
		slices.Reverse(all)
		m, err := FromResources(all)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, tier := range m.Tiers {
			line := fmt.Sprintf("%s %d:", tier.Name, tier.Default)
			for _, p := range tier.Policies {
				line += " " + p.ID
			}
			lines = append(lines, line)
		}
		want := strings.Join([]string{
			"first 2: GlobalNetworkPolicy x",
			"adminnetworkpolicy 3: ClusterNetworkPolicy c AdminNetworkPolicy o AdminNetworkPolicy p",
			"same 2:",
			"default 2: GlobalNetworkPolicy z GlobalNetworkPolicy p NetworkPolicy web/p NetworkPolicy.projectcalico.org web/p GlobalNetworkPolicy a GlobalNetworkPolicy b",
			"baselineadminnetworkpolicy 3: ClusterNetworkPolicy d BaselineAdminNetworkPolicy default",
			"also-last 3:",
			"last 2:",
		}, "\n")
		if got := strings.Join(lines, "\n"); got != want {
			t.Errorf("is\n%s\nwant\n%s", got, want)
		}
	}
}

func TestFromResourcesErrors(t *testing.T) {
	const other = `---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: h2-k8s-c-eth0, namespace: web}
spec: {node: h2, ipNetworks: [192.0.2.1]}
`
	unreadable := resources(t, calico("{ingress: [{action: Allow, source: {selector: has(a)}}]}"))[0]
	unreadable.Spec.(*api.CalicoNetworkPolicy).Ingress[0].Source.Selector = "has("
	unknown := resources(t, global("{egress: [{action: Allow}]}"))[0]
	unknown.Spec.(*api.GlobalNetworkPolicy).Egress[0].Action = "Drop"
	all := append(resources(t, endpoints+other+global("{tier: none}")+netpol("{}")+netpol("{}")+resource("projectcalico.org/v3", "IPPool", "{name: p}", "{cidr: 10.0.0.0/16}")), unreadable)
	m, err := FromResources(all)
	for _, want := range []string{
		"WorkloadEndpoint web/h2-k8s-c-eth0: spec.ipNetworks: invalid resource: 192.0.2.1 is WorkloadEndpoint web/h1-k8s-a-eth0's already; delete the one whose pod is gone",
		"GlobalNetworkPolicy p: spec.tier: invalid resource: there is no Tier none; apply one, or leave the tier out",
		"NetworkPolicy web/p: invalid resource: it is there twice; leave one out",
		`NetworkPolicy.projectcalico.org web/p: spec.ingress[0].source.selector: invalid resource: "has("`,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant %s", err, want)
		}
	}
	if !errors.Is(err, api.ErrInvalid) || len(m.Endpoints) != 2 || len(m.Sets) != 2 || len(m.Tiers) != 1 || len(m.Tiers[0].Policies) != 1 {
		t.Errorf("the others did not convert: %+v", m)
	}
	if _, err := FromResources([]api.Resource{unknown}); err == nil || !strings.Contains(err.Error(), `GlobalNetworkPolicy p: spec.egress[0].action: invalid resource: "Drop"`) {
		t.Error(err)
	}
	for _, r := range resources(t, endpoints) {
		_, err := FromEndpoint(r, NewContext())
		_, err1 := FromSet(r, NewContext())
		_, err2 := FromProfile(r)
		if got, want := errors.Is(err, api.ErrInvalid), r.Kind.Name != "WorkloadEndpoint"; got != want {
			t.Errorf("FromEndpoint(%s): %v", r, err)
		}
		if got, want := errors.Is(err1, api.ErrInvalid), !strings.HasSuffix(r.Kind.Name, "NetworkSet"); got != want {
			t.Errorf("FromSet(%s): %v", r, err1)
		}
		if got, want := errors.Is(err2, api.ErrInvalid), r.Kind.Name != "Profile"; got != want {
			t.Errorf("FromProfile(%s): %v", r, err2)
		}
	}
}

// What parses converts, but for what one resource can't know of others.
func FuzzFromResources(f *testing.F) {
	for _, s := range []string{endpoints, netpol("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {podSelector: {}}], ports: [{port: 1, endPort: 2}, {port: http}, {protocol: UDP}]}]}"),
		calico("{serviceAccountSelector: has(a), ingress: [{action: Pass, protocol: ICMP, icmp: {type: 3, code: 4}, source: {notSelector: a in {'b'}, serviceAccounts: {names: [x]}}, destination: {namespaceSelector: '!global()'}}]}"),
		anp("{priority: 7, subject: {namespaces: {}}, egress: [{action: Pass, to: [{networks: [10.0.0.0/8]}], ports: [{portRange: {start: 1, end: 9}}]}]}")} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := manifest.Parse(data)
		if err != nil {
			return
		}
		m, err := FromResources(all)
		if m == nil || err != nil && !errors.Is(err, api.ErrInvalid) {
			t.Fatal(err)
		}
		context := NewContext()
		for _, r := range all {
			context.Add(r)
			p, err := FromPolicy(r)
			if err != nil {
				t.Fatal(err)
			}
			if p.Policy == nil {
				continue
			}
			for _, rules := range []*Rules{p.Ingress, p.Egress} {
				if rules == nil {
					continue
				}
				for _, rule := range rules.Rules {
					checkRule(t, rule)
				}
			}
		}
	})
}

// checkRule holds a rule against what the model says of its parts.
func checkRule(t *testing.T, r Rule) {
	if r.Action < Allow || r.Action > Log || r.Place == "" || (r.ICMP != nil || r.NotICMP != nil) && (r.Protocol == nil || *r.Protocol != 1 && *r.Protocol != 58) {
		t.Fatalf("%+v", r)
	}
	for _, p := range []Peer{r.Source, r.Destination} {
		for _, n := range append(slices.Clone(p.Nets), p.NotNets...) {
			if !n.IsValid() || n != n.Masked() || n.Addr().Is4In6() {
				t.Fatalf("network %s", n)
			}
		}
		for _, ports := range append(slices.Clone(p.Ports), p.NotPorts...) {
			if ports.First > ports.Last || (ports.Name == "") == (ports.First == 0) {
				t.Fatalf("ports %+v", ports)
			}
		}
	}
}
