package cluster

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

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
