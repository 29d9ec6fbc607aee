//go:build cluster

package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/tests/testenv"
)

// TestLife: a cluster is upgraded, its API goes away, its nodes come and go.
func TestLife(t *testing.T) {
	c := start(t, options{})
	t.Run("Manifests", func(t *testing.T) { testManifests(t, c.with(t)) })
	t.Run("Burst", func(t *testing.T) { testBurst(t, c.with(t)) })
	t.Run("RollingUpdate", func(t *testing.T) { testRollingUpdate(t, c.with(t)) })
	t.Run("APIAway", func(t *testing.T) { testAPIAway(t, c.with(t)) })
	t.Run("Rights", func(t *testing.T) { testRights(t, c.with(t)) })
	t.Run("NodeGoes", func(t *testing.T) { testNodeGoes(t, c.with(t)) })
}

// manifest is the path of deploy/kubernetes, or of a file there.
func manifest(t testing.TB, name string) string {
	t.Helper()
	root, err := testenv.Root()
	must(t, err)
	return filepath.Join(root, "deploy/kubernetes", name)
}

// testManifests: the one file is what the kustomization makes, and applying it again changes nothing.
func testManifests(t *testing.T, c *cluster) {
	text, err := os.ReadFile(manifest(t, "caracal.yaml"))
	must(t, err)
	built := c.kubectl(t.Context(), "kustomize", manifest(t, ""))
	want, got := objects(t, string(text)), objects(t, built)
	if len(want) == 0 || !slices.Equal(want, got) {
		t.Errorf("caracal.yaml has %d objects, kubectl kustomize makes %d, or others: run make generate", len(want), len(got))
	}
	out, err := c.kubectlInput(t.Context(), string(text), "apply", "-f", "-")
	must(t, err)
	for line := range strings.Lines(out) {
		if !strings.HasSuffix(strings.TrimSpace(line), " unchanged") {
			t.Errorf("applied again: %s", line)
		}
	}
}

// objects are the objects of manifests, each as JSON, sorted.
func objects(t testing.TB, manifests string) (all []string) {
	t.Helper()
	for _, text := range regexp.MustCompile(`(?m)^---$`).Split(manifests, -1) {
		var object any
		must(t, yaml.Unmarshal([]byte(text), &object))
		if object == nil {
			continue
		}
		j, err := json.Marshal(object)
		must(t, err)
		all = append(all, string(j))
	}
	slices.Sort(all)
	return all
}

// testBurst: a node gets 50 pods at once. How long its part of a pod's start takes is in the plugin's log.
func testBurst(t *testing.T, c *cluster) {
	const count = 50
	c.namespace("burst", "")
	var all strings.Builder
	for i := range count {
		all.WriteString(strings.ReplaceAll(server("burst", fmt.Sprintf("p%d", i), "n1", "app: burst"), "netexec, --http-port=8080, --udp-port=8081", "pause"))
	}
	n := c.machine("n1")
	for i := range 7 {
		c.apply(strings.ReplaceAll(server("burst", fmt.Sprintf("single%d", i), "n1", ""), "netexec, --http-port=8080, --udp-port=8081", "pause"))
		c.pod("burst", fmt.Sprintf("single%d", i))
	}
	took := n.adds()
	t.Logf("a pod alone: ADDs of %v ms, %.1f at the median", took, took[len(took)/2])
	c.kubectl(t.Context(), "-n", "burst", "delete", "pods", "--all")
	begin := time.Now()
	c.apply(all.String())
	c.kubectl(t.Context(), "-n", "burst", "wait", "--for=condition=Ready", "pods", "--all", "--timeout=180s")
	t.Logf("%d pods at once on a node are ready after %v", count, time.Since(begin).Round(100*time.Millisecond))
	addrs := strings.Fields(c.kubectl(t.Context(), "-n", "burst", "get", "pods", "-o", "jsonpath={.items[*].status.podIP}"))
	slices.Sort(addrs)
	if len(slices.Compact(addrs)) != count {
		t.Errorf("%d pods have %d addresses", count, len(slices.Compact(addrs)))
	}
	if took = n.adds(); len(took) < count {
		t.Errorf("the plugin's log has %d ADDs:\n%s", len(took), n.sh("tail -n 5 /var/log/caracal/cni.log"))
	} else {
		t.Logf("%d ADDs: %.1f ms at the median, %.1f at 90 %%, %.1f at most", len(took), took[len(took)/2], took[len(took)*9/10], took[len(took)-1])
	}
	c.kubectl(t.Context(), "delete", "namespace", "burst", "--wait=true", "--timeout=120s")
	eventually(t, "nothing is left of them", func() error {
		out, err := n.Sh(t.Context(), "caracalctl ipam check; caracalctl pods -o json")
		if err == nil && strings.Contains(out, "burst") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

// adds are how long the plugin's ADDs took on a node, milliseconds, sorted, by its log.
func (n *node) adds() (took []float64) {
	n.t.Helper()
	for _, m := range regexp.MustCompile(`(?m)^.*command=ADD.*duration_ms=([0-9.]+)`).FindAllStringSubmatch(n.sh("cat /var/log/caracal/cni.log"), -1) {
		ms, err := strconv.ParseFloat(m[1], 64)
		must(n.t, err)
		took = append(took, ms)
	}
	slices.Sort(took)
	return took
}

// pair makes three pods, of which two are on one node.
func (c *cluster) pair(namespace string) (near, server1, far *pod) {
	c.t.Helper()
	c.namespace(namespace, "")
	c.apply(server(namespace, "near", "n1", "") + server(namespace, "server", "n1", "app: server") + server(namespace, "far", "n2", ""))
	return c.pod(namespace, "near"), c.pod(namespace, "server"), c.pod(namespace, "far")
}

// testRollingUpdate: while the DaemonSet's pods are replaced no packet is lost, within a node and between two, under a policy.
func testRollingUpdate(t *testing.T, c *cluster) {
	near, to, far := c.pair("update")
	c.apply(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: update, name: allow}
spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {}}]}]}
`)
	answers(t, near, to.addrs[0], 8080, "server")
	all := []*traffic{talk(t, near, to), talk(t, far, to)}
	before := c.kubectl(t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "-o", "name")
	c.kubectl(t.Context(), "-n", "kube-system", "rollout", "restart", "daemonset/caracal-node")
	c.kubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/caracal-node", "--timeout=120s")
	after := c.kubectl(t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "-o", "name")
	for p := range strings.FieldsSeq(before) {
		if strings.Contains(after, p) {
			t.Errorf("%s was not replaced", p)
		}
	}
	for p := range strings.FieldsSeq(after) { // as of another build
		c.kubectl(t.Context(), "-n", "kube-system", "exec", p, "-c", "agent", "--", "caracalctl", "upgrade", "--force")
	}
	for _, tr := range all {
		tr.unharmed(t)
	}
	for _, n := range c.nodes {
		n.sh("caracalctl ipam check") // no interface has the former programs
	}
	c.kubectl(t.Context(), "delete", "namespace", "update", "--wait=false")
}

// testAPIAway: without the API server pods go on, and so does one whose container starts anew; an agent that restarts as well.
func testAPIAway(t *testing.T, c *cluster) {
	near, to, far := c.pair("away")
	all := []*traffic{talk(t, near, to), talk(t, far, to)}
	c.control.stop("kube-apiserver")
	t.Cleanup(func() {
		if t.Failed() {
			c.control.startAPI()
		}
	})
	n := c.machine("n1")
	// The whole pod anew: its sandbox is gone, and the kubelet makes another.
	id := n.sh(`caracalctl pods -o json 2>/dev/null | tr -d ' ",' | awk -F: '/^containerID/ {id=$2} /^podName:near$/ {print id}' | tail -n 1`)
	n.sh("ctr -n k8s.io tasks kill -s KILL " + id)
	eventually(t, "the pod has another sandbox, and an address", func() error {
		out, err := n.Sh(t.Context(), `caracalctl pods -o json 2>/dev/null`)
		if err != nil {
			return err
		}
		var recorded []struct{ ContainerID, PodName, PodNamespace, Netns string }
		if err := json.Unmarshal([]byte(out), &recorded); err != nil {
			return err
		}
		for _, r := range recorded {
			if r.PodNamespace == "away" && r.PodName == "near" && r.ContainerID != id {
				near.netns = r.Netns
				return nil
			}
		}
		return fmt.Errorf("%s", out)
	})
	answers(t, near, to.addrs[0], 8080, "server")
	answers(t, near, far.addrs[0], 8080, "far")
	// An agent that is restarted goes on by what it heard last: else the other node forgets this one's routes after two minutes.
	before := n.sh("pgrep -x caracald")
	n.sh("pkill -KILL -x caracald")
	eventually(t, "n1 announces its pods again", func() error {
		if now, err := n.Sh(t.Context(), "pgrep -x caracald"); err != nil || strings.TrimSpace(now) == before {
			return fmt.Errorf("no new agent: %s: %v", now, err)
		}
		out, err := n.Sh(t.Context(), "caracalctl node status")
		if err == nil && !strings.Contains(out, "Established") {
			err = errors.New(out)
		}
		return err
	})
	all[1].unharmed(t)
	c.control.startAPI()
	c.ready()
	c.kubectl(t.Context(), "delete", "namespace", "away", "--wait=false")
}

// testRights: a right that the agent lacks is named, where an operator looks.
func testRights(t *testing.T, c *cluster) {
	role := c.kubectl(t.Context(), "get", "clusterrole", "caracal-node", "-o", "json")
	var object map[string]any
	must(t, json.Unmarshal([]byte(role), &object))
	var rules []any
	for _, r := range object["rules"].([]any) {
		if groups := r.(map[string]any)["apiGroups"].([]any); groups[0] != "networking.k8s.io" {
			rules = append(rules, r)
		}
	}
	object["rules"] = rules
	delete(object, "metadata")
	object["metadata"] = map[string]any{"name": "caracal-node"}
	narrow, err := json.Marshal(object)
	must(t, err)
	_, err = c.kubectlInput(t.Context(), string(narrow), "replace", "-f", "-")
	must(t, err)
	pods := strings.Fields(c.kubectl(t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "-o", "name"))
	c.kubectl(t.Context(), append([]string{"-n", "kube-system", "delete"}, pods...)...)
	n := c.machine("n1")
	says := func(text string) error {
		if !strings.Contains(text, "networkpolicies") || !regexp.MustCompile(`\b(list|watch)\b`).MatchString(text) {
			return fmt.Errorf("the right is not named: %s", text)
		}
		return nil
	}
	eventually(t, "readiness names the right", func() error {
		out, err := n.Sh(t.Context(), "curl -sS --max-time 3 http://127.0.0.1:9099/readiness")
		if err != nil {
			return err
		}
		return says(out)
	})
	eventually(t, "the log names the right", func() error {
		out, err := c.tryKubectl(t.Context(), "-n", "kube-system", "logs", "-l", "app.kubernetes.io/name=caracal", "-c", "agent", "--tail=-1")
		if err != nil {
			return err
		}
		return says(out)
	})
	eventually(t, "doctor names the right", func() error {
		pod, err := c.tryKubectl(t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "--field-selector=spec.nodeName=n1,status.phase=Running", "-o", "name")
		if err != nil {
			return err
		}
		out, _ := c.tryKubectl(t.Context(), "-n", "kube-system", "exec", pod, "-c", "agent", "--", "caracalctl", "doctor") // it has found something
		return says(out)
	})
	text, err := os.ReadFile(manifest(t, "rbac.yaml"))
	must(t, err)
	c.apply(string(text))
	c.kubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/caracal-node", "--timeout=120s")
}

// testNodeGoes: a node is drained and deleted, which gives its blocks back, and comes again.
func testNodeGoes(t *testing.T, c *cluster) {
	c.namespace("goes", "")
	c.apply(server("goes", "web", "n2", ""))
	c.pod("goes", "web")
	blocks := func() string {
		return c.kubectl(t.Context(), "get", "addressblocks", "-o", `jsonpath={range .items[?(@.spec.node=="n2")]}{.spec.cidr}{" "}{end}`)
	}
	if blocks() == "" {
		t.Error("n2 has no block")
	}
	c.kubectl(t.Context(), "drain", "n2", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=90s")
	// Its kubelet is off, or would register it again at once, and so is its agent.
	n := c.machine("n2")
	must(t, n.Signal(t.Context(), "kubelet", unix.SIGKILL))
	n.killPods()
	c.kubectl(t.Context(), "delete", "node", "n2")
	eventually(t, "the node's blocks are given back", func() error {
		if b := blocks(); b != "" {
			return fmt.Errorf("it has %s", b)
		}
		return nil
	})
	n.startKubelet()
	c.ready()
	c.apply(server("goes", "again", "n2", ""))
	c.pod("goes", "again")
	eventually(t, "n2 has a block when it is there again", func() error {
		if blocks() == "" {
			return errors.New("none")
		}
		return nil
	})
	c.kubectl(t.Context(), "delete", "namespace", "goes", "--wait=false")
}
