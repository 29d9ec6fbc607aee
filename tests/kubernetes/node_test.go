//go:build cluster

package kubernetes

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

const (
	containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pause + `"
  # Root of a virtual machine may lack CAP_SYS_RESOURCE, and can't lower the pause container's oom_score_adj then.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
`
	kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: /etc/kubernetes/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
failCgroupV1: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDomain: cluster.local
clusterDNS: [` + dns + `]
resolvConf: /etc/resolv.conf
volumePluginDir: /var/lib/kubelet/volumeplugins
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}
`
	proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: MODE
clusterCIDR: PODS
hostnameOverride: NODE
clientConnection: {kubeconfig: /etc/kubernetes/proxy.kubeconfig}
# The machine's first network namespace alone has these settings.
conntrack: {maxPerCore: 0, min: 0, tcpCloseWaitTimeout: 0s, tcpEstablishedTimeout: 0s}
`
)

// sysctls are the whole machine's, which a kubelet sets: it sees its values, and the machine keeps its own.
var sysctls = map[string]string{"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000"}

// node is a machine with Debian's containerd, a kubelet and a kube-proxy.
type node struct {
	*lab.Machine
	t       testing.TB
	name    string // as Kubernetes has it
	cluster *cluster
}

// boot starts the node's machine with all that a node has, without a network.
func (c *cluster) boot(h *lab.Host, name string) *node {
	c.t.Helper()
	n := &node{t: c.t, name: name, cluster: c}
	n.realBoot(h)
	machine, err := h.Boot(c.t.Context())
	must(c.t, err)
	n.Machine = machine
	n.sh("mkdir -p /etc/kubernetes /etc/containerd /opt/cni/bin && cp /usr/lib/cni/loopback /usr/lib/cni/portmap /usr/lib/cni/bandwidth /opt/cni/bin/ && ln -s /root/caracal/caracald /usr/local/bin/caracalctl")
	ca, err := os.ReadFile(c.control.pki.path("ca.crt"))
	must(c.t, err)
	n.write("/etc/kubernetes/ca.crt", string(ca))
	n.write("/etc/kubernetes/kubelet.kubeconfig", c.control.pki.kubeconfig(c.control.url(), name, "system:node:"+name, "system:nodes"))
	proxy, err := os.ReadFile(c.control.path("proxy.kubeconfig"))
	must(c.t, err)
	n.write("/etc/kubernetes/proxy.kubeconfig", string(proxy))
	n.write("/etc/containerd/config.toml", containerdConfig)
	n.write("/etc/kubernetes/kubelet.yaml", kubeletConfig)
	n.write("/etc/kubernetes/proxy.yaml", strings.NewReplacer("MODE", c.options.proxy, "PODS", c.control.pods(), "NODE", name).Replace(proxyConfig))
	n.start()
	return n
}

// realBoot gives a host the real machine's boot id, which a pod's /proc has: the plugin on the machine is to see the same.
func (n *node) realBoot(h *lab.Host) {
	n.t.Helper()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	must(n.t, err)
	must(n.t, os.WriteFile(h.BootIDFile(), id, 0o644))
}

// start starts the daemons.
func (n *node) start() {
	n.t.Helper()
	n.sh("hostname " + n.name)
	n.sh("mkdir -p /run/sysctls")
	for name, value := range sysctls {
		n.sh(fmt.Sprintf("f=/run/sysctls/%s; echo %s >$f; mount --bind $f /proc/sys/%s", strings.ReplaceAll(name, "/", "."), value, name))
	}
	must(n.t, n.StartDaemon("containerd", "containerd"))
	eventually(n.t, "containerd of "+n.name+" answers", func() error {
		_, err := n.Sh(n.t.Context(), "ctr version")
		return err
	})
	n.sh("for i in /root/caracal/images/*.tar; do ctr -n k8s.io images import $i; done")
	n.startKubelet()
	must(n.t, n.StartDaemon("kube-proxy", "/root/caracal/kube-proxy", "--config", "/etc/kubernetes/proxy.yaml", "--v=2"))
}

// startKubelet starts the kubelet, again after its end.
func (n *node) startKubelet() {
	n.t.Helper()
	ip := n.Addr().String()
	if n.cluster.options.dualStack {
		ip += "," + n.Addr6().String()
	}
	must(n.t, n.StartDaemon("kubelet", "/root/caracal/kubelet", "--config", "/etc/kubernetes/kubelet.yaml", "--kubeconfig", "/etc/kubernetes/kubelet.kubeconfig",
		"--hostname-override", n.name, "--node-ip", ip, "--v=2"))
}

// stop ends the node's daemons and then all of its pods, so that no control group is busy when the machine goes.
func (n *node) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, d := range []string{"kubelet", "kube-proxy"} {
		_ = n.Signal(ctx, d, unix.SIGKILL) // it may have ended
	}
	_, _ = n.Sh(ctx, killPods)
}

const killPods = "ctr -n k8s.io tasks ls -q | xargs -r -n1 ctr -n k8s.io tasks kill -s KILL || true" // one may be gone

// killPods ends all pods, as a crash does.
func (n *node) killPods() {
	n.t.Helper()
	n.sh(killPods)
}

// sh runs a script on the machine that must succeed, and returns its output.
func (n *node) sh(script string) string {
	n.t.Helper()
	out, err := n.Sh(n.t.Context(), script)
	must(n.t, err)
	return strings.TrimSpace(out)
}

func (n *node) write(path, text string) {
	n.t.Helper()
	must(n.t, os.WriteFile(n.Path(path), []byte(text), 0o644))
}

// dump logs the ends of the daemons' logs.
func (n *node) dump() {
	for _, d := range []string{"kubelet", "kube-proxy", "containerd", "caracald"} {
		path := n.Path("/var/log/" + d + ".log")
		if _, err := os.Stat(path); err == nil {
			n.t.Logf("%s: the end of %s's log:\n%s", n.name, d, tail(path))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, err := n.Sh(ctx, "caracalctl node status; caracalctl pods")
	n.t.Logf("%s: %v\n%s", n.name, err, out)
}
