package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// is waits until a host's agent says something.
func is(t testing.TB, h *lab.Host, what string, ok func(s agent.Status) bool) {
	t.Helper()
	eventually(t, h.Name+": "+what, func() error {
		s, err := status(t, h)
		if err == nil && !ok(s) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
}

// peersWith are the hosts' addresses that a host has a session with, or is to have one.
func peersWith(s agent.Status, established bool) (all []string) {
	for _, p := range s.Peers {
		if !established || p.Info == "Established" {
			all = append(all, p.Address.String())
		}
	}
	return all
}

func addresses(hosts ...*lab.Host) (all []string) {
	for _, h := range hosts {
		all = append(all, h.Addr().String(), h.Addr6().String())
	}
	return all
}

func same(x, y []string) bool {
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}

const reflector = `apiVersion: projectcalico.org/v3
kind: Node
metadata: {name: h1, labels: {route-reflector: ""}}
spec: {bgp: {routeReflectorClusterID: 244.0.0.1}}
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: peer-with-route-reflectors}
spec: {nodeSelector: "!has(route-reflector)", peerSelector: has(route-reflector)}
`

const noMesh = `apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata: {name: default}
spec: {nodeToNodeMeshEnabled: false}
`

// TestRouteReflector: two nodes have no session with each other and know each other's blocks by a third, which is the next
// hop of none. The reflector needs no peer of its own, and none of it is lost when its agent starts again.
func TestRouteReflector(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	rr, two, three := l.Host(1), l.Host(2), l.Host(3)
	pod2, pod3 := two.TestPod(t, "two", lab.PodOptions{}), three.TestPod(t, "three", lab.PodOptions{})
	reaches(t, pod2, pod3)

	// With the mesh: the others stay in it, the reflector leaves it.
	ctl(t, rr, reflector, "apply", "-f", "-")
	for h, reflected := range map[*lab.Host]int{rr: 4, two: 2, three: 2} {
		is(t, h, "peers with all", func(s agent.Status) bool {
			return s.Ready && len(peersWith(s, true)) == 4 && strings.Count(fmt.Sprint(s.Peers), "node specific") == reflected
		})
	}

	ctl(t, rr, noMesh, "apply", "-f", "-")
	whole := func() {
		t.Helper()
		is(t, rr, "peers with both", func(s agent.Status) bool { return same(peersWith(s, true), addresses(two, three)) })
		for _, h := range []*lab.Host{two, three} {
			is(t, h, "peers with the reflector alone", func(s agent.Status) bool {
				return s.Ready && len(s.Problems) == 0 && s.Written >= 4 && same(peersWith(s, true), addresses(rr)) && len(s.Peers) == 2
			})
		}
		reaches(t, pod2, pod3)
		reaches(t, pod3, pod2)
	}
	whole()
	routes, err := two.Exec(ctx, "ip", "route")
	must(t, err)
	if want := fmt.Sprintf(" via %s dev", three.Addr()); !strings.Contains(routes, want) {
		t.Errorf("no route%s of\n%s", want, routes)
	}
	table := ctl(t, two, "", "node", "status")
	if !strings.Contains(table, "| node specific | up    |") {
		t.Errorf("%s", table)
	}

	must(t, rr.Signal(ctx, "caracald", unix.SIGKILL))
	must(t, rr.StartAgent(ctx))
	whole()
	// By its address: all have it as a peer, and it them.
	ctl(t, rr, fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: h1}\nspec: {peerIP: %s, asNumber: 64512}\n", rr.Addr()), "apply", "-f", "-")
	ctl(t, rr, "", "delete", "bgppeer", "peer-with-route-reflectors")
	is(t, rr, "peers with both by IPv4", func(s agent.Status) bool {
		return same(peersWith(s, true), []string{two.Addr().String(), three.Addr().String()}) && len(s.Peers) == 2
	})
	for _, h := range []*lab.Host{two, three} {
		is(t, h, "peers with the reflector by IPv4", func(s agent.Status) bool {
			return same(peersWith(s, true), []string{rr.Addr().String()}) && len(s.Peers) == 1 && s.Peers[0].Kind == bgp.Global && s.Written == 2
		})
	}
	if node := ctl(t, rr, "", "get", "node", "h1", "-o", "yaml"); !strings.Contains(node, "route-reflector: \"\"") || !strings.Contains(node, "routeReflectorClusterID: 244.0.0.1") {
		t.Errorf("%s", node)
	}
}

const selected = `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: everybody}
spec: {cidr: 10.244.0.0/16}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: rack1}
spec: {cidr: 10.245.0.0/16, nodeSelector: rack == "1"}
---
apiVersion: projectcalico.org/v3
kind: BGPPeer
metadata: {name: tor1}
spec: {peerIP: 192.0.2.254, asNumber: 64999, nodeSelector: rack == "1"}
`

func label(h *lab.Host, labels string) string {
	return fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: %s, labels: {%s}}\n", h.Name, labels)
}

// TestNodeSelectors: pools and peers of some nodes, which label themselves or are labelled by an operator.
func TestNodeSelectors(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedProgram(t, "etcd", "etcd-server")
	l := lab.New(t, lab.Config{Hosts: 2, Outside: true, Cluster: true, Caracal: testenv.Bin(t, "caracal")})
	ctx := t.Context()
	must(t, l.StartEtcd(ctx))
	one, two := l.Host(1), l.Host(2)
	ctl(t, one, selected, "apply", "-f", "-")
	must(t, one.StartAgent(ctx, "--label", "rack=1,room=a"))
	must(t, two.StartAgent(ctx))
	rack1 := netip.MustParsePrefix("10.245.0.0/16")
	inRack := func(s agent.Status) bool {
		return slices.ContainsFunc(s.Blocks, func(b netip.Prefix) bool { return rack1.Overlaps(b) }) &&
			slices.Contains(peersWith(s, false), "192.0.2.254")
	}
	outside := func(s agent.Status) bool {
		return s.Ready && len(s.Blocks) > 0 && !slices.ContainsFunc(s.Blocks, func(b netip.Prefix) bool { return rack1.Overlaps(b) }) &&
			!slices.Contains(peersWith(s, false), "192.0.2.254")
	}
	is(t, one, "has rack 1's pool and peer", inRack)
	is(t, two, "has neither", outside)

	// An operator's label counts, and stays when the agent starts again. The agent's own stay whatever an operator applies.
	ctl(t, one, label(two, `rack: "1"`)+"---\n"+label(one, "disk: ssd"), "apply", "-f", "-")
	is(t, two, "has rack 1's pool and peer", inRack)
	for _, h := range l.Hosts() {
		must(t, h.Signal(ctx, "caracald", unix.SIGKILL))
	}
	must(t, one.StartAgent(ctx, "--label", "rack=1"))
	must(t, two.StartAgent(ctx))
	is(t, one, "still has rack 1's pool and peer", inRack)
	is(t, two, "still has rack 1's pool and peer", inRack)
	eventually(t, "the label that the agent is told of no more goes, the operator's stays", func() error {
		node := ctl(t, one, "", "get", "node", "h1", "-o", "yaml")
		if !strings.Contains(node, "disk: ssd") || !strings.Contains(node, `rack: "1"`) || strings.Contains(node, "room") {
			return fmt.Errorf("%s", node)
		}
		return nil
	})

	// New pods have addresses of the pools that their node may use.
	ctl(t, one, strings.Replace(selected, "10.244.0.0/16", "10.244.0.0/16, nodeSelector: '!has(rack)'", 1), "apply", "-f", "-")
	eventually(t, "pods get rack 1's addresses", func() error {
		p, err := one.AddPod(ctx, "a", lab.PodOptions{})
		must(t, err)
		addr := p.Addr()
		must(t, p.Delete(ctx))
		if !rack1.Contains(addr) {
			return fmt.Errorf("%s", addr)
		}
		return nil
	})
}
