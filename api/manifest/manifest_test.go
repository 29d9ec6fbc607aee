package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

const head = "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec:"

// pool reads a pool's spec.
func pool(spec string) (api.IPPool, error) {
	if strings.HasPrefix(spec, "{") || strings.HasPrefix(spec, "[") {
		spec = " " + spec
	} else {
		spec = "\n  " + strings.ReplaceAll(spec, "\n", "\n  ")
	}
	all, err := Parse([]byte(head + spec))
	if err != nil {
		return api.IPPool{}, err
	}
	p, ok := all[0].Spec.(*api.IPPool)
	if !ok || len(all) != 1 {
		return api.IPPool{}, fmt.Errorf("%d resources", len(all))
	}
	return *p, nil
}

func TestParseIPPool(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       string // "": api.ErrInvalid
		size       int
	}{
		{"yaml", "cidr: 10.1.0.0/16\n", "10.1.0.0/16", 26},
		{"json", `{"cidr": "10.1.0.0/16"}`, "10.1.0.0/16", 26},
		{"v6", "cidr: 2001:db8::/64\n", "2001:db8::/64", 122},
		{"one block", "cidr: 10.1.0.0/26\n", "10.1.0.0/26", 26},
		{"small with small blocks", "{cidr: 10.1.0.0/31, blockSize: 31}", "10.1.0.0/31", 31},
		{"blocks of one", "{cidr: 10.1.0.0/24, blockSize: 32}", "10.1.0.0/24", 32},
		{"largest blocks", "{cidr: 10.1.0.0/16, blockSize: 20}", "10.1.0.0/16", 20},
		{"largest v6 blocks", "{cidr: '2001:db8::/64', blockSize: 116}", "2001:db8::/64", 116},
		{"class E", "cidr: 240.0.0.0/8", "240.0.0.0/8", 26},
		{"disabled", "{cidr: 10.1.0.0/16, disabled: true}", "10.1.0.0/16", 26},
		{"a key of another program", "{cidr: 10.1.0.0/16, natOutgoing: true}", "10.1.0.0/16", 26},

		{"empty", "", "", 0},
		{"no cidr", "blockSize: 26", "", 0},
		{"not yaml", "{", "", 0},
		{"a list", "[]", "", 0},
		{"address", "cidr: 10.1.0.0", "", 0},
		{"host bits", "cidr: 10.1.0.1/16", "", 0},
		{"/31 with default blocks", "cidr: 10.1.0.0/31", "", 0},
		{"/27 with default blocks", "cidr: 10.1.0.0/27", "", 0},
		{"v6 smaller than a block", "cidr: 2001:db8::/123", "", 0},
		{"blocks too large", "{cidr: 10.0.0.0/8, blockSize: 19}", "", 0},
		{"v6 blocks too large", "{cidr: '2001:db8::/64', blockSize: 115}", "", 0},
		{"blocks too small", "{cidr: 10.0.0.0/8, blockSize: 33}", "", 0},
		{"negative blocks", "{cidr: 10.0.0.0/8, blockSize: -1}", "", 0},
		{"v4 block size for v6", "{cidr: '2001:db8::/64', blockSize: 26}", "", 0},
		{"v4-mapped", "cidr: ::ffff:10.1.0.0/112", "", 0},
		{"zone", "cidr: fd00::%eth0/64", "", 0},
		{"multicast", "cidr: 224.0.0.0/8", "", 0},
		{"multicast inside", "cidr: 192.0.0.0/2", "", 0},
		{"loopback", "cidr: 127.0.0.0/8", "", 0},
		{"loopback inside", "cidr: 64.0.0.0/2", "", 0},
		{"link-local", "cidr: 169.254.0.0/16", "", 0},
		{"link-local inside", "cidr: 168.0.0.0/5", "", 0},
		{"this network", "cidr: 0.0.0.0/8", "", 0},
		{"everything", "cidr: 0.0.0.0/0", "", 0},
		{"broadcast", "cidr: 255.255.255.0/24", "", 0},
		{"v6 everything", "cidr: ::/0", "", 0},
		{"v6 loopback", "cidr: ::/96", "", 0},
		{"v6 multicast", "cidr: ff05::/16", "", 0},
		{"v6 link-local", "cidr: fe80::/64", "", 0},
		{"v6 multicast inside", "cidr: fe00::/7", "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := pool(test.text)
			if test.want == "" {
				if !errors.Is(err, api.ErrInvalid) {
					t.Fatalf("%+v, %v, want api.ErrInvalid", p, err)
				}
				return
			}
			if err != nil || p.CIDR.String() != test.want || p.BlockSize != test.size {
				t.Fatalf("%+v, %v, want %s with blocks of /%d", p, err, test.want, test.size)
			}
		})
	}
}

const peer = "apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: p}\nspec: "

func TestParse(t *testing.T) {
	const node = "apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: h1}\nspec: {bgp: {ipv4Address: 10.0.0.1/24, asNumber: \"1.10\"}}\n"
	all, err := Parse([]byte("# a comment\n---\n" + node + "---\n" + head + " {cidr: 10.1.0.0/16, natOutgoing: true, ipipMode: Never, vxlanMode: Never, nodeSelector: all()}\n"))
	if err != nil || len(all) != 2 || all[0].Metadata.Name != "h1" || all[0].Spec.(*api.Node).BGP.ASNumber != 1<<16|10 || all[1].String() != "IPPool p" {
		t.Fatalf("%+v, %v", all, err)
	}
	if all, err = Parse([]byte(`{"kind": "List", "apiVersion": "v1", "items": [{"apiVersion": "projectcalico.org/v3", "kind": "BGPPeer", "metadata": {"name": "tor"}, "spec": {"peerIP": "[2001:db8::1]:1790", "asNumber": 65001}}]}`)); err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	if all, err = Parse([]byte(head + " {cidr: 10.1.0.0/16, nodeSelector: rack == 'a'}\n---\n" + peer + "{nodeSelector: '!has(route-reflector)', peerSelector: has(route-reflector)}")); err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	for text, want := range map[string]string{
		"":                                      "no resource",
		"---\n---\n":                            "no resource",
		node + "---\n{":                         "document 2, from line 6",
		"kind: Node":                            "apiVersion",
		strings.Replace(node, "Node", "Pod", 1): `kind "Pod"`,
		strings.Replace(node, "h1", "H_1", 1):   "metadata.name",
		strings.Replace(node, "ipv4Address", "ipv4addr", 1):         `unknown field "ipv4addr"`,
		strings.Replace(node, "10.0.0.1/24", "'2001:db8::1/64'", 1): "bgp.ipv4Address",
		strings.Replace(node, "1.10", "0", 1):                       "AS number",
		node + "metadata: {name: h2}\n":                             "already",
		head + " {cidr: 10.1.0.0/16, ipipMode: Always}":             "vxlanMode",
		head + " {cidr: 10.1.0.0/16, nodeSelector: has(a}":          `nodeSelector "has(a": invalid selector: column 6: expected )`,
		strings.Replace(node, "h1", "h1, labels: {'a b': c}", 1):    `metadata.labels: invalid resource: "a b"`,
		peer + "{peerIP: 10.0.0.1}":                                 "asNumber is missing",
		peer + "{asNumber: 64512}":                                  "neither peerIP nor peerSelector",
		peer + "{peerSelector: has(a), asNumber: 64512}":            "peerSelector excludes peerIP and asNumber",
		peer + "{peerSelector: has(a), peerIP: 10.0.0.1}":           "peerSelector excludes peerIP and asNumber",
		peer + "{peerSelector: has(a), node: h1, nodeSelector: a}":  "node and nodeSelector exclude each other",
		peer + "{peerSelector: a = b}":                              `peerSelector "a = b"`,
	} {
		if all, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q", text, all, err, want)
		}
	}
}

const calicoFilter = `apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: f}
spec:
  exportV4:
  - {action: Accept, matchOperator: In, cidr: 77.0.0.0/16, prefixLength: {min: 16, max: 24}, source: RemotePeers, peerType: eBGP}
  - {action: Reject, matchOperator: NotEqual, cidr: 77.1.0.0/16}
  importV4:
  - {action: Reject, matchOperator: NotIn, cidr: 44.0.0.0/16, communities: {values: ["65001:100"]}}
  exportV6:
  - action: Accept
    asPathPrefix: [65001, "1.10"]
    operations: [{addCommunity: {value: "65001:1:2"}}, {prependASPath: {prefix: [65000, 65001]}}]
  importV6:
  - {action: Accept, matchOperator: Equal, cidr: "5000::/64"}
  - {action: Reject}
`

func TestParseBGPFilter(t *testing.T) {
	all, err := Parse([]byte(calicoFilter))
	if err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	f := all[0].Spec.(*api.BGPFilter)
	for _, test := range []struct {
		rule      api.BGPFilterRule
		low, high int
	}{{f.ExportV4[0], 16, 24}, {f.ExportV4[1], 16, 16}, {f.ImportV4[0], 16, 32}, {f.ImportV6[0], 64, 64}} {
		if low, high := test.rule.Lengths(); low != test.low || high != test.high {
			t.Errorf("%s: %d to %d, want %d to %d", test.rule.CIDR, low, high, test.low, test.high)
		}
	}
	for rule, want := range map[string]string{
		"{}":                                       "exportV4[0]: invalid resource: action",
		"{action: reject}":                         `action "reject"`,
		"{action: Accept, cidr: 1.0.0.0/8}":        `matchOperator ""`,
		"{action: Accept, matchOperator: In}":      "cidr is missing",
		"{action: Accept, prefixLength: {min: 8}}": "cidr is missing",
		"{action: Accept, matchOperator: In, cidr: '2001:db8::/32'}":                                   "other family",
		"{action: Accept, matchOperator: In, cidr: 1.0.0.1/8}":                                         "write 1.0.0.0/8",
		"{action: Accept, matchOperator: in, cidr: 1.0.0.0/8}":                                         `matchOperator "in"`,
		"{action: Accept, matchOperator: Equal, cidr: 1.0.0.0/8, prefixLength: {max: 9}}":              "goes with matchOperator In",
		"{action: Accept, matchOperator: In, cidr: 1.0.0.0/8, prefixLength: {max: 7}}":                 "8 to 7",
		"{action: Accept, matchOperator: In, cidr: 1.0.0.0/8, prefixLength: {max: 33}}":                "8 to 33",
		"{action: Accept, source: Local}":                                                              "RemotePeers",
		"{action: Accept, peerType: ibgp}":                                                             "eBGP, iBGP",
		"{action: Accept, interface: eth0}":                                                            "interface: not supported",
		"{action: Accept, priority: 512}":                                                              "priority: not supported",
		"{action: Accept, communities: {values: [a]}}":                                                 `communities.values "a"`,
		"{action: Accept, communities: {values: ['65536:1']}}":                                         `"65536:1"`,
		"{action: Accept, communities: {values: ['1:1', '1:2']}}":                                      "one is to be there",
		"{action: Accept, operations: [{setPriority: {value: 512}}]}":                                  "operations[0]: setPriority: not supported",
		"{action: Accept, operations: [{}]}":                                                           "one of addCommunity and prependASPath",
		"{action: Accept, operations: [{addCommunity: {value: '1:1'}, prependASPath: {prefix: [1]}}]}": "one of addCommunity and prependASPath",
		"{action: Accept, operations: [{prependASPath: {prefix: []}}]}":                                "is empty",
		"{action: Accept, operations: [{prependASPath: {prefix: [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]}}]}": "more than 10",
		"{action: Reject, operations: [{addCommunity: {value: '1:1'}}]}":                               "operations on what is rejected",
		"{action: Accept, operator: In}":                                                               `unknown field "operator"`,
	} {
		text := "apiVersion: projectcalico.org/v3\nkind: BGPFilter\nmetadata: {name: f}\nspec: {exportV4: [" + rule + "]}"
		if all, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want %q", rule, all, err, want)
		}
	}
	const config = "apiVersion: projectcalico.org/v3\nkind: BGPConfiguration\nmetadata: {name: default}\nspec: "
	all, err = Parse([]byte(config + "{communities: [{name: large, value: '63400:300:100'}], prefixAdvertisements: [{cidr: 172.218.4.0/26, communities: [large, '63400:120']}]}"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := all[0].Spec.(*api.BGPConfiguration).Advertised(); err != nil || fmt.Sprint(got) != "[{172.218.4.0/26 [63400:300:100 63400:120]}]" {
		t.Errorf("%v, %v", got, err)
	}
	for spec, want := range map[string]string{
		"{communities: [{name: a, value: b}]}":                                   `value "b"`,
		"{communities: [{value: '1:1'}]}":                                        `name ""`,
		"{communities: [{name: a, value: '1:1'}, {name: a, value: '1:2'}]}":      "it must be there once",
		"{prefixAdvertisements: [{cidr: 10.0.0.0/8, communities: [a]}]}":         `community "a" has no value`,
		"{prefixAdvertisements: [{cidr: 10.0.0.1/8, communities: []}]}":          "is no network",
		"{prefixAdvertisements: [{cidr: 10.0.0.0/8, communities: ['1:2:3:4']}]}": `"1:2:3:4"`,
	} {
		if all, err := Parse([]byte(config + spec)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want %q", spec, all, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{head + " {cidr: 10.1.0.0/16}", head + `{"cidr":"2001:db8::/64","blockSize":124,"disabled":true}`, "cidr: &a [*a]", "a: b: c", "items: []",
		"apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: p}\nspec: {peerIP: 10.0.0.1, asNumber: 1.1, maxRestartTime: 5s}",
		"apiVersion: projectcalico.org/v3\nkind: BGPConfiguration\nmetadata: {name: default}\nspec: {nodeToNodeMeshEnabled: false}", calicoFilter} {
		f.Add([]byte(s))
	}
	for _, p := range policies {
		f.Add([]byte(p.text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := Parse(data)
		if err != nil {
			if !errors.Is(err, api.ErrInvalid) && !errors.Is(err, api.ErrUnsupported) {
				t.Fatalf("no sentinel: %v", err)
			}
			return
		}
		for _, r := range all {
			if p, ok := r.Spec.(*api.IPPool); ok {
				for _, a := range []string{"127.0.0.1", "224.0.0.1", "169.254.1.1", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1"} {
					if p.CIDR != p.CIDR.Masked() || p.BlockSize < p.CIDR.Bits() || p.BlockSize > p.CIDR.Addr().BitLen() || p.CIDR.Contains(netip.MustParseAddr(a)) {
						t.Fatalf("accepted: %+v", p)
					}
				}
			}
			for _, write := range []func(any) ([]byte, error){json.Marshal, func(v any) ([]byte, error) { return yaml.Marshal(v) }} {
				text, err := write(r)
				if err != nil {
					t.Fatal(err)
				}
				again, err := Parse(text)
				if err != nil || len(again) != 1 {
					t.Fatalf("%s became %+v, %v", text, again, err)
				}
				one, _ := json.Marshal(r)
				if two, _ := json.Marshal(again[0]); string(one) != string(two) {
					t.Fatalf("%s became %s", one, two)
				}
			}
		}
	})
}
