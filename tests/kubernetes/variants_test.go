//go:build cluster

package kubernetes

import (
	"net/netip"
	"testing"
)

// TestDualStack: pods, Services and nodes have addresses of both families.
func TestDualStack(t *testing.T) {
	c := start(t, options{dualStack: true, settings: map[string]string{"CALICO_IPV6POOL_CIDR": pods6}})
	c.namespace("dual", "")
	c.apply(server("dual", "web1", "n1", "app: web") + server("dual", "web2", "n2", "app: web") + server("dual", "client1", "n1", "") + server("dual", "client2", "n2", "") + `---
apiVersion: v1
kind: Service
metadata: {namespace: dual, name: web}
spec: {type: NodePort, ipFamilyPolicy: RequireDualStack, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
`)
	var all []place
	for _, name := range []string{"web1", "web2", "client1", "client2"} {
		p := c.pod("dual", name)
		if len(p.addrs) != 2 || !p.addrs[0].Is4() || !p.addrs[1].Is6() {
			t.Errorf("%s has %v", p, p.addrs)
		}
		all = append(all, p)
	}
	for _, n := range c.nodes {
		all = append(all, hostOf{n})
	}
	ip, err := netip.ParseAddr(c.kubectl(t.Context(), "-n", "dual", "get", "service", "web", "-o", "jsonpath={.spec.clusterIPs[1]}"))
	must(t, err)
	for _, from := range all {
		for _, name := range []string{"web1", "web2"} {
			for _, a := range c.pod("dual", name).addrs {
				answers(t, from, a, 8080, name)
			}
		}
		answers(t, from, c.clusterIP("dual", "web"), 80, "web1", "web2")
		answers(t, from, ip, 80, "web1", "web2")
	}
	for _, n := range c.nodes {
		answers(t, world{c}, n.Addr6(), 30080, "web1", "web2")
	}
}

// TestPodCIDR: each node's pods have addresses that kube-controller-manager has given the node.
func TestPodCIDR(t *testing.T) {
	c := start(t, options{podCIDR: true, settings: map[string]string{"CARACAL_IPAM": "podcidr"}})
	c.namespace("podcidr", "")
	c.apply(server("podcidr", "a", "n1", "") + server("podcidr", "b", "n2", ""))
	a, b := c.pod("podcidr", "a"), c.pod("podcidr", "b")
	for _, p := range []*pod{a, b} {
		cidr, err := netip.ParsePrefix(c.kubectl(t.Context(), "get", "node", p.node.name, "-o", "jsonpath={.spec.podCIDR}"))
		must(t, err)
		if !cidr.Contains(p.addrs[0]) {
			t.Errorf("%s has %v, its node %s", p, p.addrs, cidr)
		}
	}
	answers(t, a, b.addrs[0], 8080, "b")
	answers(t, b, a.addrs[0], 8080, "a")
}
