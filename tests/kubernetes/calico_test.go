//go:build cluster

package kubernetes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestMigrateFromCalico turns a cluster of Calico's into one of Caracal's, by the commands of docs/kubernetes.md: its pods start
// anew, or go on.
func TestMigrateFromCalico(t *testing.T) {
	t.Run("Restart", func(t *testing.T) {
		c := calicoCluster(t)
		page.Run(t, "../../docs/kubernetes.md", c.rebootingShells(), "Migrate from Calico")
		c.migrated()
		c.judged()
		for _, n := range c.nodes {
			if left := n.sh("ls /etc/cni/net.d | grep calico; ip route show proto bird; iptables-save 2>/dev/null | grep cali- || true"); left != "" {
				t.Errorf("left of Calico on %s:\n%s", n.name, left)
			}
		}
	})
	t.Run("Running", func(t *testing.T) {
		c := calicoCluster(t)
		near, far := c.each("n1"), c.each("n2")
		web := append(c.replicas("n1"), c.replicas("n2")...)
		talks := []*traffic{talk(t, near, web[0]), talk(t, near, web[len(web)-1]), talk(t, far, web[0])}
		admin, err := os.ReadFile(c.control.path("admin.kubeconfig"))
		must(t, err)
		for _, n := range c.nodes {
			n.write("/root/admin.conf", string(admin))
			n.sh("ln -s /root/caracal/caracal /root/caracal/caracald /usr/local/bin/")
		}
		page.Run(t, "../../docs/kubernetes.md", c.shells(), "Migrate from Calico with its pods running")
		for _, tr := range talks {
			tr.end()
			sent, answered := tr.sent[0].Load(), tr.answered[0].Load()
			t.Logf("%s: %d datagrams sent, %d answered; %d rounds of TCP", tr.name, sent, answered, tr.answered[1].Load())
			if lost := time.Duration(sent-answered) * every; lost > time.Second {
				t.Errorf("%s: what was sent in %v was lost", tr.name, lost)
			}
			if b := tr.broken.Load(); b != nil {
				t.Errorf("%s: the connection broke: %s", tr.name, *b)
			}
		}
		c.migrated()
		c.judged()
		for _, p := range append(web, near, far) { // not one of them is another
			c.kubectl(t.Context(), "get", "pod", p.name)
		}
		// They go, and others come.
		c.kubectl(t.Context(), "rollout", "restart", "deployment/web", "daemonset/each")
		c.kubectl(t.Context(), "rollout", "status", "daemonset/each", "--timeout=60s")
		c.migrated()
		for _, n := range c.nodes {
			eventually(t, "nothing is left of Calico's pods on "+n.name, func() error {
				out, err := n.Sh(t.Context(), "caracalctl pods -o json 2>/dev/null")
				for _, p := range append(web, near, far) {
					if err == nil && strings.Contains(out, p.name) {
						err = fmt.Errorf("%s is there:\n%s", p.name, out)
					}
				}
				return err
			})
		}
	})
}

// calicoCluster starts a cluster with Calico: its definitions, rights and configuration as its manifest has them, its plugin with
// its datastore in the API, and the real BIRD. Its agent, which can't be built, would add to that the firewall, of which a little is made here.
func calicoCluster(t *testing.T) *cluster {
	testenv.NeedProgram(t, "bird", "bird2")
	built, err := builtBy("calico", "tools/calico/go.mod", "github.com/projectcalico/calico", "calico.yaml")
	if err != nil {
		lab.Skip(t, "needs Calico (.ci/calico builds it): "+err.Error())
	}
	c := start(t, options{bare: true})
	text, err := os.ReadFile(filepath.Join(built, "calico.yaml"))
	must(t, err)
	var manifests []string
	for _, m := range strings.Split(string(text), "\n---\n") {
		if !regexp.MustCompile(`(?m)^kind: (DaemonSet|Deployment|PodDisruptionBudget)$`).MatchString(m) {
			manifests = append(manifests, m)
		}
	}
	_, err = c.kubectlInput(t.Context(), strings.Join(manifests, "\n---\n"), "apply", "--server-side", "-f", "-")
	must(t, err)
	c.kubectl(t.Context(), "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
	c.apply(`apiVersion: crd.projectcalico.org/v1
kind: ClusterInformation
metadata: {name: default}
spec: {clusterGUID: 0123456789abcdef0123456789abcdef, clusterType: "k8s,bgp,kdd", calicoVersion: v3.28.5, datastoreReady: true}
---
apiVersion: crd.projectcalico.org/v1
kind: IPPool
metadata: {name: default-ipv4-ippool}
spec: {cidr: ` + pods4 + `, blockSize: 26, ipipMode: Never, vxlanMode: Never, natOutgoing: true, nodeSelector: all(), allowedUses: [Workload, Tunnel]}
---
apiVersion: crd.projectcalico.org/v1
kind: FelixConfiguration
metadata: {name: default}
spec: {bpfConnectTimeLoadBalancing: TCP, logSeverityScreen: Info}
---
apiVersion: crd.projectcalico.org/v1
kind: GlobalNetworkPolicy
metadata: {name: default.web}
spec:
  selector: app == "web"
  types: [Ingress]
  ingress: [{action: Allow, source: {selector: app == "each"}}]
`)
	config := c.kubectl(t.Context(), "-n", "kube-system", "get", "configmap", "calico-config", "-o", `jsonpath={.data.cni_network_config}`)
	kubeconfig, err := os.ReadFile(c.control.config("calico", "system:serviceaccount:kube-system:calico-cni-plugin"))
	must(t, err)
	program, err := os.ReadFile(filepath.Join(built, "calico"))
	must(t, err)
	for _, n := range c.nodes {
		n.sh("mkdir -p /var/lib/calico /etc/cni/net.d; sysctl -q -w net.ipv4.ip_forward=1")
		for _, name := range []string{"calico", "calico-ipam"} {
			n.write("/opt/cni/bin/"+name, string(program))
		}
		n.sh("chmod +x /opt/cni/bin/calico*")
		n.write("/var/lib/calico/nodename", n.name)
		n.write("/etc/cni/net.d/calico-kubeconfig", string(kubeconfig))
		n.write("/etc/cni/net.d/10-calico.conflist", strings.NewReplacer("__KUBERNETES_NODE_NAME__", n.name, "__CNI_MTU__", "0",
			"__KUBECONFIG_FILEPATH__", "/etc/cni/net.d/calico-kubeconfig").Replace(config))
		n.sh(`iptables -N cali-FORWARD; iptables -A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
iptables -t nat -N cali-nat-outgoing; iptables -t nat -A POSTROUTING -m comment --comment "cali:O3lYWMrLQYEMJtB5" -j cali-nat-outgoing
iptables -t nat -A cali-nat-outgoing -s ` + pods4 + ` ! -d ` + pods4 + ` -j MASQUERADE`)
	}
	c.ready()
	c.workload()
	c.bird()
	near, far := c.each("n1"), c.each("n2")
	answers(t, near, far.addrs[0], 8080, far.name)
	answers(t, far, near.addrs[0], 8080, near.name)
	return c
}

// bird runs Calico's routing daemon as its DaemonSet does, configured as its agent configures it: its first process ends at once when
// it is told to, as runsvdir does, and BIRD is killed. It is the node's own program.
func (c *cluster) bird() {
	c.t.Helper()
	const ref = "localhost/calico-node:test"
	archive, err := os.ReadFile(image.Write(c.t, c.t.TempDir(), image.Image{Ref: ref, Shell: true, Env: []string{"PATH=/bin"}, Dirs: []string{"/usr"}, Links: map[string]string{"/lib": "usr/lib", "/lib64": "usr/lib64"}}))
	must(c.t, err)
	for i, n := range c.nodes {
		block := c.kubectl(c.t.Context(), "get", "blockaffinities.crd.projectcalico.org", "-o", `jsonpath={.items[?(@.spec.node=="`+n.name+`")].spec.cidr}`)
		other := c.nodes[1-i]
		passive := map[int]string{0: "passive on; "}[i] // the mesh is unidirectional: the other one calls
		n.write("/etc/bird.conf", fmt.Sprintf(`router id %[1]s;
protocol device {}
protocol kernel { learn; persist; graceful restart; metric 0; ipv4 { import all; export all; }; }
protocol static { ipv4; route %[2]s blackhole; }
protocol bgp Mesh {
  local %[1]s as 64512; neighbor %[3]s as 64512; direct; %[4]s
  hold time 90; connect delay time 2; connect retry time 5; error wait time 2, 5;
  ipv4 { import all; export where net ~ %[5]s && net.len = 26; next hop self; gateway direct; };
  graceful restart;
}
`, n.Addr(), block, other.Addr(), passive, pods4))
		n.write("/root/image.tar", string(archive))
		n.sh("ctr -n k8s.io images import /root/image.tar; rm /root/image.tar")
	}
	c.apply(`apiVersion: apps/v1
kind: DaemonSet
metadata: {name: calico-node, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: calico-node}}
  template:
    metadata: {labels: {k8s-app: calico-node}}
    spec:
      hostNetwork: true
      serviceAccountName: calico-node
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      containers:
      - name: calico-node
        image: ` + ref + `
        command: [sh, -c, "trap 'exit 0' TERM; /usr/sbin/bird -f -c /etc/bird.conf -s /tmp/bird.ctl -P /tmp/bird.pid & wait"]
        securityContext: {privileged: true}
        volumeMounts: [{name: usr, mountPath: /usr, readOnly: true}, {name: config, mountPath: /etc/bird.conf}]
      volumes: [{name: usr, hostPath: {path: /usr}}, {name: config, hostPath: {path: /etc/bird.conf}}]
`)
	c.kubectl(c.t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/calico-node", "--timeout=60s")
}

// judged makes sure that the policy which was Calico's is in force.
func (c *cluster) judged() {
	c.t.Helper()
	near, web := c.each("n1"), append(c.webs("n1"), c.webs("n2")...)
	for _, w := range web {
		answers(c.t, near, w.addrs[0], 8080, w.name)
	}
	for _, w := range web[1:] {
		refused(c.t, web[0], w.addrs[0], 8080)
	}
}

// webs are the Deployment's pods of a node, of which there may be none.
func (c *cluster) webs(node string) []*pod {
	c.t.Helper()
	if c.kubectl(c.t.Context(), "get", "pods", "-l", "app=web", "--field-selector", "spec.nodeName="+node, "-o", "name") == "" {
		return nil
	}
	return c.replicas(node)
}

// rebootingShells are shells of which those on nodes know the command reboot.
func (c *cluster) rebootingShells() map[string]page.Shell {
	shells := c.shells()
	for i := range c.nodes {
		n := c.nodes[i]
		shells[n.name] = func(ctx context.Context, script string) (string, error) {
			if script != "reboot" {
				return n.Sh(ctx, script)
			}
			n.stop()
			n.reboot()
			return "", nil
		}
	}
	return shells
}
