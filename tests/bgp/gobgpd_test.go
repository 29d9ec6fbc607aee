package bgp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/bgp"
)

// gobgpd is Debian's gobgpd in a router.
type gobgpd struct{ *router }

// gobgpd starts it with neighbors that dial it, each with more settings of its own.
func (r *router) gobgpd(as uint32, neighbors map[int]string) *gobgpd {
	t := r.net.t
	t.Helper()
	config := fmt.Sprintf("[global.config]\n as = %d\n router-id = %q\n local-address-list = [%q]\n", as, r.v4, r.v4)
	for n, more := range neighbors {
		config += fmt.Sprintf(`
[[neighbors]]
 [neighbors.config]
  neighbor-address = "%s"
  peer-as = %d
 [neighbors.timers.config]
  connect-retry = 1
  hold-time = 9
  keepalive-interval = 3
 [neighbors.transport.config]
  passive-mode = true
 [neighbors.graceful-restart.config]
  enabled = true
  restart-time = 5
 [[neighbors.afi-safis]]
  [neighbors.afi-safis.config]
   afi-safi-name = "ipv4-unicast"
  [neighbors.afi-safis.mp-graceful-restart.config]
   enabled = true
 [[neighbors.afi-safis]]
  [neighbors.afi-safis.config]
   afi-safi-name = "ipv6-unicast"
  [neighbors.afi-safis.mp-graceful-restart.config]
   enabled = true
%s`, v4(n), ourAS, more)
	}
	g := &gobgpd{r}
	r.start(program(t, "gobgpd", "gobgpd"), "-f", r.net.write("gobgpd.toml", config), "--api-hosts", "127.0.0.1:50051", "--pprof-disable")
	eventually(t, "gobgpd to answer", func() bool { _, err := g.ask("global"); return err == nil })
	return g
}

func (g *gobgpd) ask(arg ...string) (string, error) {
	return g.exec(append([]string{program(g.net.t, "gobgp", "gobgpd"), "-p", "50051"}, arg...)...)
}

func (g *gobgpd) must(arg ...string) {
	g.net.t.Helper()
	if out, err := g.ask(arg...); err != nil {
		g.net.t.Fatalf("gobgp %v: %v\n%s", arg, err, out)
	}
}

// has tells whether its table has p, on a line with all the words.
func (g *gobgpd) has(p netip.Prefix, words ...string) bool {
	family := "ipv4"
	if p.Addr().Is6() {
		family = "ipv6"
	}
	out, err := g.ask("global", "rib", p.String(), "-a", family)
	if err != nil {
		return false
	}
	for line := range strings.Lines(out) {
		// "*>" is the best path; that there is none is said in words with the prefix in them.
		if strings.Contains(line, "*>") && strings.Contains(line, p.String()) && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			return true
		}
	}
	return false
}

func TestGoBGPRoutes(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 2)
	g := r[1].gobgpd(theirAS, map[int]string{1: ""})
	g.must("global", "rib", "add", block4(2).String(), "community", "64513:7")
	g.must("global", "rib", "add", block6(2).String(), "nexthop", v6(2).String(), "-a", "ipv6")
	s := r[0].speak(ourAS)
	p := to(2, theirAS)
	p.Communities = []string{"65001:100", "65001:1:2"}
	s.setPeers(p)
	s.announce(block4(1), block6(1))
	eventually(t, "routes of gobgpd", func() bool { return s.has(block4(2), block6(2)) })
	if got := s.route(block4(2)); got.NextHop != v4(2) || !slices.Equal(got.Communities, []string{"64513:7"}) || !slices.Equal(got.ASPath, []uint32{theirAS}) {
		t.Errorf("learned %+v", got)
	}
	if got := s.route(block6(2)); got.NextHop != v6(2) {
		t.Errorf("learned %+v", got)
	}
	eventually(t, "our routes", func() bool {
		return g.has(block4(1), "192.0.2.1", "65001:100", "65001:1:2") && g.has(block6(1), "2001:db8::1")
	})
	g.must("global", "rib", "del", block4(2).String())
	eventually(t, "the withdrawal", func() bool { return !s.has(block4(2)) })
	s.announce()
	eventually(t, "our withdrawal", func() bool { return !g.has(block4(1)) })
	eventually(t, "our withdrawal of IPv6", func() bool { return !g.has(block6(1)) })
}

// TestGoBGPReflects: gobgpd reflects between two of ours.
func TestGoBGPReflects(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 3)
	client := `
 [neighbors.route-reflector.config]
  route-reflector-client = true
  route-reflector-cluster-id = "192.0.2.3"
`
	r[2].gobgpd(ourAS, map[int]string{1: client, 2: client})
	var speakers []*speaker
	for _, router := range r[:2] {
		s := router.speak(ourAS)
		s.setPeers(to(3, ourAS))
		s.announce(block4(router.n), block6(router.n))
		speakers = append(speakers, s)
	}
	eventually(t, "reflected routes", func() bool { return speakers[0].has(block4(2), block6(2)) && speakers[1].has(block4(1), block6(1)) })
	if got := speakers[0].route(block4(2)); got.From != v4(3) || got.NextHop != v4(2) {
		t.Errorf("learned %+v", got)
	}
	if got := speakers[0].route(block6(2)); got.NextHop != v6(2) {
		t.Errorf("learned %+v", got)
	}
	if speakers[0].alarmed(bgp.ForeignOrigin) || speakers[1].alarmed(bgp.ForeignOrigin) {
		t.Error("an alarm about an own block")
	}
	for _, s := range speakers {
		eventually(t, "everything from everybody", s.isSynced)
	}
}
