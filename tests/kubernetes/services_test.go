//go:build cluster

package kubernetes

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// place is from where something is asked.
type place interface {
	sh(script string) (string, error)
	String() string
}

func (p *pod) String() string { return p.namespace + "/" + p.name }

// hostOf is a node's own processes.
type hostOf struct{ *node }

func (h hostOf) String() string { return h.name }

func (h hostOf) sh(script string) (string, error) {
	out, err := h.Command(h.t.Context(), "bash", "-c", script).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// world is the outside, beyond all nodes.
type world struct{ c *cluster }

func (w world) String() string { return "outside" }

func (w world) sh(script string) (string, error) {
	out, err := w.c.lab.Outside().Exec(w.c.t.Context(), "sh", "-c", script)
	return strings.TrimSpace(out), err
}

// answers makes sure that exactly these answer at an address, when place asks again and again.
func answers(t testing.TB, from place, addr netip.Addr, port int, who ...string) {
	t.Helper()
	var seen map[string]bool
	testenv.Eventually(t, patience, fmt.Sprintf("%s finds %v at %s port %d", from, who, addr, port), func() error {
		seen = make(map[string]bool)
		for range 12 {
			out, err := from.sh(ask(addr, port))
			if err != nil {
				return err
			}
			if seen[out] = true; len(seen) == len(who) && len(who) > 1 {
				break
			}
		}
		for _, w := range who {
			if !seen[w] {
				return fmt.Errorf("only %v answer", seen)
			}
		}
		return nil
	})
	for s := range seen {
		if !slices.Contains(who, s) {
			t.Errorf("%s finds %s at %s port %d", from, s, addr, port)
		}
	}
}

// refused makes sure that nobody answers, in several tries.
func refused(t testing.TB, from place, addr netip.Addr, port int) {
	t.Helper()
	for range 3 {
		if out, err := from.sh(fmt.Sprintf("curl -sS --max-time 1 http://%s/hostname", netip.AddrPortFrom(addr, uint16(port)))); err == nil {
			t.Errorf("%s answers %s at %s port %d", out, from, addr, port)
			return
		}
	}
}

// clusterIP reads a Service's address.
func (c *cluster) clusterIP(namespace, name string) netip.Addr {
	c.t.Helper()
	a, err := netip.ParseAddr(c.kubectl(c.t.Context(), "-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}"))
	must(c.t, err)
	return a
}

// startDNS gives the cluster its name service.
func (c *cluster) startDNS() {
	c.t.Helper()
	c.apply(`apiVersion: v1
kind: ServiceAccount
metadata: {namespace: kube-system, name: nameserver}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: nameserver}
rules:
- {apiGroups: [""], resources: [services], verbs: [get]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: nameserver}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: nameserver}
subjects: [{kind: ServiceAccount, name: nameserver, namespace: kube-system}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: kube-system, name: nameserver}
spec:
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      serviceAccountName: nameserver
      terminationGracePeriodSeconds: 0
      containers:
      - {name: main, image: "` + agnhost + `", command: [/bin/nameserver]}
---
apiVersion: v1
kind: Service
metadata: {namespace: kube-system, name: kube-dns}
spec: {clusterIP: ` + dns + `, selector: {k8s-app: kube-dns}, ports: [{name: dns, protocol: UDP, port: 53}]}
`)
	c.kubectl(c.t.Context(), "-n", "kube-system", "rollout", "status", "deployment/nameserver", "--timeout=60s")
}

const services = `---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: udp, protocol: UDP, port: 81, targetPort: 8081}]
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: one}
spec: {selector: {one: "yes"}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: headless}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: ports}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {one: "yes"}, ports: [{port: 80, targetPort: 8080, nodePort: 30081}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: affinity}
spec: {sessionAffinity: ClientIP, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: gone}
spec: {selector: {app: gone}, ports: [{protocol: UDP, port: 81, targetPort: 8081}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: services, name: second}
spec: {ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: services, name: second, labels: {kubernetes.io/service-name: second}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [203.0.113.2]}]
`

// testServices: pods, nodes and the outside reach Services in all the ways there are.
func testServices(t *testing.T, c *cluster) {
	c = c.with(t)
	c.namespace("services", "")
	c.startDNS()
	hostPort := strings.Replace(server("services", "published", "n1", "app: published"), "args:", "ports: [{containerPort: 8080, hostPort: 8088}], args:", 1)
	c.apply(services + server("services", "web1", "n1", `app: web, one: "yes"`) + server("services", "web2", "n2", "app: web") +
		server("services", "client1", "n1", "role: client, client: one") + server("services", "client2", "n2", "role: client") + hostPort)
	web1, client1, client2 := c.pod("services", "web1"), c.pod("services", "client1"), c.pod("services", "client2")
	c.pod("services", "web2")
	c.pod("services", "published")
	n1, n2 := c.machine("n1"), c.machine("n2")
	everywhere := []place{client1, client2, hostOf{n1}, hostOf{n2}}
	t.Run("ClusterIP", func(t *testing.T) {
		for _, from := range everywhere {
			answers(t, from, c.clusterIP("services", "web"), 80, "web1", "web2")
		}
	})
	t.Run("UDP", func(t *testing.T) {
		for _, from := range everywhere {
			testenv.Eventually(t, patience, fmt.Sprintf("the Service answers %s by UDP", from), func() error {
				out, err := from.sh(fmt.Sprintf("exec 3<>/dev/udp/%s/81; echo hostname >&3; timeout 1 head -c 4 <&3", c.clusterIP("services", "web")))
				if err == nil && out != "web1" && out != "web2" {
					err = fmt.Errorf("%q answers", out)
				}
				return err
			})
		}
	})
	t.Run("Itself", func(t *testing.T) { answers(t, web1, c.clusterIP("services", "one"), 80, "web1") })
	t.Run("NodePort", func(t *testing.T) {
		for _, from := range append(everywhere, world{c}) {
			for _, n := range []*node{n1, n2} {
				answers(t, from, n.Addr(), 30080, "web1", "web2")
			}
		}
	})
	t.Run("NodePortLocal", func(t *testing.T) {
		answers(t, world{c}, n1.Addr(), 30081, "web1")
		refused(t, world{c}, n2.Addr(), 30081)
		out, err := world{c}.sh(fmt.Sprintf("curl -sS --max-time 3 --interface %s http://%s:30081/clientip", lab.Outside4, n1.Addr()))
		if err != nil || !strings.HasPrefix(out, lab.Outside4.String()+":") {
			t.Errorf("the pod sees %q as its client, not %s: %v", out, lab.Outside4, err)
		}
	})
	t.Run("HostPort", func(t *testing.T) {
		for _, from := range []place{client1, client2, hostOf{n2}, world{c}} {
			answers(t, from, n1.Addr(), 8088, "published")
		}
	})
	t.Run("DNS", func(t *testing.T) {
		for _, client := range []string{"client1", "client2"} {
			out := c.kubectl(t.Context(), "-n", "services", "exec", client, "--", "sh", "-c",
				"agnhost connect --timeout 5s web:80 && agnhost connect --timeout 5s headless.services.svc.cluster.local:8080 && nslookup headless.services.svc.cluster.local")
			for _, p := range []string{"web1", "web2"} {
				if a := c.pod("services", p).addrs[0].String(); !strings.Contains(out, a) {
					t.Errorf("%s of pod %s is not in\n%s", a, p, out)
				}
			}
		}
	})
	t.Run("API", func(t *testing.T) { // the Service whose pods are none
		for _, from := range everywhere {
			if out, err := from.sh("curl -sSk --max-time 3 https://10.96.0.1/version"); err != nil || !strings.Contains(out, "gitVersion") {
				t.Errorf("from %s: %v: %s", from, err, out)
			}
		}
	})
	t.Run("Egress", func(t *testing.T) { testEgress(t, c.with(t), client1, client2) })
	t.Run("HostPortPolicy", func(t *testing.T) { testHostPortPolicy(t, c.with(t), client1, client2) })
	t.Run("NodePortPolicy", func(t *testing.T) { testNodePortPolicy(t, c.with(t)) })
	t.Run("HairpinPolicy", func(t *testing.T) { testHairpinPolicy(t, c.with(t), web1, client1) })
	t.Run("Affinity", func(t *testing.T) { testAffinity(t, c.with(t), client1) })
	t.Run("Gone", func(t *testing.T) { testGone(t, c.with(t), client1) })
	t.Run("SecondNetwork", func(t *testing.T) { testSecondNetwork(t, c.with(t), client1) })
}

// remote is the outside with the address by which policy knows it.
type remote struct{ world }

func (r remote) sh(script string) (string, error) {
	return r.world.sh(strings.Replace(script, "curl ", "curl --interface "+lab.Outside4.String()+" ", 1))
}

// policy is a NetworkPolicy with one rule: peers are those that it allows, none: nobody.
func (c *cluster) policy(direction, selector, peers string) {
	c.t.Helper()
	word := map[string]string{"Ingress": "from", "Egress": "to"}[direction]
	rule := ""
	if peers != "" {
		rule = fmt.Sprintf("{%s: [%s]}", word, peers)
	}
	c.apply(fmt.Sprintf(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: services, name: policy}
spec: {podSelector: {matchLabels: {%s}}, policyTypes: [%s], %s: [%s]}
`, selector, direction, strings.ToLower(direction), rule))
}

func (c *cluster) noPolicy() {
	c.t.Helper()
	c.kubectl(c.t.Context(), "-n", "services", "delete", "networkpolicy", "policy")
}

func block(a netip.Addr) string { return fmt.Sprintf("{ipBlock: {cidr: %s/32}}", a) }

func pods(labels string) string { return "{podSelector: {matchLabels: {" + labels + "}}}" }

// reach makes sure who of all reaches somebody at an address.
func reach(t *testing.T, all, who []place, addr netip.Addr, port int, answer ...string) {
	t.Helper()
	for _, from := range all {
		if !slices.Contains(who, from) {
			silent(t, from, addr, port)
			continue
		}
		eventually(t, fmt.Sprintf("%s finds one of %v at %s port %d", from, answer, addr, port), func() error {
			out, err := from.sh(ask(addr, port))
			if err == nil && !slices.Contains(answer, out) {
				err = fmt.Errorf("%q answers", out)
			}
			return err
		})
	}
}

// testHostPortPolicy: what comes by a pod's hostPort is judged by the address that it carries behind portmap's translation, and what a pod
// of the same node sends there as sent to the pod.
func testHostPortPolicy(t *testing.T, c *cluster, client1, client2 *pod) {
	n1, n2 := c.machine("n1"), c.machine("n2")
	outside, own, other := remote{world{c}}, hostOf{n1}, hostOf{n2}
	all := []place{outside, own, other, client1, client2}
	for _, test := range []struct {
		peers string
		who   []place
	}{
		{"", []place{own}},
		{block(lab.Outside4), []place{own, outside}},
		{block(n2.Addr()), []place{own, other, client2}}, // a pod of another node is masqueraded
		{pods("client: one"), []place{own, client1}},
	} {
		c.policy("Ingress", "app: published", test.peers)
		reach(t, all, test.who, n1.Addr(), 8088, "published")
	}
	c.noPolicy()
	for _, test := range []struct {
		peers string
		who   []place
	}{
		{pods("app: published"), []place{client1}},
		{block(n1.Addr()), []place{client2}}, // which port of another node leads to a pod is not known here
	} {
		c.policy("Egress", "role: client", test.peers)
		reach(t, []place{client1, client2}, test.who, n1.Addr(), 8088, "published")
	}
	c.noPolicy()
	reach(t, all, all, n1.Addr(), 8088, "published")
}

// testNodePortPolicy: who comes by a node port has the node's address for the pod's policy, or his own if the traffic policy is Local.
func testNodePortPolicy(t *testing.T, c *cluster) {
	n1, n2 := c.machine("n1"), c.machine("n2")
	outside := []place{remote{world{c}}}
	for _, test := range []struct {
		peers          string
		cluster, local []place
	}{
		{"", nil, nil},
		{block(lab.Outside4), nil, outside},
		{block(n1.Addr()) + ", " + block(n2.Addr()), outside, nil},
	} {
		c.policy("Ingress", "app: web", test.peers)
		for _, n := range []*node{n1, n2} {
			reach(t, outside, test.cluster, n.Addr(), 30080, "web1", "web2")
		}
		reach(t, outside, test.local, n1.Addr(), 30081, "web1")
	}
	c.noPolicy()
	reach(t, outside, outside, n1.Addr(), 30080, "web1", "web2")
	reach(t, outside, outside, n1.Addr(), 30081, "web1")
}

// testHairpinPolicy: a pod reaches itself by its Service, whatever policy says.
func testHairpinPolicy(t *testing.T, c *cluster, itself, other *pod) {
	for _, direction := range []string{"Ingress", "Egress"} {
		c.policy(direction, `one: "yes"`, "")
		if direction == "Ingress" {
			silent(t, other, c.clusterIP("services", "one"), 80)
		} else {
			silent(t, itself, other.addrs[0], 8080)
		}
		answers(t, itself, c.clusterIP("services", "one"), 80, "web1")
	}
	c.noPolicy()
	answers(t, other, c.clusterIP("services", "one"), 80, "web1")
}

// testAffinity: kube-proxy keeps a client to one pod, and does not ask policy about it.
func testAffinity(t *testing.T, c *cluster, client *pod) {
	at := c.clusterIP("services", "affinity")
	var stays string
	eventually(t, "the Service answers", func() (err error) {
		stays, err = client.sh(ask(at, 80))
		return err
	})
	for range 12 {
		if who, err := client.sh(ask(at, 80)); who != stays || err != nil {
			t.Fatalf("%s answers, %s did before: %v", who, stays, err)
		}
	}
	denied := map[string]string{"web1": "web2", "web2": "web1"}[stays]
	c.policy("Egress", "client: one", block(c.pod("services", denied).addrs[0]))
	silent(t, client, at, 80)
	refused(t, client, at, 80)
	c.noPolicy()
	answers(t, client, at, 80, stays)
}

// testGone: who goes on sending datagrams from one port to a Service is answered by another pod when the one that was is gone, and each is
// judged.
func testGone(t *testing.T, c *cluster, client *pod) {
	all := map[string]string{"gone1": "n1", "gone2": "n2"}
	start := func(name string) {
		c.apply(server("services", name, all[name], "app: gone"))
		c.pod("services", name)
	}
	for name := range all {
		start(name)
	}
	c.policy("Egress", "client: one", pods("app: gone"))
	defer c.noPolicy()
	var conn net.Conn
	must(t, netns.Do(client.path(), func() (err error) {
		conn, err = net.Dial("udp", netip.AddrPortFrom(c.clusterIP("services", "gone"), 81).String())
		return err
	}))
	defer conn.Close()
	answer := func() (string, error) {
		buf := make([]byte, 64)
		if _, err := conn.Write([]byte("hostname")); err != nil {
			return "", err
		}
		_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := conn.Read(buf)
		return string(buf[:n]), err
	}
	for range 2 {
		var who string
		eventually(t, "the Service answers a datagram", func() (err error) {
			who, err = answer()
			return err
		})
		other := map[string]string{"gone1": "gone2", "gone2": "gone1"}[who]
		c.kubectl(t.Context(), "-n", "services", "delete", "pod", who, "--force", "--grace-period=0")
		eventually(t, other+" answers the same socket", func() error {
			if got, err := answer(); err != nil || got != other {
				return fmt.Errorf("%q answers: %v", got, err)
			}
			return nil
		})
		start(who)
	}
}

// testSecondNetwork: a Service's backend on another network of the node is judged, and sees the node's address there.
func testSecondNetwork(t *testing.T, c *cluster, client *pod) {
	n := client.node
	there := netip.MustParseAddr("203.0.113.2")
	n.sh(`ip netns add second && ip link add second type veth peer name eth0 netns second
ip addr add 203.0.113.1/25 dev second && ip link set second up
ip -n second addr add 203.0.113.2/25 dev eth0 && ip -n second link set eth0 up`)
	defer n.sh("ip link del second; ip netns del second")
	var l net.Listener
	must(t, netns.Do(n.Path("/run/netns/second"), func() (err error) {
		l, err = net.Listen("tcp", "203.0.113.2:8080")
		return err
	}))
	s := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprint(w, from)
	})}
	go s.Serve(l) //nolint:errcheck // it ends with the test
	defer s.Close()
	at := c.clusterIP("services", "second")
	answers(t, client, at, 80, "203.0.113.1")
	for _, test := range []struct {
		peers string
		is    bool
	}{{"", false}, {block(there), true}, {block(at), false}} {
		c.policy("Egress", "client: one", test.peers)
		if test.is {
			answers(t, client, at, 80, "203.0.113.1")
		} else {
			silent(t, client, at, 80)
			refused(t, client, at, 80)
		}
	}
	c.noPolicy()
	answers(t, client, at, 80, "203.0.113.1")
	// What is behind an interface of another kind nobody can judge; doctor says so.
	n.sh("ip tuntap add dev third mode tun && ip addr add 203.0.113.129/25 dev third && ip link set third up")
	defer n.sh("ip link del third")
	out := n.sh("caracalctl doctor || true") // of other checks nothing is wanted
	if strings.Contains(out, "uplinks second") || !strings.Contains(out, "uplinks third") {
		t.Errorf("doctor says\n%s", out)
	}
}

// testEgress: a pod's egress policy is about who answers behind a Service, on its own node or another.
func testEgress(t *testing.T, c *cluster, clients ...*pod) {
	service, one := c.clusterIP("services", "web"), c.clusterIP("services", "one")
	policy := func(name, selector, to string) {
		c.apply(fmt.Sprintf(`apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: services, name: %s}
spec: {podSelector: {%s}, policyTypes: [Egress], egress: [%s]}
`, name, selector, to))
	}
	for _, p := range clients {
		answers(t, p, service, 80, "web1", "web2")
	}
	policy("egress", "", "{to: [{podSelector: {matchLabels: {one: \"yes\"}}}]}")
	for _, p := range clients {
		testenv.Eventually(t, patience, fmt.Sprintf("%s reaches web1 alone", p), func() error {
			seen := map[string]int{}
			for range 8 {
				out, err := p.sh(fmt.Sprintf("curl -sS --max-time 1 http://%s/hostname", service))
				if err != nil {
					out = "nobody"
				}
				seen[out]++
			}
			if seen["web2"] > 0 || seen["web1"] == 0 {
				return fmt.Errorf("who answers at the Service: %v", seen)
			}
			return nil
		})
		answers(t, p, one, 80, "web1")
	}
	policy("egress", "", "{to: [{podSelector: {matchLabels: {app: nobody}}}]}")
	for _, p := range clients {
		testenv.Eventually(t, patience, fmt.Sprintf("%s reaches nobody", p), func() error {
			if out, err := p.sh(fmt.Sprintf("curl -sS --max-time 1 http://%s/hostname", one)); err == nil {
				return fmt.Errorf("%s answers", out)
			}
			return nil
		})
		refused(t, p, service, 80)
	}
	c.kubectl(t.Context(), "-n", "services", "delete", "networkpolicy", "--all")
	for _, p := range clients {
		answers(t, p, service, 80, "web1", "web2")
	}
}
