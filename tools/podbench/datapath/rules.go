package datapath

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"path/filepath"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/tools/podbench/measure"
)

// MaxRules is how many rules a datapath may have.
const MaxRules = 100_000

const (
	protocolTCP = 6
	protocolUDP = 17
)

// rule is one of a list in which the first that matches decides. It is about packets that open a flow, from or to a peer.
type rule struct {
	allow    bool
	peer     netip.Prefix
	protocol uint8  // IANA number; 0: any, and any port
	port     uint16 // the destination's
}

// rules are n of which the last allows what is measured between two pods, and no other matches it. Every other one of these
// is about an address like a pod's, and every other one denies the pods a port near that of the server, so that neither
// addresses nor ports tell the right one from the wrong ones early.
func rules(n int, pods netip.Prefix) []rule {
	list := make([]rule, n)
	base, host := pods.Masked().Addr().As4(), uint32(1)<<(32-pods.Bits())
	for i := range n - 1 {
		k := i / 2
		r := rule{allow: true, peer: pods, protocol: protocolTCP, port: nearPort(k / 2)}
		if k%2 == 1 {
			r.protocol = protocolUDP
		}
		if i%2 == 0 {
			a := uint32(k+1) * host // differs from the pods in any of the bits above theirs
			r.peer = netip.PrefixFrom(netip.AddrFrom4([4]byte{base[0] ^ byte(a>>24), base[1] ^ byte(a>>16), base[2] ^ byte(a>>8), base[3] ^ byte(a)}), 32)
		} else {
			r.allow = false
		}
		list[i] = r
	}
	list[n-1] = rule{allow: true, peer: pods}
	return list
}

// nearPort is the k-th nearest to the ports of servers, below and above in turns as long as there are ports below.
func nearPort(k int) uint16 {
	below := measure.FirstPort - 1
	switch {
	case k/2 >= below:
		return uint16(measure.LastPort + 1 + k - below)
	case k%2 == 0:
		return uint16(below - k/2)
	default:
		return uint16(measure.LastPort + 1 + k/2)
	}
}

// around is the smallest prefix that holds both addresses.
func around(a, b netip.Addr) (netip.Prefix, error) {
	if !a.Is4() || !b.Is4() {
		return netip.Prefix{}, fmt.Errorf("rules for pods %s and %s: only of IPv4", a, b)
	}
	x, y := a.As4(), b.As4()
	n := 0
	for i := range x {
		same := bits.LeadingZeros8(x[i] ^ y[i])
		n += same
		if same < 8 {
			break
		}
	}
	return a.Prefix(n)
}

// Enforce puts the datapath's rules in force between the two pods, and tells what enforces them; "" when there are none.
// The pods are Settled.
func (n *Node) Enforce(ctx context.Context, a, b *Pod) (string, error) {
	if n.Spec.Rules == 0 {
		return "", nil
	}
	pods, err := around(a.Addr, b.Addr)
	if err != nil {
		return "", err
	}
	list := rules(n.Spec.Rules, pods)
	enforce := n.Spec.filter
	if enforce == nil {
		return "caracal", n.setPolicy(ctx, list, a, b)
	}
	by, err := enforce(ctx, n.host, list)
	if err != nil {
		return "", fmt.Errorf("put %d rules in force on %s: %w", len(list), n.Spec.Name, err)
	}
	return by, nil
}

// setPolicy compiles a policy of these rules, of both directions, for both pods, and puts it in force.
func (n *Node) setPolicy(ctx context.Context, list []rule, pods ...*Pod) error {
	p := &policy.Policy{ID: "podbench", Ingress: &policy.Rules{}, Egress: &policy.Rules{}}
	for _, r := range list {
		in := policy.Rule{Action: policy.Deny}
		if r.allow {
			in.Action = policy.Allow
		}
		if r.protocol != 0 {
			in.Protocol = &r.protocol
			in.Destination.Ports = []policy.Ports{{First: r.port, Last: r.port}}
		}
		out := in
		in.Source.Nets, out.Destination.Nets = []netip.Prefix{r.peer}, []netip.Prefix{r.peer}
		p.Ingress.Rules, p.Egress.Rules = append(p.Ingress.Rules, in), append(p.Egress.Rules, out)
	}
	m := &policy.Model{
		Tiers:     []policy.Tier{{Name: "default", Policies: []*policy.Policy{p}, Default: policy.Deny}},
		Endpoints: make(map[string]*policy.Endpoint),
	}
	ends := make(map[string]uint32)
	for _, pod := range pods {
		m.Endpoints[pod.Name] = &policy.Endpoint{ID: pod.Name, Addresses: []netip.Addr{pod.Addr}}
		ends[pod.Name] = uint32(pod.parent)
	}
	c := policy.NewCompiler(policy.Options{Local: func(string) bool { return true }})
	if err := c.SetModel(m); err != nil {
		return fmt.Errorf("compile %d rules: %w", len(list), err)
	}
	delta, err := c.Update()
	if err != nil {
		return fmt.Errorf("compile %d rules: %w", len(list), err)
	}
	lock, err := node.LockNode(ctx, filepath.Join(n.Dir, "state"))
	if err != nil {
		return err
	}
	defer lock.Unlock()
	return n.eachMaps(func(m *maps.Maps) error {
		err := commit.SetPolicy(m, delta, func(id string) (uint32, bool) { i, ok := ends[id]; return i, ok })
		for _, pod := range pods {
			got, perr := m.Pod(uint32(pod.parent))
			if err = errors.Join(err, perr); err == nil && (got.PolicyEgress == 0 || got.PolicyIngress == 0) {
				err = fmt.Errorf("pod %s has no policy in the maps", pod.Name)
			}
		}
		return err
	})
}

// Forget has the datapath forget the flows of what is measured, so that the table that they are in does not fill.
func (n *Node) Forget() error {
	switch {
	case n.UsesCaracal():
		return n.eachMaps(func(m *maps.Maps) error {
			_, err := m.PurgeFlows(n.measured)
			return err
		})
	case n.Spec.filter != nil:
		return n.host.Do(flushConntrack)
	}
	return nil
}
