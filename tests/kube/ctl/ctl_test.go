// Package ctl tests caracalctl against a real Kubernetes API.
package ctl

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/cmd/caracald/ctl"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// caracalctl runs the command as somebody.
func caracalctl(t *testing.T, kubeconfig, stdin string, args ...string) (out string, code int) {
	t.Helper()
	dir := t.TempDir()
	var b bytes.Buffer
	args = append([]string{"--state-dir", dir, "--bpffs-dir", dir + "/none", "--socket", dir + "/none.sock", "--kubeconfig", kubeconfig}, args...)
	code = ctl.Run(t.Context(), args, strings.NewReader(stdin), &b, &b)
	return b.String(), code
}

// calicoKinds are those of Calico's datastore kubernetes, of which only the names matter here.
var calicoKinds = []struct {
	kind, plural string
	namespaced   bool
}{
	{"IPPool", "ippools", false}, {"BGPConfiguration", "bgpconfigurations", false}, {"BGPPeer", "bgppeers", false}, {"Tier", "tiers", false},
	{"GlobalNetworkPolicy", "globalnetworkpolicies", false}, {"NetworkPolicy", "networkpolicies", true}, {"GlobalNetworkSet", "globalnetworksets", false},
	{"HostEndpoint", "hostendpoints", false}, {"IPAMBlock", "ipamblocks", false}, {"BlockAffinity", "blockaffinities", false},
	{"IPAMHandle", "ipamhandles", false}, {"IPAMConfig", "ipamconfigs", false}, {"FelixConfiguration", "felixconfigurations", false},
}

func calicoCRDs() string {
	var b strings.Builder
	for _, k := range calicoKinds {
		scope := "Cluster"
		if k.namespaced {
			scope = "Namespaced"
		}
		fmt.Fprintf(&b, `---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: %[1]s.crd.projectcalico.org}
spec:
  group: crd.projectcalico.org
  scope: %[3]s
  names: {kind: %[2]s, plural: %[1]s, singular: %[4]s, listKind: %[2]sList}
  versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, x-kubernetes-preserve-unknown-fields: true}}}}}]
`, k.plural, k.kind, scope, strings.ToLower(k.kind))
	}
	return b.String()
}

// calicoCluster is what Calico has there of a cluster of two nodes.
const calicoCluster = `
{apiVersion: crd.projectcalico.org/v1, kind: IPPool, metadata: {name: default-ipv4-ippool}, spec: {cidr: 10.244.0.0/16, blockSize: 26, ipipMode: Never, vxlanMode: Never, natOutgoing: true, nodeSelector: all(), allowedUses: [Workload, Tunnel]}}
---
{apiVersion: crd.projectcalico.org/v1, kind: BGPConfiguration, metadata: {name: default}, spec: {asNumber: 64512, nodeToNodeMeshEnabled: true}}
---
{apiVersion: crd.projectcalico.org/v1, kind: Tier, metadata: {name: platform}, spec: {order: 500}}
---
{apiVersion: crd.projectcalico.org/v1, kind: GlobalNetworkPolicy, metadata: {name: platform.deny-z}, spec: {tier: platform, order: 10, namespaceSelector: all(), types: [Ingress], ingress: [{action: Deny, source: {namespaceSelector: ns == "z"}}, {action: Pass}]}}
---
{apiVersion: crd.projectcalico.org/v1, kind: NetworkPolicy, metadata: {name: default.web, namespace: default}, spec: {selector: role == "web", ingress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]}}
---
{apiVersion: crd.projectcalico.org/v1, kind: HostEndpoint, metadata: {name: n1-eth0}, spec: {node: n1, interfaceName: eth0}}
---
{apiVersion: crd.projectcalico.org/v1, kind: FelixConfiguration, metadata: {name: default}, spec: {bpfEnabled: false}}
---
{apiVersion: crd.projectcalico.org/v1, kind: IPAMBlock, metadata: {name: 10-244-1-0-26}, spec: {cidr: 10.244.1.0/26, affinity: "host:n1", strictAffinity: false, allocations: [null, 0], attributes: [{handle_id: h, secondary: {node: n1, pod: a, namespace: default}}], unallocated: [0], deleted: false}}
---
{apiVersion: crd.projectcalico.org/v1, kind: BlockAffinity, metadata: {name: n1-10-244-1-0-26}, spec: {cidr: 10.244.1.0/26, node: n1, state: confirmed, deleted: "false"}}
---
{apiVersion: crd.projectcalico.org/v1, kind: BlockAffinity, metadata: {name: n2-10-244-2-0-26}, spec: {cidr: 10.244.2.0/26, node: n2, state: confirmed, deleted: "false"}}
---
{apiVersion: crd.projectcalico.org/v1, kind: IPAMHandle, metadata: {name: h}, spec: {handleID: h, block: {10.244.1.0/26: 1}}}
---
{apiVersion: crd.projectcalico.org/v1, kind: IPAMHandle, metadata: {name: i}, spec: {handleID: i, block: {}}}
---
{apiVersion: crd.projectcalico.org/v1, kind: IPAMConfig, metadata: {name: default}, spec: {strictAffinity: false, autoAllocateBlocks: true}}
`

// pods are of two nodes, one of them behind a Service.
const pods = `
{apiVersion: v1, kind: Node, metadata: {name: n1}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: x, labels: {ns: x}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: z, labels: {ns: z}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: x, labels: {role: web}}, spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{name: http, containerPort: 8080}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: z}, spec: {nodeName: n2, containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: new, namespace: z}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: x}, spec: {clusterIP: 10.96.7.7, ports: [{name: http, port: 80, targetPort: http}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1, namespace: x, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{name: http, port: 8080, protocol: TCP}], endpoints: [{addresses: [10.244.1.1], conditions: {ready: true}}, {addresses: [10.244.1.9], conditions: {ready: false}}]}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: x}, spec: {podSelector: {matchLabels: {role: web}}, ingress: [{ports: [{port: http}], from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}}
`

// reader may list pools and nothing else.
const reader = `
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: reader}, rules: [{apiGroups: [projectcalico.org], resources: [ippools], verbs: [get, list]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: reader}, roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}, subjects: [{kind: User, name: reader, apiGroup: rbac.authorization.k8s.io}]}
`

// said fails the test when a command says something else than it should.
func said(t *testing.T, what, out string, code, wantCode int, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s: not %q:\n%s", what, w, out)
		}
	}
	if code != wantCode {
		t.Errorf("%s: exit %d, want %d:\n%s", what, code, wantCode, out)
	}
}

// TestCluster: what an operator does with a kubeconfig alone, from a cluster of Calico's on.
func TestCluster(t *testing.T) {
	api := apiserver.Start(t, apiserver.Options{})
	admin := api.Kubeconfig("")
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}

	out, code := caracalctl(t, admin, "", "doctor")
	said(t, "doctor without Caracal", out, code, 1, "kubernetes caracal.dev/v1", "the API does not know addressblocks, caracalnodes, entries", "crds.yaml", "the cluster has no Node of this name")
	out, code = caracalctl(t, admin, "", "get", "ippools")
	said(t, "get without Caracal", out, code, 1, "crds.yaml")
	out, code = caracalctl(t, admin, "", "import", "--from-kubernetes", "--dry-run")
	said(t, "import without Calico", out, code, 1, "the cluster has no resources of Calico's")

	api.Kubectl("", "apply", "--server-side", "-f", filepath.Join(root, "deploy/kubernetes/crds.yaml"))
	api.Kubectl(calicoCRDs(), "apply", "-f", "-")
	api.Kubectl("", "wait", "--for=condition=Established", "crd", "--all")
	api.Kubectl(pods, "apply", "-f", "-")
	for pod, ip := range map[string]string{"x/web": "10.244.1.1", "z/client": "10.244.2.1"} {
		namespace, name, _ := strings.Cut(pod, "/")
		api.Kubectl("", "patch", "-n", namespace, "pod", name, "--subresource=status", "-p", fmt.Sprintf(`{"status": {"phase": "Running", "podIP": %[1]q, "podIPs": [{"ip": %[1]q}]}}`, ip))
	}

	t.Run("import", func(t *testing.T) {
		api.Kubectl(calicoCluster, "apply", "-f", "-")
		out, code := caracalctl(t, admin, "", "import", "--from-kubernetes", "--dry-run")
		said(t, "dry run", out, code, 1, "HostEndpoint n1-eth0 ", "can't be", "IPAMHandle (2 of them)", "IPAMBlock 10.244.2.0/26 ", "nothing was written: 1 things")
		out, code = caracalctl(t, admin, "", "import", "--from-kubernetes", "--skip")
		said(t, "import", out, code, 0, "left out", "created")
		got := api.Kubectl("", "get", "ippools.projectcalico.org,tiers.projectcalico.org,addressblocks.caracal.dev", "-o", "name")
		for _, want := range []string{"default-ipv4-ippool", "platform", "addressblock.caracal.dev/10.244.1.0-26", "addressblock.caracal.dev/10.244.2.0-26"} {
			if !strings.Contains(got, want) {
				t.Errorf("no %s: %s", want, got)
			}
		}
		out, code = caracalctl(t, admin, "", "import", "--from-kubernetes", "--skip", "-o", "json")
		if said(t, "again", out, code, 0, `"unchanged"`); strings.Contains(out, `"changed"`+",\n      \"line") || strings.Contains(out, `"created"`) {
			t.Errorf("again it changed something:\n%s", out)
		}
		list := api.Kubectl("", "get", "ippools.crd.projectcalico.org,ipamblocks.crd.projectcalico.org", "-o", "yaml")
		out, code = caracalctl(t, admin, list, "import", "-f", "-")
		said(t, "what kubectl prints", out, code, 0, "IPAMBlock 10.244.1.0/26", "unchanged")
	})
	t.Run("resources", func(t *testing.T) {
		const pool = `{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "more"}, "spec": {"cidr": "10.9.0.0/16"}}`
		for _, want := range []string{"IPPool more created", "IPPool more unchanged"} {
			out, code := caracalctl(t, admin, pool, "apply", "-f", "-")
			said(t, "apply", out, code, 0, want)
		}
		if out := api.Kubectl("", "get", "ippools.projectcalico.org", "more", "-o", "jsonpath={.spec.cidr}"); out != "10.9.0.0/16" {
			t.Errorf("kubectl get: %s", out)
		}
		out, code := caracalctl(t, admin, "", "get", "ippools")
		said(t, "get", out, code, 0, "more ", "10.9.0.0/16", "default-ipv4-ippool")
		out, code = caracalctl(t, admin, "", "delete", "ippool", "more")
		said(t, "delete", out, code, 0, "IPPool more deleted")
		out, code = caracalctl(t, admin, "", "get", "pods", "-A")
		said(t, "get pods", out, code, 0, "web", "nodeName: n1", "10.244.1.1")
		out, code = caracalctl(t, admin, "", "get", "services", "-n", "x")
		said(t, "get services", out, code, 0, "10.96.7.7")
		out, code = caracalctl(t, admin, "", "get", "namespaces")
		said(t, "get namespaces", out, code, 0, "kube-system")
		for _, kind := range []string{"pod", "service"} {
			out, code := caracalctl(t, admin, "", "delete", kind, "web", "-n", "x")
			said(t, "delete "+kind, out, code, 1, "Kubernetes's own", "kubectl")
		}
		out, code = caracalctl(t, admin, "", "delete", "namespace", "x")
		said(t, "delete namespace", out, code, 1, "Namespace x: it is Kubernetes's own", "kubectl")
		out, code = caracalctl(t, admin, `{apiVersion: v1, kind: Pod, metadata: {name: p}}`, "apply", "-f", "-")
		said(t, "apply a pod", out, code, 1, "it is read from Kubernetes alone")
	})
	t.Run("why", func(t *testing.T) {
		for ask, want := range map[string][]string{
			"pod/z/client pod/x/web:8080": {"z/client (10.244.2.1) -> x/web (10.244.1.1:8080): DENIED", "GlobalNetworkPolicy platform.deny-z", "it is judged on node n1"},
			"pod/x/web pod/z/client:80":   {"ALLOWED", "it is judged on node n2"},
			"pod/z/client svc/x/web:80":   {"Service x/web (10.96.7.7:80, TCP)", "one of 1 ready backends", "x/web (10.244.1.1:8080): DENIED"},
			"pod/z/client svc/x/web":      {"x/web (10.244.1.1:8080): DENIED"},
			"192.0.2.200 svc/x/web:http":  {"x/web (10.244.1.1:8080): DENIED", "NetworkPolicy x/web"},
		} {
			out, code := caracalctl(t, admin, "", append([]string{"why"}, strings.Fields(ask)...)...)
			said(t, "why "+ask, out, code, 0, want...)
		}
		for ask, want := range map[string]string{
			"pod/z/new pod/x/web:80":     "z/new has no address yet",
			"pod/z/client svc/x/none:80": "the cluster has no Service x/none",
			"pod/z/client svc/x/web:81":  "it has the ports 80/TCP alone",
			"pod/z/client pod/z/none:81": "no pod that the store knows",
		} {
			out, code := caracalctl(t, admin, "", append([]string{"why"}, strings.Fields(ask)...)...)
			said(t, "why "+ask, out, code, 1, want)
		}
	})
	t.Run("narrow rights", func(t *testing.T) {
		api.Kubectl(reader, "apply", "-f", "-")
		narrow := api.Kubeconfig("reader")
		out, code := caracalctl(t, narrow, "", "get", "ippools")
		said(t, "get pools", out, code, 0, "default-ipv4-ippool")
		out, code = caracalctl(t, narrow, "", "get", "globalnetworkpolicies")
		said(t, "get policies", out, code, 1, "store denies access", "list", "globalnetworkpolicies")
		out, code = caracalctl(t, narrow, "", "delete", "ippool", "default-ipv4-ippool")
		said(t, "delete a pool", out, code, 1, "store denies access", "delete", "ippools")
		out, code = caracalctl(t, narrow, "", "why", "pod/z/client", "svc/x/web:80")
		said(t, "why", out, code, 1, "services", "get")
	})
	t.Run("doctor", func(t *testing.T) {
		name, err := os.Hostname()
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NODENAME", "n1")
		out, _ := caracalctl(t, api.Kubeconfig("reader"), "", "doctor")
		said(t, "as reader", out, 1, 1, "caracalnodes.caracal.dev", "does not allow us to get, list, watch, create", "rbac.yaml")
		api.Kubectl("", "apply", "-f", filepath.Join(root, "deploy/kubernetes/rbac.yaml"))
		asNode := api.Kubeconfig("system:serviceaccount:kube-system:caracal-node")
		out, code := caracalctl(t, asNode, "", "why", "pod/z/client", "svc/x/web:80")
		said(t, "why, as a node", out, code, 0)
		out, _ = caracalctl(t, asNode, "", "doctor")
		if strings.Contains(out, "does not allow us") {
			t.Errorf("as a node:\n%s", out)
		}
		said(t, "as a node", out, 1, 1, "kubernetes kube-proxy", "without one no pod reaches a Service's address")
		api.Kubectl("", "patch", "node", "n1", "--subresource=status", "-p", `{"status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.99"}, {"type": "Hostname", "address": "`+name+`"}]}}`)
		out, _ = caracalctl(t, admin, "", "doctor")
		said(t, "another host's", out, 1, 1, "its InternalIP 192.0.2.99 is none of this host's")
		// An extension API server of Calico's has the same kinds.
		api.Kubectl("", "patch", "apiservice", "v3.projectcalico.org", "--type=merge", "-p", `{"metadata": {"labels": {"kube-aggregator.kubernetes.io/automanaged": null}},
			"spec": {"insecureSkipTLSVerify": true, "service": {"name": "calico-api", "namespace": "calico-apiserver"}}}`)
		out, _ = caracalctl(t, admin, "", "doctor")
		said(t, "Calico's API server", out, 1, 1, "another API server, calico-apiserver/calico-api, serves these kinds")
	})
	t.Run("no API", func(t *testing.T) {
		out, code := caracalctl(t, filepath.Join(t.TempDir(), "none"), "", "get", "ippools")
		said(t, "no kubeconfig", out, code, 1, "none: no such file")
		out, code = caracalctl(t, admin, "", "--context", "elsewhere", "get", "ippools")
		said(t, "no context", out, code, 1, "elsewhere")
	})
}
