package ctl

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/policy"
)

// The rules of a pod stand in the order in which they are asked, and none behind what always decides.
func TestAsked(t *testing.T) {
	const pods = `
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: plain, labels: {app: web}}
spec: {node: h1, ipNetworks: [192.0.2.1]}
---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata: {name: profiled, labels: {app: db}}
spec: {node: h1, ipNetworks: [192.0.2.2], profiles: [open, gone]}
---
apiVersion: projectcalico.org/v3
kind: Profile
metadata: {name: open}
spec: {ingress: [{action: Allow, protocol: TCP}]}
---
`
	const denyAll = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny-all}\nspec: {podSelector: {}}\n---\n"
	const first = "apiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: first}\nspec: {order: 1, defaultAction: %s}\n---\n" +
		"apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: g}\nspec: {tier: first, ingress: [{action: %s, protocol: UDP}]}\n---\n"
	for _, test := range []struct{ name, text, pod, want string }{
		{"nothing", "", "plain", "- - allow everything else: no profile"},
		{"profiles", "", "profiled", "- Profile open allow TCP\n- - deny everything else"},
		{"a tier that denies", denyAll, "profiled", "default NetworkPolicy default/deny-all no rules\ndefault NetworkPolicy default/deny-all deny everything else"},
		{"a tier that passes", fmt.Sprintf(first, "Pass", "Allow") + denyAll, "plain",
			"first GlobalNetworkPolicy g allow UDP\nfirst GlobalNetworkPolicy g pass everything else\ndefault NetworkPolicy default/deny-all no rules\ndefault NetworkPolicy default/deny-all deny everything else"},
		{"a rule that passes", fmt.Sprintf(first, "Deny", "Pass"), "profiled",
			"first GlobalNetworkPolicy g pass UDP\nfirst GlobalNetworkPolicy g deny everything else\n- Profile open allow TCP\n- - deny everything else"},
		{"none that passes", fmt.Sprintf(first, "Deny", "Deny") + denyAll, "plain",
			"first GlobalNetworkPolicy g deny UDP\nfirst GlobalNetworkPolicy g deny everything else"},
	} {
		t.Run(test.name, func(t *testing.T) {
			resources, err := manifest.Parse([]byte(pods + test.text))
			if err != nil {
				t.Fatal(err)
			}
			m, err := policy.FromResources(resources)
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			for _, r := range asked(m, m.Endpoints["default/"+test.pod], policy.Ingress) {
				line := fmt.Sprintf("%s %s %s", r.Tier, r.Policy, r.Text)
				if r.Tier == "" {
					line = "-" + line
				}
				lines = append(lines, strings.ReplaceAll(line, "  ", " - "))
			}
			if got := strings.Join(lines, "\n"); got != test.want {
				t.Errorf("is\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}
