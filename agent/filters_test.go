package agent

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/bgp"
)

const filters = `apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: one}
spec:
  exportV4:
  - {action: Reject, matchOperator: NotIn, cidr: 10.0.0.0/8, prefixLength: {min: 4, max: 26}, source: RemotePeers}
  - {action: Accept, peerType: iBGP, operations: [{prependASPath: {prefix: [65000]}}, {addCommunity: {value: "65001:1"}}, {prependASPath: {prefix: [65002, 65003]}}]}
  importV4: [{action: Accept, matchOperator: Equal, cidr: 0.0.0.0/0, source: RemotePeers}]
  importV6: [{action: Reject, communities: {values: ["65001:2"]}, asPathPrefix: [65001, 65004], peerType: eBGP}]
---
apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: two}
spec: {exportV4: [{action: Reject}], importV4: [{action: Accept, matchOperator: NotEqual, cidr: 10.1.0.0/16}]}
`

func TestFilter(t *testing.T) {
	all, err := manifest.Parse([]byte(filters))
	if err != nil {
		t.Fatal(err)
	}
	v := &view{filters: make(map[string]*api.BGPFilter)}
	for _, r := range all {
		v.filters[r.Metadata.Name] = r.Spec.(*api.BGPFilter)
	}
	notIn := bgp.Filter{Prefix: all4, Min: 8, Max: 26, Outside: true, FromPeers: true}
	notIn.Prefix = v.filters["one"].ExportV4[0].CIDR
	change := bgp.Filter{Prefix: all4, Max: 32, Action: bgp.Accept, AddCommunities: []string{"65001:1"}, Prepend: []uint32{65002, 65003, 65000}}
	byDefault := bgp.Filter{Prefix: all4, Action: bgp.Accept}
	notEqual := bgp.Filter{Prefix: v.filters["two"].ImportV4[0].CIDR, Min: 16, Max: 16, Outside: true, Action: bgp.Accept}
	path := bgp.Filter{Prefix: all6, Max: 128, Communities: []string{"65001:2"}, ASPath: []uint32{65001, 65004}}
	for _, test := range []struct {
		name     string
		names    []string
		internal bool
		in, out  []bgp.Filter
	}{
		{name: "none"},
		{"of another AS", []string{"one"}, false, []bgp.Filter{byDefault, path}, []bgp.Filter{notIn}},
		{"of our AS", []string{"one"}, true, []bgp.Filter{byDefault}, []bgp.Filter{notIn, change}},
		{"in their order", []string{"two", "one"}, true, []bgp.Filter{notEqual, byDefault}, []bgp.Filter{{Prefix: all4, Max: 32}, notIn, change}},
	} {
		in, out, err := v.filter(test.names, test.internal)
		if err != nil || fmt.Sprintf("%+v", in) != fmt.Sprintf("%+v", test.in) || fmt.Sprintf("%+v", out) != fmt.Sprintf("%+v", test.out) {
			t.Errorf("%s: in %+v\nout %+v, %v", test.name, in, out, err)
		}
	}
	if in, out, err := v.filter([]string{"one", "three"}, true); err == nil || in != nil || out != nil || !strings.Contains(err.Error(), "BGPFilter three") {
		t.Errorf("%v %v, %v", in, out, err)
	}
}
