package ctl

import (
	"bytes"
	"strings"
	"testing"
)

// storeText is a cluster of two nodes.
const storeText = `
{apiVersion: projectcalico.org/v3, kind: Node, metadata: {name: n1}, spec: {addresses: [{address: 192.0.2.1}]}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: x, labels: {team: red}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: "y"}}
---
{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {name: wep-a, namespace: x, labels: {pod: a}}, spec: {node: n1, orchestrator: k8s, pod: a, ipNetworks: [10.65.0.1]}}
---
{apiVersion: projectcalico.org/v3, kind: WorkloadEndpoint, metadata: {name: wep-b, namespace: "y", labels: {pod: b}}, spec: {node: n2, orchestrator: k8s, pod: b, ipNetworks: [10.65.1.1]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-80, namespace: x}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}, {from: [{namespaceSelector: {}}], ports: [{port: 80}]}]}
`

// TestWhyOfStore: what can be told without a node.
func TestWhyOfStore(t *testing.T) {
	dir := t.TempDir()
	run := func(stdin string, args ...string) (string, int) {
		var out bytes.Buffer
		code := Run(t.Context(), append([]string{"--state-dir", dir, "--bpffs-dir", dir + "/none", "--socket", dir + "/none.sock"}, args...), strings.NewReader(stdin), &out, &out)
		return out.String(), code
	}
	if out, code := run(storeText, "apply", "-f", "-"); code != 0 {
		t.Fatal(out)
	}
	for _, c := range []struct {
		args string
		code int
		want []string
	}{
		{"pod/y/b pod/x/a:80", 0, []string{"TCP y/b (10.65.1.1) -> x/a (10.65.0.1:80): ALLOWED", "by NetworkPolicy x/only-80, spec.ingress[1]", "it is judged on node n1", "by the store"}},
		{"y/b x/a:81", 0, []string{"DENIED (drop_policy_ingress)", "nearest miss", "is none of pods in namespace x", "x/a is on node n1, which judges it"}},
		{"192.0.2.1 pod/x/a:81", 0, []string{"ALLOWED", "what a process of node n1 sends always reaches its pods"}},
		{"192.0.2.2 pod/x/a:81", 0, []string{"DENIED"}},
		{"pod/x/a pod/x/a:81", 0, []string{"a pod always reaches itself"}},
		{"pod/x/a pod/x/c:81", 1, []string{`"pod/x/c": no pod that the store knows`, "caracalctl get pods -A"}},
	} {
		out, code := run("", append([]string{"why", "--cluster"}, strings.Fields(c.args)...)...)
		for _, want := range c.want {
			if code != c.code || !strings.Contains(out, want) {
				t.Errorf("why %s: code %d, want %d and %q:\n%s", c.args, code, c.code, want, out)
			}
		}
		if strings.Contains(out, "flows") || strings.Contains(out, "epoch") {
			t.Errorf("why %s tells what no node was asked:\n%s", c.args, out)
		}
	}
	if out, code := run("", "why", "x/a", "y/b"); code != 1 || !strings.Contains(out, "no pod was added on this node yet") {
		t.Errorf("why of a machine that is no node: %d %s", code, out)
	}
}
