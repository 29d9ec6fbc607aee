package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// service is what a node's proxy translates, in rules as kube-proxy makes them.
type service struct {
	vip           netip.Addr // none: node port alone
	port          uint16
	nodePort      uint16         // 0: none
	external      bool           // vip is an external address: masqueraded like a node port
	local         bool           // externalTrafficPolicy: Local
	masqueradeAll bool           // --masquerade-all
	to            netip.AddrPort // none: no endpoint
}

// serviceProtocols are those that the Services of these tests have.
var serviceProtocols = []string{"tcp", "udp", "sctp"}

// proxy translates Services on a host by nft or iptables, and tells the programs of them.
func (n *node) proxy(style string, v6 bool, all ...service) {
	n.t.Helper()
	rules, cmd := nftProxy(v6, all), exec.Command("nft", "-f", "-")
	if style == "iptables" {
		rules, cmd = iptablesProxy(v6, all), exec.Command("iptables-restore", "--noflush")
		if v6 {
			cmd = exec.Command("ip6tables-restore", "--noflush")
		}
	}
	cmd.Stdin = strings.NewReader(rules)
	n.do(func() error {
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s\n%s", err, out, rules)
		}
		return nil
	})
	n.serve(all...)
}

// serve tells the programs of Services that somebody translates.
func (n *node) serve(all ...service) {
	n.t.Helper()
	var entries []maps.Service
	for _, s := range all {
		for _, p := range serviceProtocols {
			if s.vip.IsValid() {
				entries = append(entries, maps.Service{Address: s.vip, Protocol: p, Port: s.port, Name: "default/test"})
			}
			if s.nodePort != 0 {
				entries = append(entries, maps.Service{Protocol: p, Port: s.nodePort, Name: "default/test"})
			}
		}
	}
	if _, _, err := commit.SetServices(n.maps, entries); err != nil {
		n.t.Fatal(err)
	}
}

// iptablesProxy is pkg/proxy/iptables/proxier.go in short. Chains are made anew, so that a test can change what is translated.
func iptablesProxy(v6 bool, all []service) string {
	bits := 32
	if v6 {
		bits = 128
	}
	names := []string{"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"}
	var rules, reject []string
	rule := func(format string, args ...any) { rules = append(rules, fmt.Sprintf(format, args...)) }
	for i, s := range all {
		for _, p := range serviceProtocols {
			id := fmt.Sprintf("%s-%d", strings.ToUpper(p), i)
			matches := fmt.Sprintf("-d %s/%d -p %s -m %s --dport %d", s.vip, bits, p, p, s.port)
			if !s.to.IsValid() {
				reject = append(reject, fmt.Sprintf("-A KUBE-REJECT %s -j REJECT", matches))
				continue
			}
			names = append(names, "KUBE-SVC-"+id, "KUBE-SEP-"+id, "KUBE-EXT-"+id)
			if s.masqueradeAll {
				rule("-A KUBE-SVC-%s %s -j KUBE-MARK-MASQ", id, matches)
			}
			rule("-A KUBE-SVC-%s -j KUBE-SEP-%s", id, id)
			rule("-A KUBE-SEP-%s -s %s/%d -j KUBE-MARK-MASQ", id, s.to.Addr(), bits)
			rule("-A KUBE-SEP-%s -p %s -m %s -j DNAT --to-destination %s", id, p, p, s.to)
			if !s.local {
				rule("-A KUBE-EXT-%s -j KUBE-MARK-MASQ", id)
			}
			rule("-A KUBE-EXT-%s -j KUBE-SVC-%s", id, id)
			if s.vip.IsValid() {
				rule("-A KUBE-SERVICES %s -j KUBE-%s-%s", matches, map[bool]string{false: "SVC", true: "EXT"}[s.external], id)
			}
			if s.nodePort != 0 {
				rule("-A KUBE-NODEPORTS -p %s -m %s --dport %d -j KUBE-EXT-%s", p, p, s.nodePort, id)
			}
		}
	}
	rule("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")
	for _, r := range []string{"-F PREROUTING", "-A PREROUTING -j KUBE-SERVICES", "-F OUTPUT", "-A OUTPUT -j KUBE-SERVICES", "-F POSTROUTING", "-A POSTROUTING -j KUBE-POSTROUTING"} {
		rule("%s", r)
	}
	rule("-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000")
	rule("-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN")
	rule("-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000")
	rule("-A KUBE-POSTROUTING -j MASQUERADE --random-fully")
	nat := "*nat\n"
	for _, name := range names {
		nat += ":" + name + " - [0:0]\n"
	}
	filter := []string{
		"*filter", ":KUBE-REJECT - [0:0]", "-F FORWARD", "-F INPUT", "-F OUTPUT", "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
		"-A FORWARD -j KUBE-REJECT", "-A INPUT -j KUBE-REJECT", "-A OUTPUT -j KUBE-REJECT",
	}
	return nat + strings.Join(rules, "\n") + "\nCOMMIT\n" + strings.Join(append(filter, reject...), "\n") + "\nCOMMIT\n"
}

// nftProxy is pkg/proxy/nftables/proxier.go in short.
func nftProxy(v6 bool, all []service) string {
	family, kind := "ip", "ipv4_addr"
	if v6 {
		family, kind = "ip6", "ipv6_addr"
	}
	var ips, ports, none []string
	var chains strings.Builder
	for i, s := range all {
		for _, p := range serviceProtocols {
			id := fmt.Sprintf("%s-%d", p, i)
			if !s.to.IsValid() {
				none = append(none, fmt.Sprintf("%s . %s . %d : goto reject-chain", s.vip, p, s.port))
				continue
			}
			fmt.Fprintf(&chains, "chain endpoint-%s { %s saddr %s jump mark-for-masquerade; meta l4proto %s dnat to %s; }\n", id, family, s.to.Addr(), p, s.to)
			fmt.Fprintf(&chains, "chain service-%s {\n", id)
			if s.masqueradeAll {
				fmt.Fprintf(&chains, "%s daddr %s jump mark-for-masquerade;\n", family, s.vip)
			}
			fmt.Fprintf(&chains, "goto endpoint-%s; }\nchain external-%s {\n", id, id)
			if !s.local {
				chains.WriteString("jump mark-for-masquerade;\n")
			}
			fmt.Fprintf(&chains, "goto service-%s; }\n", id)
			if s.vip.IsValid() {
				ips = append(ips, fmt.Sprintf("%s . %s . %d : goto %s-%s", s.vip, p, s.port, map[bool]string{false: "service", true: "external"}[s.external], id))
			}
			if s.nodePort != 0 {
				ports = append(ports, fmt.Sprintf("%s . %d : goto external-%s", p, s.nodePort, id))
			}
		}
	}
	elements := func(of []string) string {
		if len(of) == 0 {
			return ""
		}
		return "elements = { " + strings.Join(of, ", ") + " };"
	}
	return fmt.Sprintf(`table %[1]s kube-proxy
delete table %[1]s kube-proxy
table %[1]s kube-proxy {
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain reject-chain { reject; }
	%[3]s
	map service-ips { type %[2]s . inet_proto . inet_service : verdict; %[4]s }
	map service-nodeports { type inet_proto . inet_service : verdict; %[5]s }
	map no-endpoint-services { type %[2]s . inet_proto . inet_service : verdict; %[6]s }
	chain services {
		%[1]s daddr . meta l4proto . th dport vmap @service-ips;
		fib daddr type local meta l4proto . th dport vmap @service-nodeports;
	}
	chain no-endpoints { %[1]s daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat;
		meta mark & 0x4000 == 0 return;
		meta mark set meta mark xor 0x4000;
		masquerade fully-random;
	}
	chain filter-input { type filter hook input priority -110; ct state new jump no-endpoints; }
	chain filter-forward { type filter hook forward priority -110; ct state new jump no-endpoints; ct state invalid drop; }
	chain filter-output { type filter hook output priority -110; ct state new jump no-endpoints; }
}
`, family, kind, chains.String(), elements(ips), elements(ports), elements(none))
}

// Identities and policies of these tests. Backends listen on port 8080, the Service has port 80.
const (
	isBackend, isService, isClient, isNode = 5, 6, 7, 8
	toBackend, toService                   = 20, 21
	fromClient, fromNode                   = 22, 23
	nobody                                 = 9
	behind, front, nodePort                = 8080, 80, 30080
)

// cluster is two hosts, of which the first has Services.
//
//	a, c on one          b on two
//	VIP:80, NODE:30080 -> a, b or c:8080, or elsewhere
type cluster struct {
	t        *testing.T
	style    string
	v6       bool
	one, two *node
	a, b, c  *pod
	vip      netip.Addr
}

func newCluster(t *testing.T, style string, v6 bool) *cluster {
	t.Helper()
	c := &cluster{t: t, style: style, v6: v6, vip: netip.MustParseAddr("10.96.0.10")}
	if v6 {
		c.vip = netip.MustParseAddr("2001:db8:96::10")
	}
	c.one, c.two = newHosts(t, loader.TCX, 1500)
	c.one.do(c.routeToService)
	c.one.do(func() error { return loader.AttachHost(c.one.dir) })
	// The redirect that a pod's packet to itself is worth counts against the errors that the pod is sent.
	c.one.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0) })
	c.a, c.c, c.b = c.one.addPod("a", 1, loader.TCX), c.one.addPod("c", 3, loader.TCX), c.two.addPod("b", 1, loader.TCX)
	for i, n := range []*node{c.one, c.two} {
		own := []netip.Addr{outside, []end{end1, end2}[i].v4.Addr(), []end{end1, end2}[i].v6.Addr()}
		if err := commit.SetNode(n.maps, own, n.blocks()); err != nil {
			t.Fatal(err)
		}
		n.rows(row(toBackend, 0, 0, 0, 0, deny, 1), row(toBackend, isBackend, 0, 0, 0, deny, 1),
			row(toBackend, isBackend, 32, 6, behind, allow, 2), row(toBackend, isBackend, 32, 17, behind, allow, 2), row(toBackend, isBackend, 32, 132, behind, allow, 2),
			row(toService, 0, 0, 0, 0, deny, 3), row(toService, isService, 0, 0, 0, allow, 4),
			row(fromClient, 0, 0, 0, 0, deny, 5), row(fromClient, isClient, 0, 0, 0, allow, 6),
			row(fromNode, 0, 0, 0, 0, deny, 7), row(fromNode, isNode, 0, 0, 0, allow, 8))
		n.identify(isService, c.vip)
		n.identify(isClient, c.a.v4, c.a.v6)
		n.identify(isBackend, c.b.v4, c.b.v6, c.c.v4, c.c.v6)
	}
	return c
}

// What pods send to Services, and what comes to them through Services, with rules of both styles and addresses of both families.
func TestServices(t *testing.T) {
	for _, style := range []string{"nft", "iptables"} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/v6=%t", style, v6), func(t *testing.T) {
				c := newCluster(t, style, v6)
				for _, test := range []struct {
					name string
					run  func(*cluster, *testing.T)
				}{
					{"judged", (*cluster).testJudged}, {"hairpin", (*cluster).testHairpin}, {"masqueraded", (*cluster).testMasqueraded},
					{"untranslated", (*cluster).testUntranslated}, {"errors", (*cluster).testErrors}, {"from outside", (*cluster).testFromOutside},
					{"from host", (*cluster).testFromHost}, {"to host", (*cluster).testToHost},
					{"unknown", (*cluster).testUnknown}, {"in turn", (*cluster).testInTurn},
				} {
					t.Run(test.name, func(t *testing.T) {
						c.t, c.one.t, c.two.t = t, t, t
						for _, p := range []*pod{c.a, c.c} {
							c.one.policy(p, 0, 0)
						}
						c.two.policy(c.b, 0, 0)
						test.run(c, t)
					})
				}
			})
		}
	}
}

// host is a host's address on the link between both.
func (c *cluster) host(i int) netip.Addr {
	e := []end{end1, end2}[i]
	if c.v6 {
		return e.v6.Addr()
	}
	return e.v4.Addr()
}

// backed makes the Service lead to a pod.
func (c *cluster) backed(by *pod, s service) {
	c.t.Helper()
	s.vip, s.port, s.nodePort, s.to = c.vip, front, nodePort, at(by.addr(c.v6), behind)
	c.one.proxy(c.style, c.v6, s)
}

// hook is where what goes to a backend leaves the first host's stack.
func (c *cluster) hook(backend *pod) string {
	if backend == c.b {
		return "to_net"
	}
	return "to_pod"
}

// udp sends datagrams to and fro, and fails unless they arrive, under the names that both sides know. seen is as whom the backend
// sees the pod.
func (c *cluster) udp(from *pod, to netip.AddrPort, backend *pod, seen netip.Addr) {
	c.t.Helper()
	fd, server := from.socket(c.t, unix.SOCK_DGRAM, 0, c.v6), backend.socket(c.t, unix.SOCK_DGRAM, behind, c.v6)
	defer unix.Close(fd)
	defer unix.Close(server)
	for range 3 {
		send(c.t, fd, "question", to.Addr(), int(to.Port()))
		got, _, source := receive(c.t, server)
		if got != "question" || source.Addr() != seen {
			c.t.Fatalf("%s received %q from %s, want it from %s", backend.name, got, source, seen)
		}
		send(c.t, server, "answer", source.Addr(), int(source.Port()))
		if got, _, source := receive(c.t, fd); got != "answer" || source != to {
			c.t.Fatalf("%s received %q from %s, want it from %s", from.name, got, source, to)
		}
	}
}

// tcp opens a connection.
func (c *cluster) tcp(from *pod, to netip.AddrPort, backend *pod) (client, server int) {
	c.t.Helper()
	listener := backend.socket(c.t, unix.SOCK_STREAM, behind, c.v6)
	defer unix.Close(listener)
	if err := unix.Listen(listener, 8); err != nil {
		c.t.Fatal(err)
	}
	client = from.socket(c.t, unix.SOCK_STREAM, 0, c.v6)
	tv := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(client, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		c.t.Fatal(err)
	}
	if err := connectTo(client, sockaddr(to.Addr(), int(to.Port()))); err != nil {
		c.t.Fatalf("connect to %s: %v; counts %v and %v", to, err, c.one.counts(), c.two.counts())
	}
	server, err := acceptFrom(listener)
	if err != nil {
		c.t.Fatalf("accept: %v", err)
	}
	c.t.Cleanup(func() { unix.Close(server) })
	if err := unix.SetsockoptTimeval(server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		c.t.Fatal(err)
	}
	for _, fd := range []int{client, server} { // no TIME-WAIT in the way of the next test
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			c.t.Fatal(err)
		}
	}
	return client, server
}

// denied sends a datagram and begins a connection, and fails unless host n drops both by a reason.
func (c *cluster) denied(from *pod, to netip.AddrPort, n *node, reason string) {
	c.t.Helper()
	before := n.counts()
	fd := from.socket(c.t, unix.SOCK_DGRAM, 0, c.v6)
	defer unix.Close(fd)
	send(c.t, fd, "question", to.Addr(), int(to.Port()))
	until(c.t, reason+" of a datagram", func() bool { return n.since(before)[reason] == 1 })
	conn := from.socket(c.t, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0, c.v6)
	defer unix.Close(conn)
	if err := connectTo(conn, sockaddr(to.Addr(), int(to.Port()))); !errors.Is(err, unix.EINPROGRESS) {
		c.t.Fatalf("connect: %v", err)
	}
	until(c.t, reason+" of a connection", func() bool { return n.since(before)[reason] >= 2 })
}

// raise raises the first host's epoch.
func (c *cluster) raise() {
	c.t.Helper()
	if _, err := c.one.maps.RaiseEpoch(); err != nil {
		c.t.Fatal(err)
	}
}

func write(t testing.TB, fd int) {
	t.Helper()
	if _, err := writeTo(fd, []byte("cut")); err != nil {
		t.Fatal(err)
	}
}

// addrOf is a socket's own address.
func addrOf(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch s := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	t.Fatalf("address %T", sa)
	return netip.AddrPort{}
}

// What a pod sends to a Service is judged by where it goes, not by where it was sent to, on this host and on others.
func (c *cluster) testJudged(t *testing.T) {
	vip := at(c.vip, front)
	for _, backend := range []*pod{c.c, c.b} {
		c.backed(backend, service{})
		before := c.one.counts()
		c.one.policy(c.a, toBackend, nobody)
		c.udp(c.a, vip, backend, c.a.addr(c.v6))
		client, server := c.tcp(c.a, vip, backend)
		transfer(t, client, server, 1<<18)
		got := c.one.since(before)
		if got["from_pod stack_service"] == 0 || got[c.hook(backend)+" forward_from_stack"] == 0 {
			t.Errorf("counts %v", got)
		}
		for k := range got {
			if strings.Contains(k, "drop") {
				t.Errorf("%d %s", got[k], k)
			}
		}
		local := addrOf(t, client)
		if f := c.one.wantFlow("tcp", local, vip); f.Entered != "service" || !f.Confirmed || f.RuleEgress != 0 || f.Opener != local || f.Sent.Forward != "deferred" {
			t.Errorf("deferred flow: %+v", f)
		}
		if f := c.one.wantFlow("tcp", local, at(backend.addr(c.v6), behind)); f.Entered != "stack" || !f.Confirmed || f.RuleEgress != 2 || f.Opener != local {
			t.Errorf("translated flow: %+v", f)
		}

		// Another epoch keeps it, a policy that denies cuts it both ways, and one that allows lets it go on.
		c.raise()
		transfer(t, client, server, 1<<16)
		c.one.policy(c.a, toService, nobody)
		before = c.one.counts()
		write(t, server)
		answers := map[*pod]string{c.c: "from_pod", c.b: "from_net"}[backend]
		until(t, "the answer's drop", func() bool { return c.one.since(before)[answers+" drop_policy_egress"] > 0 })
		write(t, client)
		until(t, "the drop", func() bool { return c.one.since(before)[c.hook(backend)+" drop_policy_egress"] > 0 })
		c.one.policy(c.a, toBackend, nobody)
		for _, fd := range []int{client, server} {
			if got, err := readFrom(fd, make([]byte, 10)); got != 3 {
				t.Fatalf("read %d bytes: %v", got, err)
			}
		}
		transfer(t, client, server, 1<<16)
		unix.Close(client)
		unix.Close(server)
		c.one.policy(c.a, toService, nobody)
		c.denied(c.a, vip, c.one, c.hook(backend)+" drop_policy_egress")
		c.one.policy(c.a, toBackend, nobody)

		// The responder's policy, which knows the pod.
		n, ingress := c.one, "to_pod drop_policy_ingress"
		if backend == c.b {
			n, ingress = c.two, "from_net drop_policy_ingress"
		}
		n.policy(backend, 0, fromClient)
		c.udp(c.a, vip, backend, c.a.addr(c.v6))
		n.policy(backend, 0, fromNode)
		c.denied(c.a, vip, n, ingress)
		n.policy(backend, 0, 0)
		c.one.policy(c.a, 0, 0)
	}
}

// A pod reaches itself through a Service, whatever policy says, and nobody else does.
func (c *cluster) testHairpin(t *testing.T) {
	c.backed(c.a, service{})
	for _, to := range []netip.AddrPort{at(c.vip, front), at(c.host(0), nodePort)} {
		c.one.policy(c.a, nobody, nobody)
		c.one.policy(c.c, toService, nobody)
		c.udp(c.a, to, c.a, c.seen(c.a))
		client, server := c.tcp(c.a, to, c.a)
		transfer(t, client, server, 1<<16)
		c.raise()
		transfer(t, client, server, 1<<16)
		unix.Close(client)
		unix.Close(server)
		c.denied(c.c, to, c.one, "to_pod drop_policy_egress")
		c.one.policy(c.c, 0, 0)
		c.denied(c.c, to, c.one, "to_pod drop_policy_ingress")
	}
}

// seen is the first host's address as a backend sees it: that of the interface by which it is reached, or its first.
func (c *cluster) seen(backend *pod) netip.Addr {
	if backend == c.b || c.v6 {
		return c.host(0)
	}
	return outside
}

// Where the proxy gives a pod's packets the host's address, as for node ports and with --masquerade-all, it is still the pod that
// is judged.
func (c *cluster) testMasqueraded(t *testing.T) {
	for _, s := range []service{{masqueradeAll: true}, {external: true}, {}} {
		to := at(c.vip, front)
		if s == (service{}) {
			to = at(c.host(0), nodePort)
		}
		for _, backend := range []*pod{c.c, c.b} {
			c.backed(backend, s)
			c.one.policy(c.a, toBackend, nobody)
			c.udp(c.a, to, backend, c.seen(backend))
			client, server := c.tcp(c.a, to, backend)
			transfer(t, client, server, 1<<16)
			c.raise()
			transfer(t, client, server, 1<<16)
			c.one.policy(c.a, toService, nobody)
			before := c.one.counts()
			if backend == c.c { // the answer alone
				write(t, server)
				until(t, "the answer's drop", func() bool { return c.one.since(before)["from_pod drop_policy_egress"] > 0 })
			}
			write(t, client)
			until(t, "the drop", func() bool { return c.one.since(before)[c.hook(backend)+" drop_policy_egress"] > 0 })
			unix.Close(client)
			unix.Close(server)
			c.denied(c.a, to, c.one, c.hook(backend)+" drop_policy_egress")
			c.one.policy(c.a, 0, 0)
		}
	}
}

// A Service without endpoints is refused by the proxy. What nobody translates is judged as what it is.
func (c *cluster) testUntranslated(t *testing.T) {
	c.one.proxy(c.style, c.v6, service{vip: c.vip, port: front})
	c.refused(c.a, at(c.vip, front))

	c.one.proxy(c.style, c.v6)
	c.one.serve(service{vip: c.host(1), port: front})
	c.one.identify(isService, c.host(1))
	c.one.policy(c.a, toBackend, 0)
	c.denied(c.a, at(c.host(1), front), c.one, "to_net drop_policy_egress")
	c.one.policy(c.a, toService, 0)
	c.refused(c.a, at(c.host(1), front))
}

// refused sends a datagram, and fails unless an ICMP error comes back.
func (c *cluster) refused(from *pod, to netip.AddrPort) {
	c.t.Helper()
	fd := from.socket(c.t, unix.SOCK_DGRAM, 0, c.v6)
	defer unix.Close(fd)
	if err := connectTo(fd, sockaddr(to.Addr(), int(to.Port()))); err != nil {
		c.t.Fatal(err)
	}
	if _, err := writeTo(fd, []byte("anybody?")); err != nil {
		c.t.Fatal(err)
	}
	if _, err := readFrom(fd, make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
		c.t.Fatalf("%s: read: %v, want connection refused; counts %v and %v", to, err, c.one.counts(), c.two.counts())
	}
}

// ICMP errors about what goes through a Service find their way back.
func (c *cluster) testErrors(t *testing.T) {
	for _, backend := range []*pod{c.c, c.b} {
		for _, all := range []bool{false, true} {
			c.backed(backend, service{masqueradeAll: all})
			c.one.policy(c.a, toBackend, nobody)
			c.refused(c.a, at(c.vip, front))
		}
	}
}

// Who comes through a node port from outside is judged by the address that he carries behind it.
func (c *cluster) testFromOutside(t *testing.T) {
	for _, local := range []bool{false, true} {
		for _, backend := range []*pod{c.c, c.b} {
			if local && backend == c.b {
				continue
			}
			c.backed(backend, service{local: local})
			n, seen := c.one, c.seen(backend)
			if backend == c.b {
				n = c.two
			}
			if local {
				seen = c.host(1)
			}
			n.identify(isNode, seen)
			n.policy(backend, nobody, fromNode)
			conn, answer := c.outside(backend, seen)
			n.policy(backend, nobody, fromClient)
			before := n.counts()
			if _, err := conn.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			until(t, "the drop", func() bool { return n.since(before)["to_pod drop_policy_ingress"] == 1 })
			before = n.counts()
			answer()
			until(t, "the answer's drop", func() bool { return n.since(before)["from_pod drop_policy_ingress"] == 1 })
			n.policy(backend, 0, 0)
			n.identify(0, seen)
		}
	}
}

// outside asks a backend from the second host through the first one's node port, and is answered.
func (c *cluster) outside(backend *pod, seen netip.Addr) (conn net.Conn, answer func()) {
	c.t.Helper()
	server := backend.socket(c.t, unix.SOCK_DGRAM, behind, c.v6)
	c.two.do(func() (err error) {
		conn, err = net.Dial("udp", at(c.host(0), nodePort).String())
		return err
	})
	c.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	var source netip.AddrPort
	for range 3 {
		if _, err := conn.Write([]byte("question")); err != nil {
			c.t.Fatal(err)
		}
		var got string
		if got, _, source = receive(c.t, server); got != "question" || source.Addr() != seen {
			c.t.Fatalf("%s received %q from %s, want it from %s", backend.name, got, source, seen)
		}
		send(c.t, server, "answer", source.Addr(), int(source.Port()))
		if k, err := conn.Read(make([]byte, 10)); k != len("answer") {
			c.t.Fatalf("read %d bytes: %v; counts %v", k, err, c.one.counts())
		}
	}
	return conn, func() {
		send(c.t, server, "answer", source.Addr(), int(source.Port()))
		unix.Close(server)
	}
}

// A process of the host reaches a Service's pods, on its own host whatever policy says.
func (c *cluster) testFromHost(t *testing.T) {
	c.one.policy(c.c, nobody, nobody)
	for _, backend := range []*pod{c.c, c.b} {
		c.backed(backend, service{})
		server := backend.socket(t, unix.SOCK_DGRAM, behind, c.v6)
		var conn net.Conn
		c.one.do(func() (err error) {
			dialer := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(at(c.host(0), 0))}
			conn, err = dialer.Dial("udp", at(c.vip, front).String())
			return err
		})
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		for range 2 {
			if _, err := conn.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			got, _, source := receive(t, server)
			if got != "question" {
				t.Fatalf("received %q", got)
			}
			send(t, server, "answer", source.Addr(), int(source.Port()))
			if k, err := conn.Read(make([]byte, 10)); k != len("answer") {
				t.Fatalf("read %d bytes: %v", k, err)
			}
		}
		unix.Close(server)
	}
}

// routeToService gives the first host a route to the Service, as its default route is elsewhere: nobody looks it up but who sends or
// refuses.
func (c *cluster) routeToService() error {
	out, err := exec.Command("ip", "route", "replace", c.vip.String(), "via", c.host(1).String()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// A Service may lead to a process of the pod's own host: policy judges that too, at once and as long as it goes on.
func (c *cluster) testToHost(t *testing.T) {
	to := at(c.vip, front)
	c.one.proxy(c.style, c.v6, service{vip: c.vip, port: front, to: at(c.host(0), behind)})
	var listener net.Listener
	var sockets []net.PacketConn
	c.one.do(func() (err error) {
		if listener, err = net.Listen("tcp", at(c.host(0), behind).String()); err != nil {
			return err
		}
		s, err := net.ListenPacket("udp", at(c.host(0), behind).String())
		sockets = append(sockets, s)
		return err
	})
	defer listener.Close()
	defer sockets[0].Close()

	// Refused: nobody is there.
	c.one.policy(c.a, toService, 0)
	before := c.one.counts()
	c.refused(c.a, to)
	fd := c.a.socket(t, unix.SOCK_STREAM, 0, c.v6)
	if err := connectTo(fd, sockaddr(to.Addr(), int(to.Port()))); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("connect: %v, want connection refused; counts %v", err, c.one.since(before))
	}
	unix.Close(fd)
	if got := c.one.since(before)["to_host drop_policy_egress"]; got != 2 {
		t.Errorf("%d packets denied, want 2; counts %v", got, c.one.since(before))
	}

	c.one.identify(isBackend, c.host(0))
	defer c.one.identify(0, c.host(0))
	c.one.policy(c.a, toBackend, 0)
	fd = c.a.socket(t, unix.SOCK_DGRAM, 0, c.v6)
	defer unix.Close(fd)
	send(t, fd, "question", to.Addr(), int(to.Port()))
	buf := make([]byte, 100)
	sockets[0].SetDeadline(time.Now().Add(patience))
	k, source, err := sockets[0].ReadFrom(buf)
	if err != nil || string(buf[:k]) != "question" {
		t.Fatalf("received %q: %v; counts %v", buf[:k], err, c.one.since(before))
	}
	if _, err := sockets[0].WriteTo([]byte("answer"), source); err != nil {
		t.Fatal(err)
	}
	if got, _, source := receive(t, fd); got != "answer" || source != to {
		t.Fatalf("received %q from %s", got, source)
	}
	client := c.a.socket(t, unix.SOCK_STREAM, 0, c.v6)
	if err := connectTo(client, sockaddr(to.Addr(), int(to.Port()))); err != nil {
		t.Fatalf("connect: %v; counts %v", err, c.one.since(before))
	}
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for _, policy := range []uint32{toBackend, toService} {
		c.one.policy(c.a, policy, 0)
		before = c.one.counts()
		if _, err := server.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if policy == toService {
			until(t, "the drop", func() bool { return c.one.since(before)["to_pod drop_policy_egress"] > 0 })
		} else if k, err := readFrom(client, buf); k != 5 {
			t.Fatalf("read %d bytes: %v", k, err)
		}
	}
	// What the pod answers a process of the host is no opening.
	c.one.policy(c.a, nobody, nobody)
	pod := c.a.socket(t, unix.SOCK_DGRAM, 9000, c.v6)
	defer unix.Close(pod)
	if _, err := sockets[0].WriteTo([]byte("probe"), net.UDPAddrFromAddrPort(at(c.a.addr(c.v6), 9000))); err != nil {
		t.Fatal(err)
	}
	if got, _, source := receive(t, pod); got != "probe" {
		t.Fatalf("received %q from %s", got, source)
	}
	send(t, pod, "alive", c.host(0), behind)
	if k, _, err := sockets[0].ReadFrom(buf); err != nil || string(buf[:k]) != "alive" {
		t.Fatalf("received %q: %v; counts %v", buf[:k], err, c.one.since(before))
	}
}

// Where the programs know that they were not told of all that the proxy translates, what a pod sends is judged by its own address, and
// then as what the stack made of it: the pod's still, whatever address the stack gave it.
func (c *cluster) testUnknown(t *testing.T) {
	c.one.identify(isService, c.vip, c.host(0))
	defer c.one.identify(0, c.host(0))
	for _, s := range []service{{}, {external: true}, {masqueradeAll: true}} {
		for _, backend := range []*pod{c.c, c.b} {
			for _, to := range []netip.AddrPort{at(c.vip, front), at(c.host(0), nodePort)} {
				c.backed(backend, s)
				if _, _, err := commit.SetServices(c.one.maps, []maps.Service{maps.Others}); err != nil {
					t.Fatal(err)
				}
				c.one.policy(c.a, toService, nobody)
				c.denied(c.a, to, c.one, c.hook(backend)+" drop_policy_egress")
				c.one.policy(c.a, toBackend, nobody)
				c.denied(c.a, to, c.one, "from_pod drop_policy_egress")
				c.one.policy(c.a, 0, nobody)
				if to.Addr() == c.vip && s == (service{}) {
					c.udp(c.a, to, backend, c.a.addr(c.v6))
				} else {
					c.udp(c.a, to, backend, c.seen(backend))
				}
			}
		}
	}
}

// One socket asks a pod straight and by its Service in turn, and is answered by whom it asked.
func (c *cluster) testInTurn(t *testing.T) {
	for _, backend := range []*pod{c.c, c.b} {
		c.backed(backend, service{})
		fd, server := c.a.socket(t, unix.SOCK_DGRAM, 0, c.v6), backend.socket(t, unix.SOCK_DGRAM, behind, c.v6)
		for i := range 6 {
			to := []netip.AddrPort{at(backend.addr(c.v6), behind), at(c.vip, front)}[i%2]
			send(t, fd, "question", to.Addr(), int(to.Port()))
			got, _, source := receive(t, server)
			if got != "question" || source.Addr() != c.a.addr(c.v6) {
				t.Fatalf("%s received %q from %s", backend.name, got, source)
			}
			send(t, server, "answer", source.Addr(), int(source.Port()))
			if got, _, source := receive(t, fd); got != "answer" || source != to {
				t.Fatalf("the answer to %d is %q from %s, want it from %s; counts %v", i, got, source, to, c.one.counts())
			}
		}
		unix.Close(fd)
		unix.Close(server)
	}
}
