// Package nodes tests hosts that are nodes of a cluster of Kubernetes's, of which a real API server knows: their Nodes, the blocks
// that they claim and the addresses of their pods. The test is kubelet, scheduler and controllers.
//
//	     h1                    h2
//	kube-apiserver etcd
//	caracald  pods        caracald  pods
//	      |                     |
//	      +------- switch ------+
package nodes

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tests/kube/apiserver"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const waitLimit = time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, waitLimit, what, fn)
}

// cluster is a lab whose hosts are nodes.
type cluster struct {
	*apiserver.Server
	*lab.Lab
	t *testing.T
}

// newCluster has arguments for etcd.
func newCluster(t *testing.T, etcd ...string) *cluster {
	t.Helper()
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: 2, Cluster: true, Caracal: testenv.Bin(t, "caracal"),
		Plugin: map[string]any{"capabilities": map[string]bool{annotations: true}}})
	h1 := l.Host(1)
	o := apiserver.On(h1)
	o.Etcd = etcd
	s := apiserver.Start(t, o)
	root, err := testenv.Root()
	must(t, err)
	crds := filepath.Join(root, "deploy/kubernetes/crds.yaml")
	s.Kubectl("", "apply", "-f", crds)
	s.Kubectl("", "wait", "--for=condition=Established", "--timeout=60s", "-f", crds)
	must(t, os.WriteFile(filepath.Join(l.Dir, "caracalctl.cfg"), []byte("apiVersion: v1\nkind: calicoApiConfig\nspec: {datastoreType: kubernetes, kubeconfig: "+s.Kubeconfig("")+"}\n"), 0o600))
	return &cluster{s, l, t}
}

// annotations is the capability by which containerd tells of a pod's.
const annotations = "io.kubernetes.cri.pod-annotations"

func (c *cluster) kubectl(arg ...string) string { return strings.TrimSpace(c.Kubectl("", arg...)) }

// startAgent starts an agent that finds out its addresses itself.
func (c *cluster) startAgent(h *lab.Host, args ...string) {
	c.t.Helper()
	must(c.t, h.StartAgent(c.t.Context(), append([]string{"--ip", "autodetect", "--ip6", "autodetect", "--leaked-after", "2s"}, args...)...))
}

func (c *cluster) restartAgent(h *lab.Host, args ...string) {
	c.t.Helper()
	must(c.t, h.Signal(c.t.Context(), "caracald", unix.SIGTERM))
	c.startAgent(h, args...)
}

// addNode is what a kubelet does when it begins, and a cloud that wants to be told of the network.
func (c *cluster) addNode(name string, h *lab.Host) {
	c.t.Helper()
	c.Kubectl(fmt.Sprintf(`{apiVersion: v1, kind: Node, metadata: {name: %s, labels: {rack: one}}}`, name), "create", "-f", "-")
	c.Kubectl("", "patch", "node", name, "--subresource=status", "--type=merge", "-p", fmt.Sprintf(
		`{"status": {"addresses": [{"type": "InternalIP", "address": %q}, {"type": "InternalIP", "address": %q}], "conditions": [{"type": "NetworkUnavailable", "status": "True"}]}}`, h.Addr(), h.Addr6()))
}

func (c *cluster) status(h *lab.Host) (s agent.Status) {
	out, err := h.Exec(c.t.Context(), "caracalctl", "node", "status", "-o", "json")
	if err != nil {
		c.t.Fatal(err)
	}
	must(c.t, json.Unmarshal([]byte(out), &s))
	return s
}

// problem waits until an agent has a problem that says all of that.
func (c *cluster) problem(h *lab.Host, about string, says ...string) {
	c.t.Helper()
	eventually(c.t, h.Name+" has a problem with "+about, func() error {
		s := c.status(h)
		for _, p := range s.Problems {
			if p.About == about && !slices.ContainsFunc(says, func(text string) bool { return !strings.Contains(p.Text, text) }) {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.Problems)
	})
}

func (c *cluster) ready(h *lab.Host) {
	c.t.Helper()
	eventually(c.t, h.Name+" is ready", func() error {
		if s := c.status(h); !s.Ready || len(s.Problems) > 0 || len(s.Blocks) == 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// blocks are whose blocks are, as the API has them.
func (c *cluster) blocks(node string) []string {
	c.t.Helper()
	out := c.kubectl("get", "addressblocks", "-o", `jsonpath={range .items[?(@.spec.node=="`+node+`")]}{.spec.cidr} {end}`)
	return strings.Fields(out)
}

// pod makes a Pod that is scheduled to a node, and returns its uid.
func (c *cluster) pod(h *lab.Host, namespace, name, annotations string) string {
	c.t.Helper()
	return c.Kubectl(podText(h, namespace, name, annotations), "create", "-f", "-", "-o", "jsonpath={.metadata.uid}")
}

// pods makes Pods at once, and returns their uids.
func (c *cluster) pods(h *lab.Host, names []string) []string {
	c.t.Helper()
	var text []string
	for _, name := range names {
		text = append(text, podText(h, "default", name, ""))
	}
	return strings.Fields(c.Kubectl(strings.Join(text, "\n---\n"), "create", "-f", "-", "-o", "jsonpath={.metadata.uid} "))
}

func podText(h *lab.Host, namespace, name, annotations string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s, annotations: {%s}}, spec: {nodeName: %s, containers: [{name: c, image: none}]}}`,
		name, namespace, annotations, h.Name)
}

func (c *cluster) deletePod(namespace, name string) {
	c.t.Helper()
	c.kubectl("delete", "pod", name, "-n", namespace, "--grace-period=0", "--force")
}

func in(cidr string, a netip.Addr) bool { return netip.MustParsePrefix(cidr).Contains(a) }

// TestNodes is a node's life: it waits for its Node, follows it, and gives everything back.
func TestNodes(t *testing.T) {
	t.Setenv("CALICO_IPV4POOL_CIDR", "10.244.0.0/16")
	t.Setenv("CALICO_IPV6POOL_CIDR", "2001:db8:244::/48")
	t.Setenv("CALICO_IPV4POOL_BLOCK_SIZE", "28")
	c := newCluster(t)
	for _, h := range c.Hosts() {
		c.startAgent(h)
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *cluster)
	}{
		{"register", testRegister}, {"follow", testFollow}, {"annotations", testAnnotations}, {"leaked", testLeaked}, {"away", testAway},
		{"deleted", testDeleted}, {"renamed", testRenamed}, {"podCIDR", testPodCIDR},
	} {
		if !t.Run(test.name, func(t *testing.T) { test.run(t, &cluster{c.Server, c.Lab, t}) }) {
			return // each begins where the one before ended
		}
	}
}

// Without a Node of its name an agent waits and says so; with one it registers as that says.
func testRegister(t *testing.T, c *cluster) {
	for _, h := range c.Hosts() {
		c.problem(h, "node", h.Name, "Kubernetes has no node of this name", "--hostname-override")
		c.addNode(h.Name, h)
	}
	for _, h := range c.Hosts() {
		c.ready(h)
		uid := c.kubectl("get", "node", h.Name, "-o", "jsonpath={.metadata.uid}")
		want := fmt.Sprintf("%s/24 %s/64 one %s", h.Addr(), h.Addr6(), uid)
		if got := c.kubectl("get", "caracalnode", h.Name, "-o", "jsonpath={.spec.bgp.ipv4Address} {.spec.bgp.ipv6Address} {.metadata.labels.rack} {.metadata.ownerReferences[0].uid}"); got != want {
			t.Errorf("%s: %s, want %s", h.Name, got, want)
		}
		if blocks := c.blocks(h.Name); len(blocks) != 2 {
			t.Errorf("%s has blocks %v", h.Name, blocks)
		}
		eventually(t, "condition NetworkUnavailable is False", func() error {
			if got := c.kubectl("get", "node", h.Name, "-o", `jsonpath={.status.conditions[?(@.type=="NetworkUnavailable")].status} {.status.conditions[?(@.type=="NetworkUnavailable")].reason}`); got != "False CaracalIsUp" {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
	}
	if got := c.kubectl("get", "ippools", "-o", `jsonpath={range .items[*]}{.metadata.name} {.spec.cidr} {.spec.blockSize} {.spec.natOutgoing}, {end}`); got != "default-ipv4-ippool 10.244.0.0/16 28 true, default-ipv6-ippool 2001:db8:244::/48 122 ," {
		t.Errorf("pools: %s", got)
	}
}

// What is changed of a Node changes the agent's resource, and is taken back; what others have set there stays.
func testFollow(t *testing.T, c *cluster) {
	c.kubectl("label", "caracalnode", "h2", "mine=stays")
	c.kubectl("label", "node", "h2", "rack=two", "zone=a", "--overwrite")
	c.kubectl("annotate", "node", "h2", "projectcalico.org/ASNumber=65001", "projectcalico.org/RouteReflectorClusterID=244.0.0.1")
	says := func(want string) {
		t.Helper()
		eventually(t, "the agent's resource says "+want, func() error {
			if got := c.kubectl("get", "caracalnode", "h2", "-o", "jsonpath={.metadata.labels.rack} {.metadata.labels.zone} {.metadata.labels.mine} {.spec.bgp.asNumber} {.spec.bgp.routeReflectorClusterID}"); got != want {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
	}
	says("two a stays 65001 244.0.0.1")
	c.kubectl("annotate", "node", "h2", "projectcalico.org/ASNumber=0", "--overwrite")
	c.problem(c.Host(2), "node", "projectcalico.org/ASNumber", "AS number")
	c.kubectl("annotate", "node", "h2", "projectcalico.org/ASNumber-", "projectcalico.org/RouteReflectorClusterID-")
	c.kubectl("label", "node", "h2", "zone-")
	says("two  stays")
	c.ready(c.Host(2))
}

// Addresses come from the pools that a pod's annotations name, or its namespace's, whether the runtime sends them or not.
func testAnnotations(t *testing.T, c *cluster) {
	h := c.Host(2)
	c.Kubectl(`{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: other}, spec: {cidr: 10.99.0.0/16, blockSize: 28}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, annotations: {cni.projectcalico.org/ipv4pools: '["other"]'}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: bad, annotations: {cni.projectcalico.org/ipv4pools: 'other'}}}
`, "apply", "-f", "-")
	c.problem(h, "resources", "/namespaces/bad", "ipv4pools", "not a JSON list")
	c.kubectl("annotate", "namespace", "bad", "cni.projectcalico.org/ipv4pools-")
	c.ready(h)
	eventually(t, "a block of the other pool", func() error {
		if blocks := c.blocks("h2"); len(blocks) != 3 {
			return fmt.Errorf("%v", blocks)
		}
		return nil
	})
	n := 0
	add := func(namespace, api string, sent map[string]string) (*lab.Pod, error) {
		n++
		name := fmt.Sprint("annotated-", n)
		o := lab.PodOptions{Namespace: namespace, UID: c.pod(h, namespace, name, api)}
		if sent != nil {
			o.Capabilities = map[string]any{annotations: sent}
		}
		p, err := h.AddPod(t.Context(), name, o)
		c.deletePod(namespace, name)
		return p, err
	}
	const pools4 = "cni.projectcalico.org/ipv4pools"
	for _, test := range []struct {
		name, namespace, api string
		sent                 map[string]string
		want, fails          string
	}{
		{"none", "default", "", map[string]string{"a": "b"}, "10.244.0.0/16", ""},
		{"a pool by name", "default", "", map[string]string{pools4: `["other"]`}, "10.99.0.0/16", ""},
		{"a pool by CIDR", "default", "", map[string]string{pools4: `["10.99.0.0/16"]`}, "10.99.0.0/16", ""},
		{"its namespace's", "shop", "", map[string]string{"a": "b"}, "10.99.0.0/16", ""},
		{"its own before its namespace's", "shop", "", map[string]string{pools4: `["default-ipv4-ippool"]`}, "10.244.0.0/16", ""},
		{"a runtime that sends none", "default", pools4 + `: '["other"]'`, nil, "10.99.0.0/16", ""},
		{"no such pool", "default", "", map[string]string{pools4: `["nobody"]`}, "", `"nobody" is none of that family that this node may use`},
		{"the other family's", "default", "", map[string]string{pools4: `["default-ipv6-ippool"]`}, "", "none of that family"},
		{"no list", "default", pools4 + `: other`, nil, "", "not a JSON list"},
		{"without IPAM", "default", "cni.projectcalico.org/ipAddrsNoIpam: '[\"192.0.2.7\"]'", nil, "", "ipAddrsNoIpam is not supported"},
		{"floating", "default", "", map[string]string{"cni.projectcalico.org/floatingIPs": `["192.0.2.7"]`}, "", "floatingIPs is not supported"},
	} {
		p, err := add(test.namespace, test.api, test.sent)
		switch {
		case test.fails != "":
			if err == nil || !strings.Contains(err.Error(), test.fails) {
				t.Errorf("%s: %v, want %q", test.name, err, test.fails)
			}
		case err != nil:
			t.Errorf("%s: %v", test.name, err)
		case !in(test.want, p.Addr()) || !in("2001:db8:244::/48", p.Addr6()):
			t.Errorf("%s: %s and %s, want one of %s", test.name, p.Addr(), p.Addr6(), test.want)
		}
	}
	pods, err := h.Pods()
	must(t, err)
	for _, p := range pods {
		must(t, h.DelPod(t.Context(), p.Name))
	}
	c.kubectl("delete", "ippool", "other") // its block is given back some time later
}

// endpoints are the pods that a host has records of.
func (c *cluster) endpoints(h *lab.Host) []string {
	c.t.Helper()
	out, err := h.Exec(c.t.Context(), "caracalctl", "pods", "-o", "json")
	must(c.t, err)
	var all []struct {
		PodName string `json:"podName"`
	}
	must(c.t, json.Unmarshal([]byte(out), &all))
	var names []string
	for _, e := range all {
		names = append(names, e.PodName)
	}
	slices.Sort(names)
	return names
}

// sent is what a runtime sends of a pod without annotations of ours.
var sent = map[string]any{annotations: map[string]string{"a": "b"}}

// add makes a Pod and adds it; the runtime tells that it has no annotations of ours.
func (c *cluster) add(h *lab.Host, name string) *lab.Pod {
	c.t.Helper()
	p, err := h.AddPod(c.t.Context(), name, lab.PodOptions{UID: c.pod(h, "default", name, ""), Capabilities: sent})
	must(c.t, err)
	return p
}

// settled waits until what the plugin leaves to a later process is done.
func (c *cluster) settled(h *lab.Host) {
	c.t.Helper()
	eventually(c.t, h.Name+" has settled", func() error {
		all, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return err
		}
		for _, path := range all {
			if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), "settle\x00") && strings.Contains(string(text), h.StateDir()) {
				return errors.New(path)
			}
		}
		return nil
	})
}

// The address of a pod comes back that went without a DEL, when Kubernetes has the pod no more; and no other's.
func testLeaked(t *testing.T, c *cluster) {
	ctx, h := t.Context(), c.Host(2)
	left := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("%v are left", want), func() error {
			if got := c.endpoints(h); !slices.Equal(got, want) {
				return fmt.Errorf("%v", got)
			}
			return nil
		})
	}
	leaked, kept, _ := c.add(h, "leaked"), c.add(h, "kept"), c.add(h, "running")
	c.settled(h) // which would remove a pod that is gone by itself
	must(t, leaked.Crash(ctx))
	must(t, kept.Crash(ctx))
	c.deletePod("default", "running")
	c.Stop()
	c.problem(h, "leaked addresses", "has no interface any more", "can't be told")
	left("kept", "leaked", "running")
	c.Restart()
	left("kept", "leaked", "running")
	c.deletePod("default", "leaked")
	left("kept", "running")
	if out, err := os.ReadFile(h.AgentLog()); err != nil || !strings.Contains(string(out), "took back leaked addresses") || !strings.Contains(string(out), leaked.Addr().String()) {
		t.Errorf("the log does not say it: %v", err)
	}
	if out, err := h.Exec(ctx, "curl", "-s", "http://127.0.0.1:9091/metrics"); err != nil || !strings.Contains(out, "caracal_leaked_addresses_total 2\n") {
		t.Errorf("the metrics do not say it: %v", err)
	}
	must(t, h.DelPod(ctx, "running"))
	must(t, h.DelPod(ctx, "kept")) // late
	c.deletePod("default", "kept")
	left()
	c.ready(h)
}

// A node that is drained while the API is away lets go of all addresses, and new pods start.
func testAway(t *testing.T, c *cluster) {
	ctx, h := t.Context(), c.Host(2)
	var names []string
	for i := range 20 { // more than a block has
		names = append(names, fmt.Sprint("drained-", i))
	}
	for i, uid := range c.pods(h, names) {
		_, err := h.AddPod(ctx, names[i], lab.PodOptions{UID: uid, Capabilities: sent})
		must(t, err)
		if i == 8 {
			eventually(t, "another block", func() error {
				if blocks := c.blocks("h2"); len(blocks) < 3 {
					return fmt.Errorf("%v", blocks)
				}
				return nil
			})
		}
	}
	c.Stop()
	for _, name := range names {
		must(t, h.DelPod(ctx, name))
	}
	p, err := h.AddPod(ctx, "away", lab.PodOptions{UID: "unheard-of", Capabilities: sent})
	must(t, err)
	if !in("10.244.0.0/16", p.Addr()) {
		t.Errorf("%s", p.Addr())
	}
	must(t, h.DelPod(ctx, "away"))
	out, err := h.Exec(ctx, "caracalctl", "ipam", "check")
	if err != nil || !strings.Contains(out, "0 endpoints, 0 addresses") {
		t.Errorf("%s: %v", out, err)
	}
	c.Restart()
	c.kubectl(append([]string{"delete", "pods", "--grace-period=0", "--force"}, names...)...)
	c.ready(h)
}

// owners are the uids of the Nodes that a node's blocks and its resource go with.
func (c *cluster) owners(node string) string {
	c.t.Helper()
	out := c.kubectl("get", "caracalnodes,addressblocks", "-o", `jsonpath={range .items[*]}{.metadata.name} {.spec.node} {.metadata.ownerReferences[0].uid}{"\n"}{end}`)
	var uids []string
	for line := range strings.Lines(out) {
		if f := strings.Split(strings.TrimSuffix(line, "\n"), " "); f[0] == node || f[1] == node {
			uids = append(uids, f[2])
		}
	}
	slices.Sort(uids)
	return strings.Join(slices.Compact(uids), " ")
}

// With its Node go a node's blocks, but for those whose addresses its pods have. What comes of that name later has them all again.
func testDeleted(t *testing.T, c *cluster) {
	h := c.Host(2)
	p := c.add(h, "stays")
	var used string
	for _, b := range c.blocks("h2") {
		if in(b, p.Addr()) {
			used = b
		}
	}
	object := strings.NewReplacer("/", "-").Replace(used)
	c.kubectl("delete", "node", "h2")
	c.problem(h, "node", "Kubernetes has no node of this name")
	// What its collector does.
	c.kubectl("delete", "caracalnode", "h2")
	c.kubectl("delete", "addressblock", "--all", "--wait=false")
	eventually(t, "the block with a pod is claimed again", func() error {
		if blocks := c.blocks("h2"); !slices.Contains(blocks, used) {
			return fmt.Errorf("%v, want %s", blocks, used)
		}
		return nil
	})
	if got := c.kubectl("get", "addressblock", object, "-o", "jsonpath={.metadata.ownerReferences}"); got != "" {
		t.Errorf("the block of a node that is not there goes with %s", got)
	}
	if _, err := h.AddPod(t.Context(), "late", lab.PodOptions{}); err == nil {
		t.Error("a node that is not there gives out addresses")
	}
	c.ready(c.Host(1))
	if blocks := c.blocks("h1"); slices.Contains(blocks, used) {
		t.Errorf("h1 has %v", blocks)
	}
	c.addNode(h.Name, h)
	c.ready(h)
	uid := c.kubectl("get", "node", "h2", "-o", "jsonpath={.metadata.uid}")
	eventually(t, "everything goes with the new Node", func() error {
		if got := c.owners("h2"); got != uid {
			return fmt.Errorf("%s, want %s", got, uid)
		}
		return nil
	})
	// Made again at once, without a collector between.
	c.kubectl("delete", "node", "h2")
	c.addNode(h.Name, h)
	uid = c.kubectl("get", "node", "h2", "-o", "jsonpath={.metadata.uid}")
	eventually(t, "everything goes with the third Node", func() error {
		if got := c.owners("h2"); got != uid {
			return fmt.Errorf("%s, want %s", got, uid)
		}
		return nil
	})
	c.ready(h)
}

// A host that has got another name, and one that has got another's, say so and take nothing.
func testRenamed(t *testing.T, c *cluster) {
	h := c.Host(2)
	before := c.blocks("h2")
	c.addNode("h3", h)
	c.restartAgent(h, "--node-name", "h3")
	c.problem(h, "node", "this host was node h2 before", "kubectl delete node h2")
	if got := c.blocks("h3"); len(got) > 0 {
		t.Errorf("h3 has %v", got)
	}
	must(t, h.Signal(t.Context(), "caracald", unix.SIGTERM))
	c.kubectl("delete", "node", "h3")
	other := c.Host(1)
	c.kubectl("delete", "caracalnode", "h1") // else it is the host that was h1 before
	c.restartAgent(other, "--node-name", "h2", "--ip", other.Addr().String()+"/24", "--ip6", other.Addr6().String()+"/64")
	c.problem(other, "node", "another host has it", "kubectl delete node h2")
	c.kubectl("delete", "caracalnode", "h2") // but not its blocks yet
	c.problem(other, "node", "is of an earlier node h2")
	if got := c.blocks("h2"); !slices.Equal(got, before) {
		t.Errorf("blocks %v became %v", before, got)
	}
	c.restartAgent(other)
	c.startAgent(h)
	c.ready(h)
	c.ready(c.Host(1))
}

// A node's blocks are its podCIDRs; what it had before goes when its pods do.
func testPodCIDR(t *testing.T, c *cluster) {
	h := c.Host(2)
	old, err := h.Pod("stays")
	must(t, err)
	c.kubectl("patch", "node", "h2", "-p", `{"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24", "2001:db8:244:7::/64"]}}`)
	c.restartAgent(h, "--ipam", "podcidr")
	c.problem(h, "blocks", "has addresses of pods", "none of the podCIDRs", "kubectl drain h2")
	p := c.add(h, "given")
	if !in("10.244.7.0/24", p.Addr()) || !in("2001:db8:244:7::/64", p.Addr6()) {
		t.Errorf("%s and %s", p.Addr(), p.Addr6())
	}
	if _, err := h.AddPod(t.Context(), "again", lab.PodOptions{IPs: []netip.Addr{old.Addr().Next()}}); err == nil {
		t.Error("a closed block gives out addresses")
	}
	must(t, h.DelPod(t.Context(), "stays"))
	c.deletePod("default", "stays")
	c.ready(h)
	eventually(t, "the blocks are the podCIDRs", func() error {
		if got := c.blocks("h2"); !slices.Equal(got, []string{"10.244.7.0/24", "2001:db8:244:7::/64"}) {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	// One that another node has.
	c.restartAgent(c.Host(1), "--ipam", "podcidr")
	c.problem(c.Host(1), "blocks", "has given node h1 no podCIDR", "--allocate-node-cidrs")
	c.kubectl("patch", "node", "h1", "-p", `{"spec": {"podCIDR": "10.244.7.0/24", "podCIDRs": ["10.244.7.0/24"]}}`)
	c.problem(c.Host(1), "blocks", "podCIDR 10.244.7.0/24", "node h2 has 10.244.7.0/24")
}
