//go:build cluster

package kubernetes

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestMigrateFromFlannel turns a cluster of flannel's into one of Caracal's, by the commands of docs/kubernetes.md.
func TestMigrateFromFlannel(t *testing.T) {
	for _, backend := range []string{"vxlan", "host-gw"} {
		t.Run(backend, func(t *testing.T) { migrateFromFlannel(t, backend) })
	}
}

func migrateFromFlannel(t *testing.T, backend string) {
	built, err := builtBy("flannel", "tools/flannel/agent/go.mod", "github.com/flannel-io/flannel", "kube-flannel.yml")
	if err != nil {
		lab.Skip(t, "needs flannel (.ci/flannel builds it): "+err.Error())
	}
	c := start(t, options{bare: true, podCIDR: true})
	before := make([]string, len(c.nodes))
	for i, n := range c.nodes {
		n.sh("cp /usr/lib/cni/bridge /usr/lib/cni/host-local /opt/cni/bin/")
		before[i] = n.ofFlannel()
	}
	c.flannel(built, backend)
	c.ready()
	c.workload()
	for i, n := range c.nodes {
		if of := n.ofFlannel(); of == before[i] || backend == "vxlan" && !strings.Contains(of, "flannel.1") {
			t.Errorf("%s has nothing of flannel's:\n%s", n.name, of)
		}
	}
	near, far := c.each("n1"), c.each("n2")
	answers(t, near, far.addrs[0], 8080, far.name)
	answers(t, far, near.addrs[0], 8080, near.name)
	far.hears(near.addrs[0])
	begin := time.Now()

	page.Run(t, "../../docs/kubernetes.md", c.shells(), "Migrate from flannel")

	cut := far.heard()
	c.migrated()
	t.Logf("%v after the first command pods of different nodes no longer reached each other, %v later the last new one was ready", cut.Sub(begin), c.lastReady().Sub(cut))
	for i, n := range c.nodes {
		if after := n.ofFlannel(); after != before[i] {
			t.Errorf("left of flannel on %s:\n%s\nbefore it came:\n%s", n.name, after, before[i])
		}
	}
}

// flannel installs it by its own manifest. Its image has no iptables: the node's is used.
func (c *cluster) flannel(built, backend string) {
	c.t.Helper()
	const ref = "localhost/flannel:test"
	links := map[string]string{"/lib": "usr/lib", "/lib64": "usr/lib64"}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, name := range []string{family, family + "-save", family + "-restore"} {
			links["/sbin/"+name] = "/usr/sbin/xtables-nft-multi"
		}
	}
	archive := image.Write(c.t, c.t.TempDir(), image.Image{Ref: ref, Shell: true, Dirs: []string{"/usr", "/sbin", "/opt", "/opt/bin"}, Env: []string{"PATH=/bin:/sbin"}, Links: links,
		Files: map[string]string{"/opt/bin/flanneld": filepath.Join(built, "flanneld"), "/flannel": filepath.Join(built, "flannel")}})
	text, err := os.ReadFile(archive)
	must(c.t, err)
	for _, n := range c.nodes {
		n.write("/root/flannel.tar", string(text))
		n.sh("ctr -n k8s.io images import /root/flannel.tar; rm /root/flannel.tar")
	}
	text, err = os.ReadFile(filepath.Join(built, "kube-flannel.yml"))
	must(c.t, err)
	manifest := regexp.MustCompile("image: ghcr.io/.*").ReplaceAllString(string(text), "image: "+ref)
	for old, new := range map[string]string{
		`"Type": "vxlan"`: fmt.Sprintf(`"Type": %q`, backend),
		"        volumeMounts:\n        - name: run\n": "        volumeMounts:\n        - {name: usr, mountPath: /usr, readOnly: true}\n        - name: run\n",
		"      volumes:\n": "      volumes:\n      - {name: usr, hostPath: {path: /usr}}\n",
	} {
		if strings.Count(manifest, old) != 1 {
			c.t.Fatalf("flannel's manifest has not one %q", old)
		}
		manifest = strings.Replace(manifest, old, new, 1)
	}
	c.apply(manifest)
}

// ofFlannel is what there may be of flannel's on a node, and of the pods that it attached.
func (n *node) ofFlannel() string {
	n.t.Helper()
	return n.sh(`ls -d /etc/cni/net.d/*flannel* /opt/cni/bin/flannel /run/flannel /var/lib/cni/flannel /var/lib/cni/networks/cbr0 /var/lib/cni/results/cbr0-* 2>/dev/null
ip -o link show type vxlan | cut -d: -f2; ip -o link show type bridge | cut -d: -f2; ip route show proto boot; ip route show dev cni0 2>/dev/null
iptables-save 2>/dev/null | grep -i flannel || true`)
}

// workload makes pods in the default namespace that restart elsewhere, and one on each node that does not.
func (c *cluster) workload() {
	c.t.Helper()
	for _, kind := range []string{"Deployment", "DaemonSet"} {
		name, replicas := "each", ""
		if kind == "Deployment" {
			name, replicas = "web", "  replicas: 4\n"
		}
		c.apply(fmt.Sprintf(`apiVersion: apps/v1
kind: %s
metadata: {name: %s}
spec:
%s  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: main, image: %[4]q, args: [netexec, --http-port=8080]}]
`, kind, name, replicas, agnhost))
		c.kubectl(c.t.Context(), "rollout", "status", kind+"/"+name, "--timeout=90s")
	}
}

// each finds the workload's pod of a node that is of its DaemonSet.
func (c *cluster) each(node string) *pod { return c.of("app=each", node)[0] }

// replicas are its others.
func (c *cluster) replicas(node string) []*pod { return c.of("app=web", node) }

// of finds pods of a node by their labels, of whatever network.
func (c *cluster) of(labels, node string) (all []*pod) {
	c.t.Helper()
	pods, err := get[struct {
		Items []struct {
			Metadata struct {
				Name              string
				DeletionTimestamp *string
			}
			Status struct{ PodIP string }
		}
	}](c, "pods", "-l", labels, "--field-selector", "spec.nodeName="+node)
	must(c.t, err)
	for _, i := range pods.Items {
		if i.Metadata.DeletionTimestamp == nil {
			all = append(all, c.attached(node, i.Metadata.Name, i.Status.PodIP))
		}
	}
	if len(all) == 0 {
		c.t.Fatalf("no pods %s on %s", labels, node)
	}
	return all
}

// migrated makes sure that all of the workload's pods are Caracal's and reach each other, and that nothing is wrong with it.
func (c *cluster) migrated() {
	c.t.Helper()
	c.kubectl(c.t.Context(), "rollout", "status", "deployment/web", "--timeout=60s")
	c.kubectl(c.t.Context(), "wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s") // those of the DaemonSet may be the same as before
	near, far := c.each("n1"), c.each("n2")
	answers(c.t, near, far.addrs[0], 8080, far.name)
	answers(c.t, far, near.addrs[0], 8080, near.name)
	pods := strings.Fields(c.kubectl(c.t.Context(), "get", "pods", "-o", "jsonpath={.items[*].metadata.name}"))
	for _, name := range pods {
		c.pod("default", name) // of Caracal's
	}
	if len(pods) != 6 {
		c.t.Errorf("pods %v, want 6", pods)
	}
	agents := strings.Fields(c.kubectl(c.t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "-o", "jsonpath={.items[*].metadata.name}"))
	for _, agent := range agents {
		out, err := c.tryKubectl(c.t.Context(), "-n", "kube-system", "exec", agent, "-c", "agent", "--", "caracalctl", "doctor")
		if !strings.Contains(out, "knows all kinds, allows this node all that it does, and has it") || strings.Contains(out, "FAIL") {
			c.t.Errorf("doctor in %s: %v\n%s", agent, err, out)
		}
	}
}

// lastReady is when the workload's last pod became ready.
func (c *cluster) lastReady() (last time.Time) {
	c.t.Helper()
	out := c.kubectl(c.t.Context(), "get", "pods", "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].lastTransitionTime}`)
	for text := range strings.FieldsSeq(out) {
		ready, err := time.Parse(time.RFC3339, text)
		must(c.t, err)
		if ready.After(last) {
			last = ready
		}
	}
	return last
}

// hears begins to ask an address from the pod for answers; heard tells when the last one came.
func (p *pod) hears(from fmt.Stringer) {
	p.node.t.Helper()
	must(p.node.t, p.node.StartDaemon("ping-"+p.name, "nsenter", "--net="+p.netns, "ping", "-D", "-n", "-i", "0.2", from.String()))
}

func (p *pod) heard() (last time.Time) {
	p.node.t.Helper()
	must(p.node.t, p.node.Signal(p.node.t.Context(), "ping-"+p.name, unix.SIGKILL))
	for _, m := range regexp.MustCompile(`(?m)^\[([0-9.]+)\] .*bytes from`).FindAllStringSubmatch(p.node.sh("cat /var/log/ping-"+p.name+".log"), -1) {
		seconds, err := strconv.ParseFloat(m[1], 64)
		must(p.node.t, err)
		last = time.UnixMicro(int64(seconds * 1e6))
	}
	return last
}
