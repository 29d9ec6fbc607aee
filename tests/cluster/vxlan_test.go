package cluster

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// vxlan are the cluster's pools with a VXLAN mode.
func vxlan(mode string) string {
	return strings.NewReplacer("natOutgoing: true", "natOutgoing: true, vxlanMode: "+mode, `244::/64"`, `244::/64", vxlanMode: `+mode).Replace(pools)
}

// pings waits until an address answers a process of that namespace, and wants a TTL if it is not 0.
func pings(t *testing.T, from lab.Namespace, to netip.Addr, ttl int) {
	t.Helper()
	var out string
	eventually(t, "ping "+to.String(), func() (err error) {
		out, err = from.Exec(t.Context(), "ping", "-c", "3", "-i", "0.05", "-W", "1", to.String())
		return err
	})
	for _, m := range ttls.FindAllStringSubmatch(out, -1) {
		if ttl != 0 && m[1] != fmt.Sprint(ttl) {
			t.Errorf("%s answers with ttl %s, want %d", to, m[1], ttl)
		}
	}
}

// counted is how many packets a host's programs counted with a verdict.
func counted(t *testing.T, h *lab.Host, hook, verdict string) (n uint64) {
	t.Helper()
	var all []struct {
		Hook, Verdict string
		Packets       uint64
	}
	must(t, json.Unmarshal([]byte(ctl(t, h, "", "counters", "--all", "-o", "json")), &all))
	for _, c := range all {
		if c.Hook == hook && c.Verdict == verdict {
			n += c.Packets
		}
	}
	return n
}

// TestVXLAN: pods and hosts reach the pods of others through the tunnel, whatever lies between the hosts; what the tunnel can't
// carry is said; only the host that has a block speaks for it; and everything goes again with the mode.
func TestVXLAN(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	h1, h2 := l.Host(1), l.Host(2)
	ctl(t, h1, vxlan("Always"), "apply", "-f", "-")
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" has tunnel routes", func() error {
			routes, err := h.Exec(ctx, "caracalctl", "routes", "--kind", "tunnel", "-o", "json")
			if n := strings.Count(routes, `"prefix"`); err == nil && n != 2 {
				err = fmt.Errorf("%d of them", n)
			}
			return err
		})
		ready(t, h, 1)
	}
	a, b := h1.TestPod(t, "a", lab.PodOptions{}), h2.TestPod(t, "b", lab.PodOptions{})
	for _, to := range []netip.Addr{b.Addr(), b.Addr6()} {
		pings(t, a.Namespace(), to, 62)
		pings(t, h1.Namespace(), to, 63)
	}
	pings(t, b.Namespace(), a.Addr(), 62)
	if n, m := counted(t, h1, "from_pod", "forward_tunnel"), counted(t, h2, "from_net", "forward_pod"); n < 6 || m < 6 {
		t.Errorf("%d packets went into the tunnel, %d came out of it to pods", n, m)
	}
	routes, err := h1.Exec(ctx, "ip", "route")
	must(t, err)
	if !strings.Contains(routes, "encap ip id 4096 src 0.0.0.0 dst "+h2.Addr().String()) {
		t.Error(routes)
	}
	t.Logf("h1# ip route\n%sh1# ip -d link show vxlan.caracal\n%s", routes, must1(h1.Exec(ctx, "ip", "-d", "link", "show", "vxlan.caracal"))(t))

	// What fits goes; what does not is said, by the pod's own kernel or by the host's.
	if _, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(1500-70-28), b.Addr().String()); err != nil {
		t.Errorf("a packet of the tunnel's MTU: %v", err)
	}
	if out, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(1500-70-28+1), b.Addr().String()); err == nil || !strings.Contains(err.Error()+out, "1430") {
		t.Errorf("a packet beyond it: %v %s", err, out)
	}
	if _, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-s", "4000", b.Addr().String()); err != nil {
		t.Errorf("fragments: %v", err)
	}

	// A stranger encapsulates in the name of b's host.
	before := counted(t, h1, "from_net", "drop_tunnel")
	eventually(t, "the stranger's packets to be dropped", func() error {
		must(t, l.Outside().Do(func() error {
			c, err := net.Dial("udp", net.JoinHostPort(h1.Addr().String(), "4789"))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(encapsulated(b.Addr(), a.Addr()))
			return err
		}))
		if n := counted(t, h1, "from_net", "drop_tunnel"); n == before {
			return fmt.Errorf("%d were dropped before, now %d", before, n)
		}
		return nil
	})
	ctl(t, h1, "", "ipam", "check")
	t.Logf("h1# caracalctl doctor\n%s", ctl(t, h1, "", "doctor", "--resolv-conf", "/dev/null"))

	// Hosts that share a network need no tunnel; with a router between them they do.
	ctl(t, h1, vxlan("CrossSubnet"), "apply", "-f", "-")
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" goes without the tunnel", func() error {
			if routes, err := h.Exec(ctx, "caracalctl", "routes", "--kind", "remote", "-o", "json"); err != nil || strings.Count(routes, `"prefix"`) < 2 {
				return fmt.Errorf("%v %s", err, routes)
			}
			return nil
		})
	}
	pings(t, a.Namespace(), b.Addr(), 62)
	outside := must1(l.Outside().Exec(ctx, "hostname", "-I"))(t)
	var router string
	for _, x := range strings.Fields(outside) {
		if strings.HasPrefix(x, "192.0.2.") {
			router = x
		}
	}
	must1(l.Outside().Exec(ctx, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0"))(t)
	for i, h := range l.Hosts() {
		must1(h.Exec(ctx, "ip", "route", "add", l.Hosts()[1-i].Addr().String()+"/32", "via", router))(t)
		must(t, h.Signal(ctx, "caracald", 9)) // an agent that starts finds it so
		must(t, h.StartAgent(ctx))
	}
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" takes the tunnel for IPv4", func() error {
			routes, err := h.Exec(ctx, "caracalctl", "routes", "--kind", "tunnel", "-o", "json")
			if err == nil && !strings.Contains(routes, "10.244.") {
				err = fmt.Errorf("%s", routes)
			}
			return err
		})
	}
	pings(t, a.Namespace(), b.Addr(), 62)

	if out := ctl(t, h2, "", "uninstall", "--dry-run"); !strings.Contains(out, "vxlan.caracal") {
		t.Error(out)
	}
	ctl(t, h1, pools, "apply", "-f", "-")
	for i, h := range l.Hosts() {
		must1(h.Exec(ctx, "ip", "route", "del", l.Hosts()[1-i].Addr().String()+"/32", "via", router))(t)
	}
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" has no tunnel", func() error {
			if out, err := h.Exec(ctx, "ip", "link", "show", "vxlan.caracal"); err == nil {
				return fmt.Errorf("it has: %s", out)
			}
			return nil
		})
	}
	for _, to := range []netip.Addr{b.Addr(), b.Addr6()} {
		pings(t, a.Namespace(), to, 62)
	}
}

// inTunnel are a host's addresses in the tunnel: those that its interface has, and those that node.db has for it.
func inTunnel(t *testing.T, h *lab.Host) (has, held []netip.Addr) {
	t.Helper()
	out, _ := h.Exec(t.Context(), "ip", "-o", "addr", "show", "dev", "vxlan.caracal") // there may be none
	for _, m := range regexp.MustCompile(`inet6? (\S+)/`).FindAllStringSubmatch(out, -1) {
		has = append(has, netip.MustParseAddr(m[1]))
	}
	db, err := node.OpenReadOnly(t.Context(), h.StateDir(), node.Options{BootIDFile: h.BootIDFile()})
	must(t, err)
	defer db.Close()
	must(t, db.View(func(tx *node.Tx) error {
		all, err := tx.Held(ipam.TunnelKey)
		for _, x := range all {
			held = append(held, x.Addr)
		}
		return err
	}))
	slices.SortFunc(has, netip.Addr.Compare)
	slices.SortFunc(held, netip.Addr.Compare)
	return has, held
}

// TestTunnelAddresses: a host's addresses in the tunnel are there as long as a pool of their family is encapsulated; then they are
// off the interface, and a pod may have them.
func TestTunnelAddresses(t *testing.T) {
	l := newCluster(t, 2)
	h, b := l.Host(1), l.Host(2).TestPod(t, "b", lab.PodOptions{})
	change := func(pools string, families ...bool) (v4 netip.Addr) { // of each address, whether it is one of IPv6
		t.Helper()
		ctl(t, h, pools, "apply", "-f", "-")
		eventually(t, fmt.Sprintf("addresses of families %v", families), func() error {
			has, held := inTunnel(t, h)
			if !slices.Equal(has, held) || !slices.EqualFunc(has, families, func(a netip.Addr, v6 bool) bool { return a.Is6() == v6 }) {
				return fmt.Errorf("the interface has %v, node.db %v", has, held)
			}
			if len(has) > 0 {
				v4 = has[0]
			}
			return nil
		})
		return v4
	}
	had := change(vxlan("Always"), false, true)
	change(strings.Replace(pools, `244::/64"`, `244::/64", vxlanMode: Always`, 1), true)
	p := h.TestPod(t, "heir", lab.PodOptions{IPs: []netip.Addr{had}})
	if p.Addr() != had {
		t.Fatalf("the pod has %s, asked for %s", p.Addr(), had)
	}
	pings(t, p.Namespace(), b.Addr(), 62)
	pings(t, p.Namespace(), b.Addr6(), 62)
	pings(t, h.Namespace(), had, 64)
	change(pools)
	if out, err := h.Exec(t.Context(), "ip", "link", "show", "vxlan.caracal"); err == nil {
		t.Error(out)
	}
	only := change(strings.Replace(pools, "natOutgoing: true", "natOutgoing: true, vxlanMode: Always", 1), false)
	if both := change(vxlan("Always"), false, true); both != only { // pools come one by one
		t.Errorf("the host's address in the tunnel became %s with another family, from %s", both, only)
	}
	pings(t, p.Namespace(), b.Addr(), 62)
	ready(t, h, 1)
	ctl(t, h, "", "ipam", "check")
}

// TestPoolIsBlock: pools of just one block. Its node has it as its own, with nothing to complain of; the other learns a route that
// is as wide as the pool.
func TestPoolIsBlock(t *testing.T) {
	const one = `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: %s}
spec: {cidr: %q, natOutgoing: true, vxlanMode: %s, nodeSelector: rack == "%s"}
---
`
	const racks = `apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: h1, labels: {rack: a}}
---
apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: h2, labels: {rack: b}}
`
	small := func(mode string) string {
		return fmt.Sprintf(one+one+one+one, "a4", "10.244.0.0/26", mode, "a", "b4", "10.245.0.0/26", mode, "b",
			"a6", "2001:db8:244::/122", mode, "a", "b6", "2001:db8:245::/122", mode, "b")
	}
	l := newClusterOf(t, 2, small("Never")+racks, testenv.Bin)
	h1, h2 := l.Host(1), l.Host(2)
	a, b := h1.TestPod(t, "a", lab.PodOptions{}), h2.TestPod(t, "b", lab.PodOptions{})
	for _, mode := range []string{"Never", "Always", "Never"} {
		ctl(t, h1, small(mode), "apply", "-f", "-")
		kind := map[string]string{"Never": "remote", "Always": "tunnel"}[mode]
		for _, h := range l.Hosts() {
			eventually(t, h.Name+" has routes to the other's blocks, and none to its own", func() error {
				var routes []struct{ Prefix, Kind string }
				if err := json.Unmarshal([]byte(ctl(t, h, "", "routes", "-o", "json")), &routes); err != nil {
					return err
				}
				kinds := make(map[string]int)
				for _, r := range routes {
					if strings.HasSuffix(r.Prefix, "/26") || strings.HasSuffix(r.Prefix, "/122") {
						kinds[r.Kind]++
					}
				}
				if len(kinds) != 2 || kinds[kind] != 2 || kinds["blackhole"] != 2 {
					return fmt.Errorf("%v", routes)
				}
				return nil
			})
			ready(t, h, 1)
		}
		for _, to := range []netip.Addr{b.Addr(), b.Addr6()} {
			pings(t, a.Namespace(), to, 62)
		}
		if seen, err := seenBy(t, l, a, lab.Outside4); err != nil || seen.Addr() != h1.Addr() {
			t.Errorf("the world sees %s (%v), want %s", seen, err, h1.Addr())
		}
	}
}

// TestVXLANOverIPv6: hosts without an IPv4 address, whose pods' packets are encapsulated in IPv6.
func TestVXLANOverIPv6(t *testing.T) {
	testenv.NeedRoot(t)
	ctx := t.Context()
	l := lab.New(t, lab.Config{Hosts: 2, Outside: true, Cluster: true, Caracal: testenv.Bin(t, "caracal")})
	var text strings.Builder
	for i, h := range l.Hosts() {
		fmt.Fprintf(&text, `apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: %[1]s, labels: {is: %[1]s}}
spec: {bgp: {ipv6Address: '%[2]s/64'}}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: of-%[1]s}
spec: {cidr: '2001:db8:24%[3]d::/112', vxlanMode: Always, natOutgoing: true, nodeSelector: is == "%[1]s"}
---
`, h.Name, h.Addr6(), 4+i)
	}
	for _, h := range l.Hosts() {
		must1(h.Exec(ctx, "ip", "-4", "addr", "flush", "dev", "eth0"))(t)
		ctl(t, h, text.String(), "apply", "-f", "-")
		must(t, h.StartAgent(ctx, "--ip", ""))
	}
	for _, h := range l.Hosts() {
		is(t, h, "has a session and a tunnel route", func(s agent.Status) bool {
			return s.Ready && len(s.Problems) == 0 && len(peersWith(s, true)) == 1 && s.Written == 1 && slices.Contains(s.Uplinks, "vxlan.caracal")
		})
	}
	h1, h2 := l.Host(1), l.Host(2)
	a, b := h1.TestPod(t, "a", lab.PodOptions{}), h2.TestPod(t, "b", lab.PodOptions{})
	pings(t, a.Namespace(), b.Addr6(), 62)
	pings(t, b.Namespace(), a.Addr6(), 62)
	pings(t, h1.Namespace(), b.Addr6(), 63)
	if n, m := counted(t, h1, "from_pod", "forward_tunnel"), counted(t, h2, "from_net", "forward_pod"); n < 3 || m < 3 {
		t.Errorf("%d packets went into the tunnel, %d came out of it to pods", n, m)
	}
	routes := kernelRoutes(t, h1)
	if len(routes) != 1 || !strings.Contains(routes[0], "dst "+h2.Addr6().String()) {
		t.Errorf("%q", routes)
	}
	if _, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(1500-70-48), b.Addr6().String()); err != nil {
		t.Errorf("a packet of the tunnel's MTU: %v", err)
	}
	if out, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", fmt.Sprint(1500-70-48+1), b.Addr6().String()); err == nil || !strings.Contains(err.Error()+out, "1430") {
		t.Errorf("a packet beyond it: %v %s", err, out)
	}
	if _, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", "-s", "4000", b.Addr6().String()); err != nil {
		t.Errorf("fragments: %v", err)
	}
	seen, err := seenBy(t, l, a, lab.Outside6)
	if err != nil || seen.Addr() != h1.Addr6() {
		t.Errorf("the world sees %s (%v), want %s", seen, err, h1.Addr6())
	}
	for _, h := range l.Hosts() {
		t.Logf("%s# caracalctl doctor\n%s", h.Name, ctl(t, h, "", "doctor", "--resolv-conf", "/dev/null"))
	}
}

// must1 is must for what has a value.
func must1(out string, err error) func(t *testing.T) string {
	return func(t *testing.T) string {
		t.Helper()
		must(t, err)
		return out
	}
}

// encapsulated is a VXLAN packet's payload (RFC 7348): an ICMP echo request from one pod to another.
func encapsulated(from, to netip.Addr) []byte {
	p := []byte{8, 0, 0, 0, 0, 16, 0, 0} // network 4096
	mac := []byte{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
	p = append(p, append(append([]byte{}, mac...), mac...)...)
	p = append(p, 8, 0)
	ip := []byte{0x45, 0, 0, 28, 0, 1, 0, 0, 64, 1, 0, 0}
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	icmp := []byte{8, 0, 0, 0, 0, 7, 0, 1}
	for _, c := range []struct {
		b  []byte
		at int
	}{{ip, 10}, {icmp, 2}} {
		var sum uint32
		for i := 0; i < len(c.b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(c.b[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(c.b[c.at:], ^uint16(sum+sum>>16))
	}
	return append(append(p, ip...), icmp...)
}

// TestVXLANPort: a port that something else has is not taken over. The status says so, and what was there goes on.
func TestVXLANPort(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	h := l.Host(1)
	must1(h.Exec(ctx, "ip", "link", "add", "theirs", "type", "vxlan", "id", "7", "dstport", "4789", "dev", "eth0", "group", "239.1.1.1"))(t)
	must1(h.Exec(ctx, "ip", "link", "set", "theirs", "up"))(t)
	a, b := h.TestPod(t, "a", lab.PodOptions{}), l.Host(2).TestPod(t, "b", lab.PodOptions{})
	pings(t, a.Namespace(), b.Addr(), 62)
	ctl(t, h, vxlan("Always"), "apply", "-f", "-")
	eventually(t, "the status to tell of the port", func() error {
		s, err := status(t, h)
		for _, p := range s.Problems {
			if p.About == "tunnel" && strings.Contains(p.Text, "UDP port 4789 is in use") {
				return nil
			}
		}
		return fmt.Errorf("%+v %v", s.Problems, err)
	})
	if out := must1(h.Exec(ctx, "ip", "-o", "link", "show", "theirs"))(t); !strings.Contains(out, ",UP") {
		t.Error(out)
	}
	must1(h.Exec(ctx, "ip", "link", "del", "theirs"))(t)
	begin := time.Now()
	pings(t, a.Namespace(), b.Addr(), 62)
	t.Logf("over the tunnel %s after the port was free", time.Since(begin).Round(time.Millisecond))
}
