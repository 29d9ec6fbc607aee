package bgp

import (
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// frr is FRR's bgpd in a router, without zebra: it keeps what it learns to itself.
type frr struct {
	*router
	dir string
}

// frr starts bgpd with the configuration that follows `router bgp AS`.
func (r *router) frr(as uint32, config string) *frr {
	t := r.net.t
	t.Helper()
	// bgpd gives up root, and its sockets are where it may write.
	dir, err := os.MkdirTemp("", "bgpt-frr-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	path := program(t, "bgpd", "frr")
	owner, err := user.Lookup("frr")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(owner.Uid)
	gid, _ := strconv.Atoi(owner.Gid)
	text := fmt.Sprintf("router bgp %d\n bgp router-id %s\n no bgp ebgp-requires-policy\n no bgp network import-check\n bgp graceful-restart\n%s", as, r.v4, config)
	file := filepath.Join(dir, "bgpd.conf")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, file} {
		if err := os.Chown(p, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	f := &frr{r, dir}
	r.start(path, "-f", file, "--vty_socket", dir, "-i", filepath.Join(dir, "bgpd.pid"), "-z", filepath.Join(dir, "zserv.api"),
		"--log", "stdout", "-n", "-S", "-P", "0")
	eventually(t, "bgpd to answer", func() bool { _, err := f.ask("show version"); return err == nil })
	return f
}

func (f *frr) ask(command string) (string, error) {
	return f.exec(program(f.net.t, "vtysh", "frr"), "--vty_socket", f.dir, "-d", "bgpd", "-c", command)
}

func (f *frr) has(p netip.Prefix, words ...string) bool {
	family := "ipv4"
	if p.Addr().Is6() {
		family = "ipv6"
	}
	out, err := f.ask(fmt.Sprintf("show bgp %s unicast %s", family, p))
	if err != nil || strings.Contains(out, "not in table") {
		return false
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			return false
		}
	}
	return true
}

func TestFRR(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	f := r[1].frr(theirAS, ` neighbor 192.0.2.1 remote-as 64512
 neighbor 192.0.2.1 password secret
 neighbor 192.0.2.1 timers 3 9
 neighbor 192.0.2.1 timers connect 1
 address-family ipv4 unicast
  network 10.10.2.0/26
 exit-address-family
 address-family ipv6 unicast
  network 2001:db8:10:2::/122
  neighbor 192.0.2.1 activate
  neighbor 192.0.2.1 route-map six out
 exit-address-family
exit
route-map six permit 10
 set ipv6 next-hop global 2001:db8::2
exit
`)
	s := r[0].speak(ourAS)
	p := to(2, theirAS)
	p.Password = "secret"
	p.Communities = []string{"65001:100", "65001:1:2"}
	s.setPeers(p)
	s.announce(block4(1), block6(1))
	eventually(t, "routes of FRR", func() bool { return s.has(block4(2), block6(2)) })
	if got := s.route(block4(2)); got.NextHop != v4(2) {
		t.Errorf("learned %+v", got)
	}
	if got := s.route(block6(2)); got.NextHop != v6(2) {
		t.Errorf("learned %+v", got)
	}
	eventually(t, "our routes", func() bool {
		return f.has(block4(1), "192.0.2.1", "65001:100", "65001:1:2") && f.has(block6(1), "2001:db8::1")
	})
	eventually(t, "everything from everybody", s.isSynced)
	told := s.told()

	// We die and come back; FRR keeps our routes as stale.
	s.kill()
	eventually(t, "FRR to keep our route as stale", func() bool { return f.has(block4(1), "stale") })
	s = r[0].speak(ourAS)
	s.setPeers(p)
	s.announce(block4(1), block6(1))
	eventually(t, "our route, fresh", func() bool {
		return s.isSynced() && f.has(block4(1)) && !f.has(block4(1), "stale") && f.has(block6(1)) && !f.has(block6(1), "stale")
	})
	if s.told() != told {
		t.Errorf("the second life learned %d routes, the first %d", s.told(), told)
	}
	s.announce(block4(1))
	eventually(t, "our withdrawal", func() bool { return !f.has(block6(1)) && f.has(block4(1)) })
}
