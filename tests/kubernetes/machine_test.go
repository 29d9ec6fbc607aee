//go:build cluster

package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestMachines: a node is shut down as its kubelet does it, and one loses its power. Both come again.
func TestMachines(t *testing.T) {
	testenv.NeedProgram(t, "dbus-daemon", "dbus-daemon")
	testenv.NeedProgram(t, "busctl", "systemd")
	if _, err := os.Stat(logind); err != nil {
		lab.Skip(t, "needs systemd-logind (apt-get install systemd): "+err.Error())
	}
	c := start(t, options{})
	for _, n := range c.nodes {
		n.tellBoot()
	}
	c.kubectl(t.Context(), "-n", "kube-system", "set", "env", "daemonset/caracal-node", "-c", "agent", "CARACAL_BOOT_ID_FILE="+bootID)
	c.kubectl(t.Context(), "-n", "kube-system", "rollout", "status", "daemonset/caracal-node", "--timeout=120s")
	t.Run("PowerCut", func(t *testing.T) { testPowerCut(t, c.with(t)) })
	t.Run("Shutdown", func(t *testing.T) { testShutdown(t, c.with(t)) })
}

// bootID is a file with the node's boot id. The agent in its pod, whose /proc has the real machine's, reads it there.
const bootID = "/var/lib/caracal/boot-id"

func (n *node) tellBoot() {
	n.t.Helper()
	n.sh("cat /proc/sys/kernel/random/boot_id >" + bootID)
}

// reboot cuts the power of a node and starts it again.
func (n *node) reboot() {
	n.t.Helper()
	booted, err := n.Reboot(n.t.Context())
	must(n.t, err)
	*n.Machine = *booted // in all copies of this node
	if _, err := os.Stat(n.Path(bootID)); err == nil {
		n.tellBoot()
	} else { // the agent in its pod sees the real machine's, and the plugin must see the same: each frees what was recorded in another boot
		n.realBoot(n.Host)
	}
	n.start()
}

// addresses are those of a node's pods in a namespace by their names, as recorded there.
func (n *node) addresses(namespace string) (map[string]netip.Addr, error) {
	out, err := n.Sh(n.t.Context(), "caracalctl pods -o json 2>/dev/null")
	if err != nil {
		return nil, err
	}
	all, err := recorded(out, namespace)
	if err != nil {
		return nil, err
	}
	has := make(map[string]netip.Addr)
	for _, r := range all {
		if r.State == "ready" {
			has[r.PodName] = r.Addresses[0]
		}
	}
	return has, nil
}

// record is what caracalctl pods says of a pod.
type record struct {
	PodNamespace, PodName, State string
	Addresses                    []netip.Addr
}

// recorded are a namespace's pods in what caracalctl pods -o json has printed.
func recorded(out, namespace string) ([]record, error) {
	var all []record
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, fmt.Errorf("%w in %q", err, out)
	}
	return slices.DeleteFunc(all, func(r record) bool { return r.PodNamespace != namespace }), nil
}

// testPowerCut: all of a node's processes, its interfaces, programs and maps are gone at once. Its pods come again, with policy before
// their first packet, the other node's reach them, and no address is lost or given twice.
func testPowerCut(t *testing.T, c *cluster) {
	c.namespace("cut", "")
	c.apply(server("cut", "web", "n1", "app: web") + server("cut", "near", "n1", "role: client") + server("cut", "far", "n2", "role: client") + server("cut", "other", "n2", "") + `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: cut, name: clients}
spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {role: client}}}]}]}
`)
	web, near, far, other := c.pod("cut", "web"), c.pod("cut", "near"), c.pod("cut", "far"), c.pod("cut", "other")
	answers(t, far, web.addrs[0], 8080, "web")
	silent(t, other, web.addrs[0], 8080)
	n := c.machine("n1")
	agent := func() string {
		out, _ := c.tryKubectl(t.Context(), "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=caracal", "--field-selector=spec.nodeName=n1", "-o", "jsonpath={.items[*].status.containerStatuses[*].containerID}{.items[*].status.containerStatuses[*].ready}")
		return out
	}
	before := agent()
	// The node keeps its block, whose addresses are given out in their order before one is given again: the pods get some of these.
	block := netip.PrefixFrom(web.addrs[0], 26).Masked()
	var denied []*watcher
	for a := block.Addr(); len(denied) < 8; a = a.Next() {
		denied = append(denied, watch(t, other, a, 8081))
	}
	begin := time.Now()
	n.reboot()
	t.Logf("%s is up, and its daemons, after %v", n.name, time.Since(begin).Round(time.Millisecond))
	eventually(t, "the agent runs again", func() error {
		if a := agent(); a == before || !strings.HasSuffix(a, "true") {
			return errors.New(a)
		}
		return nil
	})
	t.Logf("its agent is ready after %v", time.Since(begin).Round(time.Millisecond))
	eventually(t, "the pods have addresses, and Kubernetes knows them", func() error {
		has, err := n.addresses("cut")
		if err != nil {
			return err
		}
		for _, p := range []*pod{web, near} {
			ip, err := c.tryKubectl(t.Context(), "-n", "cut", "get", "pod", p.name, "-o", "jsonpath={.status.podIP}")
			if err != nil {
				return err
			}
			if ip != has[p.name].String() {
				return fmt.Errorf("%s has %v, in Kubernetes %s", p, has[p.name], ip)
			}
		}
		return nil
	})
	was := web.addrs[0]
	web, near = c.pod("cut", "web"), c.pod("cut", "near")
	t.Logf("its pods run after %v: web had %v, and has %v", time.Since(begin).Round(time.Millisecond), was, web.addrs[0])
	for _, from := range []*pod{near, far} {
		answers(t, from, web.addrs[0], 8080, "web")
	}
	for _, p := range []*pod{web, near} {
		if !slices.ContainsFunc(denied, func(w *watcher) bool { return w.addr == p.addrs[0] }) {
			t.Errorf("%s has %s now, which nobody asked for before it had it: nothing is shown of policy before its first packet", p, p.addrs[0])
		}
	}
	answers(t, near, far.addrs[0], 8080, "far")
	answers(t, far, near.addrs[0], 8080, "near")
	refused(t, other, web.addrs[0], 8080)
	for _, w := range denied {
		w.end(t)
	}
	c.unshared("cut")
	c.kubectl(t.Context(), "delete", "namespace", "cut", "--wait=true", "--timeout=90s")
	c.clean("cut")
}

// unshared makes sure that no two pods have one address.
func (c *cluster) unshared(namespace string) {
	c.t.Helper()
	whose := make(map[netip.Addr]string)
	for _, n := range c.nodes {
		has, err := n.addresses(namespace)
		must(c.t, err)
		for name, a := range has {
			if whose[a] != "" {
				c.t.Errorf("%s and %s have %s", whose[a], name, a)
			}
			whose[a] = name
		}
	}
}

// clean waits until nothing of a namespace's pods is left on the nodes.
func (c *cluster) clean(namespace string) {
	c.t.Helper()
	for _, n := range c.nodes {
		eventually(c.t, "nothing is left on "+n.name, func() error {
			out, err := n.Sh(c.t.Context(), "caracalctl ipam check && caracalctl pods -o json 2>/dev/null")
			if err == nil && strings.Contains(out, `"`+namespace+`"`) {
				err = errors.New(out)
			}
			return err
		})
	}
}

const logind = "/lib/systemd/systemd-logind"

// logind is a message bus and systemd's logind on the node's own /run, which reach nothing outside. There is no systemd on that bus.
func (n *node) logind() {
	n.t.Helper()
	n.write("/etc/dbus.conf", `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>
`)
	n.write("/etc/systemd/logind.conf", "[Login]\nNAutoVTs=0\nReserveVT=0\nRemoveIPC=no\nInhibitDelayMaxSec=120\n")
	n.sh("rm -rf /etc/systemd/logind.conf.d; mkdir -p /run/dbus /run/systemd/seats /run/systemd/users /run/systemd/sessions /run/systemd/inhibit")
	must(n.t, n.StartDaemon("dbus-daemon", "dbus-daemon", "--config-file=/etc/dbus.conf", "--nofork", "--nopidfile"))
	eventually(n.t, "the bus answers", func() error {
		_, err := n.Sh(n.t.Context(), "busctl list")
		return err
	})
	must(n.t, n.StartDaemon("logind", "env", "SYSTEMD_LOG_TARGET=console", logind))
	eventually(n.t, "logind answers", func() error {
		_, err := n.inhibitors()
		return err
	})
}

const login1 = "org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager"

// inhibitors are who delays a shutdown, as logind tells.
func (n *node) inhibitors() (string, error) {
	out, err := n.Sh(n.t.Context(), "busctl call "+login1+" ListInhibitors")
	return strings.TrimSpace(out), err
}

// testShutdown: a node that shuts down ends its pods first, which have their network until then and give their addresses back, and Caracal's
// last. Then it comes again.
//
// Logind asks systemd whether there is a poweroff.target before it says anything, and no systemd is there: the test says in its stead that
// a shutdown begins.
func testShutdown(t *testing.T, c *cluster) {
	c.namespace("down", "")
	c.apply(server("down", "far", "n2", ""))
	far := c.pod("down", "far")
	c.apply(fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {namespace: down, name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: n1}
      terminationGracePeriodSeconds: 10
      containers:
      - name: main
        image: %q
        command: [sh, -c, "trap 'sleep 2; printf \"GET /echo?msg=bye-$HOSTNAME HTTP/1.0\\r\\n\\r\\n\" | nc -w 3 %s 8080; exit 0' TERM; while :; do sleep 1; done"]
`, agnhost, far.addrs[0]))
	c.kubectl(t.Context(), "-n", "down", "rollout", "status", "deployment/web", "--timeout=60s")
	n := c.machine("n1")
	must(t, n.Signal(t.Context(), "kubelet", unix.SIGKILL))
	n.logind()
	n.write("/etc/kubernetes/kubelet.yaml", kubeletConfig+"shutdownGracePeriod: 40s\nshutdownGracePeriodCriticalPods: 15s\n")
	n.startKubelet()
	eventually(t, "the kubelet knows its pods again", func() error {
		out, err := c.tryKubectl(t.Context(), "get", "--raw", "/api/v1/nodes/n1/proxy/pods")
		if err == nil && strings.Count(out, `"name":"web-`) < 6 { // their own and their ReplicaSet's
			err = errors.New(out)
		}
		return err
	})
	eventually(t, "the kubelet delays shutdowns", func() error {
		all, err := n.inhibitors()
		if err == nil && !strings.Contains(all, `"shutdown" "kubelet"`) {
			err = errors.New(all)
		}
		return err
	})
	must(t, n.StartDaemon("witness", "sh", "-c", "while pgrep -x caracald >/dev/null; do sleep 0.05; done; caracalctl pods -o json >/run/left.new && mv /run/left.new /run/left"))
	begin := time.Now()
	pods := strings.Fields(c.kubectl(t.Context(), "-n", "down", "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"))
	n.sh("busctl emit /org/freedesktop/login1 org.freedesktop.login1.Manager PrepareForShutdown b true")
	eventually(t, "the kubelet lets the shutdown go on", func() error {
		all, err := n.inhibitors()
		if err == nil && strings.Contains(all, "kubelet") {
			err = errors.New(all)
		}
		return err
	})
	t.Logf("the kubelet needed %v", time.Since(begin).Round(time.Millisecond))
	said := c.kubectl(t.Context(), "-n", "down", "logs", "far")
	for _, p := range pods {
		if !strings.Contains(said, "bye-"+p) {
			t.Errorf("%s could not reach the other node while it ended; that has heard:\n%s", p, said)
		}
	}
	eventually(t, "Caracal has ended", func() error {
		out, err := n.Sh(t.Context(), "cat /run/left")
		if err != nil {
			return err
		}
		left, err := recorded(out, "down")
		must(t, err)
		if len(left) > 0 {
			t.Errorf("there were pods when Caracal ended: %+v", left)
		}
		return nil
	})
	n.sh("caracalctl ipam check")
	n.write("/etc/kubernetes/kubelet.yaml", kubeletConfig)
	begin = time.Now()
	n.reboot()
	eventually(t, "the Deployment's pods run again", func() error {
		has, err := n.addresses("down")
		if err == nil && len(has) != 3 {
			err = fmt.Errorf("%v", has)
		}
		return err
	})
	c.kubectl(t.Context(), "-n", "down", "rollout", "status", "deployment/web", "--timeout=60s")
	t.Logf("pods are there again after %v", time.Since(begin))
	c.ready()
	c.unshared("down")
	c.kubectl(t.Context(), "delete", "namespace", "down", "--wait=true", "--timeout=90s")
	c.clean("down")
}
