package manifest

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
)

// head of a resource, whose spec follows on line 5.
func headOf(apiVersion, kind, name string) string {
	return "apiVersion: " + apiVersion + "\nkind: " + kind + "\nmetadata: {name: " + name + "}\nspec:\n"
}

var (
	netpol = headOf("networking.k8s.io/v1", "NetworkPolicy", "p")
	calico = headOf("projectcalico.org/v3", "NetworkPolicy", "p")
	global = headOf("projectcalico.org/v3", "GlobalNetworkPolicy", "p")
	netset = headOf("projectcalico.org/v3", "NetworkSet", "s")
	tier   = headOf("projectcalico.org/v3", "Tier", "t")
	prof   = headOf("projectcalico.org/v3", "Profile", "p")
	wep    = headOf("projectcalico.org/v3", "WorkloadEndpoint", "h1-k8s-a-eth0")
	anp    = headOf("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "p")
	banp   = headOf("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy", "default")
	cnp    = headOf("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "p")
)

const (
	admin   = "  priority: 10\n  subject: {namespaces: {}}\n"
	cluster = "  tier: Admin\n" + admin
)

// policies are valid, and what they are when all that is left open is filled in.
var policies = []struct{ text, want string }{
	{netpol, `{"podSelector":{},"policyTypes":["Ingress"]}`},
	{netpol + "  podSelector:\n", `{"podSelector":{},"policyTypes":["Ingress"]}`},
	{netpol + "  egress: [{}]\n", `{"podSelector":{},"egress":[{}],"policyTypes":["Ingress","Egress"]}`},
	{netpol + "  policyTypes: [Egress]\n", `{"podSelector":{},"policyTypes":["Egress"]}`},
	{netpol + "  ingress: [{from: [], ports: [{}]}]\n", `{"podSelector":{},"ingress":[{"ports":[{"protocol":"TCP"}]}],"policyTypes":["Ingress"]}`},
	{netpol + "  ingress: [{from: [{podSelector: {}}], ports: [{port: 80}, {port: http, protocol: SCTP}, {port: 80, endPort: 80}, {port: '80', protocol: UDP}]}]\n",
		`{"podSelector":{},"ingress":[{"ports":[{"protocol":"TCP","port":80},{"protocol":"SCTP","port":"http"},{"protocol":"TCP","port":80,"endPort":80},{"protocol":"UDP","port":80}],"from":[{"podSelector":{}}]}],"policyTypes":["Ingress"]}`},
	{netpol + "  ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: a/b, operator: NotIn, values: [x]}]}, podSelector: {matchLabels: {a: ''}}}, {ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}]}]\n",
		`{"podSelector":{},"ingress":[{"from":[{"podSelector":{"matchLabels":{"a":""}},"namespaceSelector":{"matchExpressions":[{"key":"a/b","operator":"NotIn","values":["x"]}]}},{"ipBlock":{"cidr":"0.0.0.0/0","except":["10.0.0.0/8"]}}]}],"policyTypes":["Ingress"]}`},
	{calico, `{"tier":"default","types":["Ingress"]}`},
	{calico + "  egress: [{action: Pass}]\n", `{"tier":"default","types":["Egress"],"egress":[{"action":"Pass"}]}`},
	{calico + "  ingress: [{action: Log}]\n  egress: [{action: Deny, source: {nets: []}}]\n", `{"tier":"default","types":["Ingress","Egress"],"ingress":[{"action":"Log"}],"egress":[{"action":"Deny"}]}`},
	{calico + "  order: 1.5\n  selector: all()\n  performanceHints: [AssumeNeededOnEveryNode]\n  ingress: [{action: Allow, ipVersion: 4, protocol: tcp, metadata: {annotations: {a: b}}, source: {nets: [10.0.0.1], serviceAccounts: {names: [a]}}, destination: {ports: [80, '443', '1000:2000', http, '7:7'], notPorts: [1]}}]\n",
		`{"tier":"default","order":1.5,"selector":"all()","types":["Ingress"],"ingress":[{"metadata":{"annotations":{"a":"b"}},"action":"Allow","ipVersion":4,"protocol":"TCP","source":{"nets":["10.0.0.1/32"],"serviceAccounts":{"names":["a"]}},"destination":{"ports":[80,443,"1000:2000","http",7],"notPorts":[1]}}],"performanceHints":["AssumeNeededOnEveryNode"]}`},
	{calico + "  ingress: [{action: Allow, protocol: 1, icmp: {type: 8, code: 0}, notICMP: {type: 0}}, {action: Allow, notProtocol: '47'}]\n",
		`{"tier":"default","types":["Ingress"],"ingress":[{"action":"Allow","protocol":"ICMP","icmp":{"type":8,"code":0},"notICMP":{"type":0}},{"action":"Allow","notProtocol":47}]}`},
	{global + "  tier: t\n  namespaceSelector: has(a)\n  doNotTrack: false\n  ingress: [{action: Allow, http: null}]\n", `{"tier":"t","types":["Ingress"],"ingress":[{"action":"Allow"}],"namespaceSelector":"has(a)"}`},
	{netset + "  nets: [10.0.0.0/8, '2001:db8::1']\n", `{"nets":["10.0.0.0/8","2001:db8::1/128"]}`},
	{tier, `{"defaultAction":"Deny"}`},
	{tier + "  {order: 7, defaultAction: Pass}\n", `{"order":7,"defaultAction":"Pass"}`},
	{headOf("projectcalico.org/v3", "Tier", "default"), `{"order":1000000,"defaultAction":"Deny"}`},
	{prof + "  egress: [{action: Allow}]\n  labelsToApply: {pcns.a: b}\n", `{"egress":[{"action":"Allow"}],"labelsToApply":{"pcns.a":"b"}}`},
	{wep + "  node: h1\n  ipNetworks: [10.0.0.1/32, '2001:db8::1']\n  ports: [{name: http, protocol: TCP, port: 80, hostPort: 8080}]\n",
		`{"node":"h1","orchestrator":"cni","ipNetworks":["10.0.0.1/32","2001:db8::1/128"],"ports":[{"name":"http","protocol":"TCP","port":80,"hostPort":8080}]}`},
	{headOf("v1", "Namespace", "web") + "  finalizers: [kubernetes]\nstatus: {phase: Active}\n", `{"finalizers":["kubernetes"]}`},
	{"apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a, generation: 3, managedFields: [{a: b}]}\nsecrets: [{name: x}]\n", `{}`},
	{anp + admin + "  ingress: [{name: x, action: Pass, from: [{pods: {namespaceSelector: {}, podSelector: {}}}], ports: [{portNumber: {port: 80}}, {namedPort: dns}, {portRange: {protocol: UDP, start: 1, end: 9}}]}]\n",
		`{"priority":10,"subject":{"namespaces":{}},"ingress":[{"name":"x","action":"Pass","from":[{"pods":{"namespaceSelector":{},"podSelector":{}}}],"ports":[{"portNumber":{"protocol":"TCP","port":80}},{"namedPort":"dns"},{"portRange":{"protocol":"UDP","start":1,"end":9}}]}]}`},
	{banp + "  subject: {pods: {podSelector: {matchLabels: {a: b}}}}\n  egress: [{action: Deny, to: [{networks: [10.0.0.0/8, '2001:db8::/32']}]}]\n",
		`{"subject":{"pods":{"namespaceSelector":{},"podSelector":{"matchLabels":{"a":"b"}}}},"egress":[{"action":"Deny","to":[{"networks":["10.0.0.0/8","2001:db8::/32"]}]}]}`},
	{cnp + cluster + "  egress: [{action: Accept, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 1, end: 9}}}}, {destinationNamedPort: dns}]}]\n",
		`{"tier":"Admin","priority":10,"subject":{"namespaces":{}},"egress":[{"action":"Accept","to":[{"namespaces":{}}],"protocols":[{"tcp":{"destinationPort":{"number":80}}},{"udp":{"destinationPort":{"range":{"start":1,"end":9}}}},{"destinationNamedPort":"dns"}]}]}`},
}

func TestParsePolicy(t *testing.T) {
	for _, test := range policies {
		all, err := Parse([]byte(test.text))
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
			continue
		}
		if got, err := json.Marshal(all[0].Spec); err != nil || string(got) != test.want {
			t.Errorf("%s\nis   %s, %v\nwant %s", test.text, got, err, test.want)
		}
	}
}

func TestNames(t *testing.T) {
	const in = "metadata: {name: a, namespace: web}"
	for text, want := range map[string][2]string{
		"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n" + in:                       {"/networkpolicies.networking.k8s.io/web/a", "NetworkPolicy web/a"},
		"apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\n" + in:                       {"/networkpolicies/web/a", "NetworkPolicy.projectcalico.org web/a"},
		"apiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata: {name: a}":            {"/networksets/default/a", "NetworkSet default/a"},
		"apiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\n" + "metadata: {name: a}": {"/globalnetworksets/a", "GlobalNetworkSet a"},
		"apiVersion: v1\nkind: ServiceAccount\n" + in:                                        {"/serviceaccounts/web/a", "ServiceAccount web/a"},
		"apiVersion: v1\nkind: Namespace\nmetadata: {name: a}":                               {"/namespaces/a", "Namespace a"},
		anp + admin: {"/adminnetworkpolicies.policy.networking.k8s.io/p", "AdminNetworkPolicy p"},
		"apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: a}":      {"/nodes/a", "Node a"},
		"apiVersion: projectcalico.org/v3\nkind: BGPFilter\nmetadata: {name: a}": {"/bgpfilters/a", "BGPFilter a"},
	} {
		all, err := Parse([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if all[0].Key() != want[0] || all[0].String() != want[1] {
			t.Errorf("%s: %s, %s", text, all[0].Key(), all[0])
		}
	}
	for word, want := range map[string]int{"networkpolicies": 2, "NetworkPolicy": 2, "netpol": 1, "np": 1, "networkpolicies.projectcalico.org": 1, "NetworkPolicy.networking.k8s.io": 1, "wep": 1, "ippools": 1} {
		if found, err := api.FindKinds(word); err != nil || len(found) != want {
			t.Errorf("%s: %v, %v", word, found, err)
		}
	}
}

func TestPolicyErrors(t *testing.T) {
	from := func(peer string) string {
		return netpol + "  ingress:\n  - from: [{podSelector: {}}]\n  - from:\n    - podSelector: {}\n    - " + peer + "\n"
	}
	port := func(port string) string { return netpol + "  egress:\n  - ports:\n    - port: 1\n    - " + port + "\n" }
	rule := func(rule string) string { return calico + "  ingress:\n  - action: Allow\n  - " + rule + "\n" }
	ends := func(end string) string { return rule("action: Allow\n    protocol: TCP\n    source:\n      " + end) }
	adm := func(rule string) string { return anp + admin + "  egress:\n  - " + rule + "\n" }
	cls := func(protocol string) string {
		return cnp + cluster + "  egress:\n  - action: Deny\n    to: [{namespaces: {}}]\n    protocols:\n    - " + protocol + "\n"
	}
	long := strings.Repeat("a", 1<<20)
	for _, test := range []struct{ text, want string }{
		{"apiVersion: v1\nkind: Pod\n", `line 2: kind: kind "Pod": not supported: it is read from Kubernetes alone`},
		{"apiVersion: projectcalico.org/v3\nkind: HostEndpoint\n", `line 2: kind: kind "HostEndpoint": not supported`},
		{"kind: NetworkPolicy\napiVersion: v1\n", `line 2: apiVersion: "v1": not supported for NetworkPolicy; write networking.k8s.io/v1 or projectcalico.org/v3`},
		{"apiVersion: policy.networking.k8s.io/v1alpha1\nkind: ClusterNetworkPolicy\n", `write policy.networking.k8s.io/v1alpha2`},
		{"apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata:\n  name: a\n  namespace: b\n", "line 5: Tier b/a: metadata.namespace: invalid resource: a Tier is in no namespace"},
		{"apiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata:\n  name: a\n  namespace: b.c\n", `line 5: NetworkSet b.c/a: metadata.namespace: invalid resource: "b.c"`},
		{"apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}\n", `"a.b" is no namespace's name`},
		{"apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: a}\nsecrets: []\n", "are a ServiceAccount's"},
		{"kind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: a}\n- apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: b\n    nam: c\n", `document 1, line 10: metadata.nam: invalid resource: unknown field "nam"`},
		{netpol + "  podSelector: {}\n---\n" + netpol + "  podselektor: {}\n", `document 2, line 11: NetworkPolicy default/p: spec.podselektor: invalid resource: unknown field "podselektor"`},

		{netpol + "  ingress: [null]", "line 5: NetworkPolicy default/p: spec.ingress[0]: invalid resource: nothing is written there"},
		{netpol + "  ingress: {}", "spec.ingress: invalid resource: {} where a list is wanted"},
		{netpol + "  policyTypes: [Ingress, egress]", `spec.policyTypes[1]: invalid resource: "egress": Ingress or Egress`},
		{netpol + "  policyTypes: [Ingress, Ingress]", `spec.policyTypes[1]: invalid resource: Ingress is there twice`},
		{from("podSelector:"), "line 9: NetworkPolicy default/p: spec.ingress[1].from[1].podSelector: invalid resource: neither podSelector, namespaceSelector nor ipBlock is there"},
		{from("{}"), "line 9: NetworkPolicy default/p: spec.ingress[1].from[1].podSelector"},
		{from("podSelector: {}\n      ipBlock: {cidr: 10.0.0.0/8}"), "line 10: NetworkPolicy default/p: spec.ingress[1].from[1].ipBlock: invalid resource: it goes with neither"},
		{from("podSelector:\n        matchLabels:\n          a/b/c: d"), `line 10: NetworkPolicy default/p: spec.ingress[1].from[1].podSelector.matchLabels: invalid resource: "a/b/c" is no label's name`},
		{from("podSelector:\n        matchLabels:\n          x: z\n          a.b/c: d e"), `line 12: NetworkPolicy default/p: spec.ingress[1].from[1].podSelector.matchLabels.a.b/c: invalid resource: "d e" is no label's value`},
		{from("podSelector: {matchLabels: {a: 1}}"), "spec.ingress[1].from[1].podSelector.matchLabels.a: invalid resource: 1 where a string in quotes is wanted"},
		{from("namespaceSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}"), `namespaceSelector.matchExpressions[0].operator: invalid resource: "in": In, NotIn, Exists or DoesNotExist`},
		{from("namespaceSelector: {matchExpressions: [{key: a, operator: In}]}"), `matchExpressions[0].values: invalid resource: operator In wants at least one`},
		{from("namespaceSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}"), `matchExpressions[0].values: invalid resource: operator Exists has none`},
		{from("ipBlock: {}"), "spec.ingress[1].from[1].ipBlock.cidr: invalid resource: it is missing"},
		{from("ipBlock: {cidr: 10.0.0.1/8}"), "ipBlock.cidr: invalid resource: 10.0.0.1/8: bits are set behind the prefix; write 10.0.0.0/8"},
		{from("ipBlock: {cidr: 10.0.0.256/8}"), `ipBlock.cidr: invalid resource: "10.0.0.256/8" is no network`},
		{from("ipBlock: {cidr: '::ffff:10.0.0.0/104'}"), "write IPv4 as IPv4"},
		{from("ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}"), "ipBlock.except[0]: invalid resource: 11.0.0.0/16 is no part of cidr 10.0.0.0/8"},
		{from("ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/9, 10.0.0.0/8]}"), "ipBlock.except[1]"},
		{from("ipBlock: {cidr: 10.0.0.0/8, except: ['2001:db8::/32']}"), "ipBlock.except[0]"},
		{port("port: 0"), "line 8: NetworkPolicy default/p: spec.egress[0].ports[1].port: invalid resource: port 0: not a number between 1 and 65535"},
		{port("port: 65536"), "port 65536: not a number"},
		{port("port: -1"), "port -1: not a number"},
		{port("port: 1.5"), "port 1.5: not a number"},
		{port("port: '1:2'"), "spec.egress[0].ports[1].port: invalid resource: a range; write port: 1 and endPort: 2"},
		{port("port: HTTP"), `"HTTP" is no port's name`},
		{port("port: http\n      endPort: 9"), `line 9: NetworkPolicy default/p: spec.egress[0].ports[1].endPort: invalid resource: port "http" is a name`},
		{port("endPort: 9"), "spec.egress[0].ports[1].endPort: invalid resource: there is no port"},
		{port("{port: 9, endPort: 8}"), "endPort: invalid resource: 8 comes before port 9; the range is reversed"},
		{port("{port: 9, endPort: 65536}"), "65536 is not between 1 and 65535"},
		{port("{port: 9, protocol: ICMP}"), "spec.egress[0].ports[1].protocol: invalid resource: ICMP: TCP, UDP or SCTP"},
		{port("{port: 9, protocol: FTP}"), `spec.egress[0].ports[1].protocol: invalid resource: protocol "FTP"`},

		{calico + "  selector: a = b", `line 5: NetworkPolicy.projectcalico.org default/p: spec.selector: invalid resource: "a = b": invalid selector: column 3`},
		{calico + "  serviceAccountSelector: (", "spec.serviceAccountSelector: "},
		{calico + "  selector: " + long, "bytes are more than 65536"},
		{calico + "  order: a", `spec.order: invalid resource: "a" where a number is wanted`},
		{calico + "  tier: A", `spec.tier: invalid resource: "A" is no tier's name`},
		{calico + "  types: [ingress]", "spec.types[0]"},
		{calico + "  order: 1\n  Order: 2", "spec.order: invalid resource: it is there twice"},
		{global + "  doNotTrack: true", "spec.doNotTrack: not supported; "},
		{global + "  preDNAT: true", "spec.preDNAT: not supported; "},
		{global + "  applyOnForward: true", "spec.applyOnForward: not supported; "},
		{global + "  namespaceSelector: a", "spec.namespaceSelector: "},
		{calico + "  namespaceSelector: a", `unknown field "namespaceSelector"`},
		{rule("action: allow"), `line 7: NetworkPolicy.projectcalico.org default/p: spec.ingress[1].action: invalid resource: "allow": Allow, Deny, Log or Pass`},
		{rule("ipVersion: 4"), `spec.ingress[1].action: invalid resource: ""`},
		{rule("{action: Allow, ipVersion: 5}"), "spec.ingress[1].ipVersion: invalid resource: 5"},
		{rule("action: Allow\n    http: {methods: [GET]}"), "line 8: NetworkPolicy.projectcalico.org default/p: spec.ingress[1].http: not supported; "},
		{rule("{action: Allow, protocol: 0}"), "spec.ingress[1].protocol: invalid resource: protocol 0"},
		{rule("{action: Allow, protocol: 256}"), "protocol 256"},
		{rule("{action: Allow, icmp: {type: 8}}"), "spec.ingress[1].icmp: invalid resource: it goes with protocol ICMP or ICMPv6"},
		{rule("{action: Allow, protocol: TCP, notICMP: {type: 8}}"), "spec.ingress[1].notICMP: "},
		{rule("{action: Allow, protocol: ICMP, icmp: {}}"), "spec.ingress[1].icmp: invalid resource: type is missing"},
		{rule("{action: Allow, protocol: ICMP, icmp: {code: 1}}"), "type is missing"},
		{rule("{action: Allow, protocol: ICMP, icmp: {type: 256}}"), "spec.ingress[1].icmp.type: invalid resource: 256"},
		{rule("{action: Allow, protocol: ICMP, icmp: {type: 1, code: -1}}"), "spec.ingress[1].icmp.code: invalid resource: -1"},
		{rule("{action: Allow, protocol: ICMP, ipVersion: 6, icmp: {type: 1}}"), "spec.ingress[1].ipVersion: invalid resource: 6 has no ICMP"},
		{ends("nets:\n      - 10.0.0.0/8\n      - 10.1.0.1/16"), "line 12: NetworkPolicy.projectcalico.org default/p: spec.ingress[1].source.nets[1]: invalid resource: 10.1.0.1/16: bits are set behind the prefix; write 10.1.0.0/16"},
		{ends("nets: [10.0.0.0/8, '2001:db8::/32']"), "spec.ingress[1].source.nets[1]: invalid resource: 2001:db8::/32: the rule is about IPv4 already"},
		{ends("notNets: ['2001:db8::/32']\n    destination: {nets: [10.0.0.0/8]}"), "spec.ingress[1].destination.nets[0]: "},
		{rule("{action: Allow, ipVersion: 6, source: {nets: [10.0.0.0/8]}}"), "about IPv6 already"},
		{ends("ports:\n      - 80\n      - '9:8'"), "line 12: NetworkPolicy.projectcalico.org default/p: spec.ingress[1].source.ports[1]: invalid resource: port range 9:8 is reversed; write 8:9"},
		{ends("ports: [0]"), "port 0: "},
		{ends("notPorts: ['0:9']"), "spec.ingress[1].source.notPorts[0]: invalid resource: port 0: "},
		{ends("ports: ['a b']"), `port "a b": a name has letters`},
		{rule("{action: Allow, source: {ports: [80]}}"), "spec.ingress[1].source.ports: invalid resource: they go with protocol TCP, UDP or SCTP"},
		{rule("{action: Allow, notProtocol: TCP, destination: {notPorts: [80]}}"), "spec.ingress[1].destination.notPorts: "},
		{rule("{action: Allow, protocol: UDPLite, destination: {ports: [80]}}"), "they go with protocol"},
		{ends("services: {name: a}"), "spec.ingress[1].source.services: not supported; "},
		{ends("notSelector: )"), "spec.ingress[1].source.notSelector: "},
		{ends("namespaceSelector: )"), "spec.ingress[1].source.namespaceSelector: "},
		{ends("serviceAccounts: {}"), "spec.ingress[1].source.serviceAccounts.names: invalid resource: neither names nor selector"},
		{ends("serviceAccounts: {names: [a, A]}"), "spec.ingress[1].source.serviceAccounts.names[1]: "},
		{ends("serviceAccounts: {selector: a}"), "spec.ingress[1].source.serviceAccounts.selector: "},
		{netset + "  nets: [10.0.0.0/8, null]", "spec.nets[1]: invalid resource: nothing is written there"},
		{netset + "  nets: [10.0.0.0/8, 10.0.0.1/9]", "spec.nets[1]: "},
		{netset + "  nets: ['fe80::1%eth0']", "is no network"},
		{netset + "  nets: [10, 11]", "spec.nets[0]: invalid resource: 10 where a string in quotes is wanted"},
		{tier + "  {defaultAction: Allow}", `spec.defaultAction: invalid resource: "Allow": Deny or Pass`},
		{headOf("projectcalico.org/v3", "Tier", "default") + "  order: 5", "spec.order: invalid resource: that of tier default is 1000000"},
		{headOf("projectcalico.org/v3", "Tier", "adminnetworkpolicy") + "  defaultAction: Deny", "spec.defaultAction: invalid resource: that of tier adminnetworkpolicy is Pass"},
		{prof + "  ingress: [{action: Allow}, {action: Pass}]", "spec.ingress[1].action: invalid resource: Pass leads"},
		{prof + "  egress: [{action: allow}]", "spec.egress[0].action: "},
		{prof + "  labelsToApply: {a b: c}", "spec.labelsToApply: "},
		{wep, "spec.node: invalid resource: it is missing"},
		{wep + "  {node: h1, ipNetworks: [10.0.0.0/24]}", "spec.ipNetworks[0]: invalid resource: 10.0.0.0/24 is more than one address"},
		{wep + "  {node: h1, ipNetworks: [10.0.0.1, 10.0.0.1/32]}", "spec.ipNetworks[1]: invalid resource: 10.0.0.1/32 is there twice"},
		{wep + "  {node: h1, ports: [{name: a, protocol: TCP, port: 0}]}", "spec.ports[0].port: "},
		{wep + "  {node: h1, ports: [{name: a, protocol: TCP, port: 65536}]}", "spec.ports[0].port: invalid resource: 65536 where a number between 0 and 65535 is wanted"},
		{wep + "  {node: h1, ports: [{name: a, protocol: ICMP, port: 1}]}", "spec.ports[0].protocol: "},
		{wep + "  {node: h1, ports: [{protocol: TCP, port: 1}]}", "spec.ports[0].name: "},
		{wep + "  {node: h1, profiles: [A]}", "spec.profiles[0]: "},

		{anp + "  subject: {namespaces: {}}", "spec.priority: invalid resource: it is missing"},
		{anp + "  priority: 1001\n  subject: {namespaces: {}}", "spec.priority: invalid resource: 1001 is not between 0 and 1000"},
		{anp + "  priority: 1", "spec.subject.pods: invalid resource: of namespaces, pods and"},
		{anp + "  priority: 1\n  subject: {namespaces: {}, pods: {}}", "exactly one is to be there, not 2"},
		{anp + "  priority: 1\n  subject: {pods: {podSelector: {matchLabels: {a b: c}}}}", "spec.subject.pods.podSelector.matchLabels: "},
		{adm("action: Accept\n    to: [{namespaces: {}}]"), `line 8: AdminNetworkPolicy p: spec.egress[0].action: invalid resource: "Accept": Allow or Deny or Pass`},
		{adm("action: Deny"), "spec.egress[0].to: invalid resource: it is missing"},
		{adm("action: Deny\n    from: [{namespaces: {}}]"), "spec.egress[0].from: invalid resource: here it is to"},
		{adm("action: Deny\n    to: [{}]"), "spec.egress[0].to[0].pods: "},
		{adm("action: Deny\n    to:\n    - namespaces: {}\n    - nodes: {}"), "line 11: AdminNetworkPolicy p: spec.egress[0].to[1].nodes: not supported; write the nodes' addresses as networks"},
		{adm("action: Deny\n    to: [{domainNames: [a.b]}]"), "spec.egress[0].to[0].domainNames: not supported"},
		{adm("action: Deny\n    to: [{networks: [10.0.0.1/8]}]"), "spec.egress[0].to[0].networks[0]: "},
		{adm("action: Deny\n    to: [{networks: [10.0.0.0/8]}]\n    ports: [{namedPort: dns}]"), `spec.egress[0].to: invalid resource: networks have no port "dns"`},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    protocols: [{destinationNamedPort: dns}]"), "spec.egress[0].protocols: invalid resource: they are of v1alpha2"},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    ports: [{}]"), "spec.egress[0].ports[0].portNumber: "},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    ports: [{namedPort: a}, {portNumber: {port: 0}}]"), "spec.egress[0].ports[1].portNumber.port: invalid resource: 0 is not between"},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    ports: [{portRange: {start: 2, end: 1}}]"), "spec.egress[0].ports[0].portRange.end: invalid resource: 1 comes before 2"},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    ports: [{portNumber: {port: 1, protocol: ICMP}}]"), "spec.egress[0].ports[0].portNumber.protocol: "},
		{adm("action: Deny\n    to: [{namespaces: {}}]\n    ports: [{namedPort: A}]"), "spec.egress[0].ports[0].namedPort: "},
		{anp + admin + "  ingress: [{action: Deny, from: [{networks: [10.0.0.0/8]}]}]", "spec.ingress[0].from[0].networks: invalid resource: they are for egress"},
		{strings.Replace(banp, "default", "other", 1) + "  subject: {namespaces: {}}", `BaselineAdminNetworkPolicy other: invalid resource: there is one, called "default"`},
		{banp + "  subject: {namespaces: {}}\n  ingress: [{action: Pass, from: [{namespaces: {}}]}]", `spec.ingress[0].action: invalid resource: "Pass": Allow or Deny`},
		{banp + "  priority: 1", "unknown field"},
		{cnp + "  tier: admin\n" + admin, `spec.tier: invalid resource: "admin": Admin or Baseline`},
		{cnp + cluster + "  ingress: [{action: Allow, from: [{namespaces: {}}]}]", `"Allow": Accept or Deny or Pass`},
		{cnp + cluster + "  ingress: [{action: Deny, from: [{namespaces: {}}], ports: [{namedPort: a}]}]", "spec.ingress[0].ports: invalid resource: they are of v1alpha1"},
		{cls("tcp: {}"), "line 12: ClusterNetworkPolicy p: spec.egress[0].protocols[0].tcp.destinationPort: invalid resource: of number and range"},
		{cls("{}"), "spec.egress[0].protocols[0].tcp: "},
		{cls("{tcp: {destinationPort: {number: 1}}, destinationNamedPort: a}"), "spec.egress[0].protocols[0].tcp: "},
		{cls("sctp: {destinationPort: {number: 65536}}"), "spec.egress[0].protocols[0].sctp.destinationPort.number: "},
		{cls("udp: {destinationPort: {range: {start: 9, end: 8}}}"), "spec.egress[0].protocols[0].udp.destinationPort.range.end: "},
		{cls("udp: {destinationPort: {range: {start: 9, end: 9, protocol: TCP}}}"), "range.protocol: invalid resource: UDP is said already"},
	} {
		_, err := Parse([]byte(test.text))
		if err == nil || !strings.Contains(err.Error(), test.want) || !errors.Is(err, api.ErrInvalid) && !errors.Is(err, api.ErrUnsupported) || len(err.Error()) > 600 {
			t.Errorf("%.300s\n%.600v\nwant %s", test.text, err, test.want)
		}
	}
}
