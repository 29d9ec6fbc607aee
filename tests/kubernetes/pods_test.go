//go:build cluster

package kubernetes

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// server is a manifest of a pod that answers with its own name: HTTP on port 8080, at /hostname, and UDP on port 8081. On which node
// it runs is "" for any.
func server(namespace, name, node, labels string) string {
	return fmt.Sprintf(`---
apiVersion: v1
kind: Pod
metadata: {namespace: %s, name: %s, labels: {%s}}
spec:
  nodeName: %q
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: %q, args: [netexec, --http-port=8080, --udp-port=8081]}
`, namespace, name, labels, node, agnhost)
}

// pod is one that runs.
type pod struct {
	node            *node
	namespace, name string
	addrs           []netip.Addr
	netns           string // on the node
}

// pod waits until a pod runs.
func (c *cluster) pod(namespace, name string) *pod {
	c.t.Helper()
	c.kubectl(c.t.Context(), "wait", "-n", namespace, "pod/"+name, "--for=condition=Ready", "--timeout=60s")
	object, err := get[struct {
		Spec   struct{ NodeName string }
		Status struct {
			PodIPs []struct{ IP netip.Addr }
		}
	}](c, "-n", namespace, "pod", name)
	must(c.t, err)
	p := &pod{node: c.machine(object.Spec.NodeName), namespace: namespace, name: name}
	for _, ip := range object.Status.PodIPs {
		p.addrs = append(p.addrs, ip.IP)
	}
	var recorded []struct{ PodNamespace, PodName, Netns string }
	out := p.node.sh("caracalctl pods -o json 2>/dev/null") // which may have something to say beside
	must(c.t, json.Unmarshal([]byte(out), &recorded))
	for _, r := range recorded {
		if r.PodNamespace == namespace && r.PodName == name {
			p.netns = r.Netns
		}
	}
	if p.netns == "" {
		c.t.Fatalf("caracalctl pods of %s does not know %s/%s:\n%s", p.node.name, namespace, name, out)
	}
	return p
}

// attached is a pod that whatever network has attached.
func (c *cluster) attached(on, name, addr string) *pod {
	c.t.Helper()
	n := c.machine(on)
	a, err := netip.ParseAddr(addr)
	must(c.t, err)
	p := &pod{node: n, namespace: "default", name: name, addrs: []netip.Addr{a}}
	p.netns = n.sh("for i in /run/netns/*; do nsenter --net=$i ip -o addr | grep -qF 'inet " + addr + "/' && echo $i; done || true")
	if p.netns == "" || strings.Contains(p.netns, "\n") {
		c.t.Fatalf("%s of %s is in the network namespaces %q", addr, name, p.netns)
	}
	return p
}

// sh runs a script in the pod's network, with the machine's programs.
func (p *pod) sh(script string) (string, error) {
	out, err := p.node.Sh(p.node.t.Context(), "nsenter --net="+p.netns+" bash -c '"+strings.ReplaceAll(script, "'", `'\''`)+"'")
	return strings.TrimSpace(out), err
}

// path is where the pod's network namespace lies for others than its node.
func (p *pod) path() string {
	return p.node.Path(strings.TrimPrefix(p.netns, "/var")) // /var/run is a link to /run, which would be looked for here
}

// ask asks an address for the name of who answers there, over HTTP.
func ask(addr netip.Addr, port int) string {
	return fmt.Sprintf(`curl -sS --max-time 3 http://%s/hostname`, netip.AddrPortFrom(addr, uint16(port)))
}

// TestCluster: what a cluster's users do, with kube-proxy in its two modes.
func TestCluster(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			c := start(t, options{proxy: mode})
			t.Run("Pods", func(t *testing.T) { testPods(t, c.with(t)) })
			t.Run("Services", func(t *testing.T) { testServices(t, c.with(t)) })
		})
	}
}

// testPods: pods of both nodes reach each other, and NetworkPolicies decide who does.
func testPods(t *testing.T, c *cluster) {
	c.namespace("pods", "")
	c.apply(server("pods", "web", "n1", "app: web") + server("pods", "near", "n1", "role: client") + server("pods", "far", "n2", "role: client") + server("pods", "other", "n2", ""))
	web, near, far, other := c.pod("pods", "web"), c.pod("pods", "near"), c.pod("pods", "far"), c.pod("pods", "other")
	t.Log("\n# kubectl get nodes,pods -A -o wide\n" + c.kubectl(t.Context(), "get", "nodes,pods", "-A", "-o", "wide"))
	all := []*pod{web, near, far, other}
	for _, from := range all {
		for _, to := range all {
			answers(t, from, to.addrs[0], 8080, to.name)
		}
		answers(t, hostOf{c.machine("n1")}, from.addrs[0], 8080, from.name)
		answers(t, hostOf{c.machine("n2")}, from.addrs[0], 8080, from.name)
	}
	if out := c.kubectl(t.Context(), "-n", "pods", "exec", "far", "--", "hostname"); out != "far" {
		t.Errorf("hostname in far: %q", out)
	}
	c.apply(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: pods, name: deny-all}
spec: {podSelector: {}, policyTypes: [Ingress]}
`)
	for _, from := range []*pod{near, far, other} {
		silent(t, from, web.addrs[0], 8080)
	}
	c.apply(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: pods, name: allow-http}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {role: client}}}], ports: [{protocol: TCP, port: 8080}]}]
`)
	for _, from := range []*pod{near, far} {
		answers(t, from, web.addrs[0], 8080, "web")
	}
	refused(t, other, web.addrs[0], 8080)
	// A label that changes is a policy's matter at once.
	c.kubectl(t.Context(), "-n", "pods", "label", "pod", "other", "role=client")
	answers(t, other, web.addrs[0], 8080, "web")
	c.kubectl(t.Context(), "-n", "pods", "label", "pod", "other", "role-")
	silent(t, other, web.addrs[0], 8080)
	c.kubectl(t.Context(), "-n", "pods", "delete", "networkpolicy", "--all")
	answers(t, other, web.addrs[0], 8080, "web")
	c.kubectl(t.Context(), "delete", "namespace", "pods", "--wait=false")
}

// silent waits until nobody answers any more.
func silent(t testing.TB, from place, addr netip.Addr, port int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s finds nobody at %s port %d", from, addr, port), func() error {
		if out, err := from.sh(fmt.Sprintf("curl -sS --max-time 1 http://%s/hostname", netip.AddrPortFrom(addr, uint16(port)))); err == nil {
			return fmt.Errorf("%s answers", out)
		}
		return nil
	})
}
