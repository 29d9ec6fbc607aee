// Package commit puts pods and policy into the kernel maps, in the order that never shows a packet half a change.
// Callers hold the node lock.
package commit

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

var (
	// ErrAddressTaken says that another pod of this node holds an address.
	ErrAddressTaken = errors.New("address is held by another pod")
	// ErrInUse says that a pod of this node has an address of a block.
	ErrInUse = errors.New("block is in use")
)

// Pod is one attachment as the dataplane sees it.
type Pod struct {
	IfIndex int // of the host end of its veth
	Addrs   []netip.Addr
	MAC     net.HardwareAddr // of the pod's end
	HostMAC net.HardwareAddr // of the host's end, the pod's gateway
	MTU     int              // bytes of IP packet
	Shaped  bool             // leaves and arrives through its qdiscs
	Network string           // the network's name
	// What it sends out of all pools gets the host's address, by family.
	Masquerade4, Masquerade6 bool
	// Policy are the ids that it is judged by. nil: those that it has in the maps, and none if it is not there.
	Policy *policy.PodPolicies
}

// PodOf is the dataplane's view of a recorded endpoint whose host interface is ifindex.
func PodOf(e node.Endpoint, ifindex int) Pod {
	mac, _ := net.ParseMAC(e.MAC) // of a record that was checked when it was written
	gateway, _ := net.ParseMAC(e.HostMAC)
	return Pod{
		IfIndex: ifindex, Addrs: e.Addrs, MAC: mac, HostMAC: gateway, MTU: e.MTU, Shaped: e.Shaped, Network: e.Network,
		Masquerade4: e.Masquerade4, Masquerade6: e.Masquerade6,
	}
}

// AddPod makes pod p known and reachable, and raises the epoch. Repeating it is fine: a pod that is there keeps its policy ids
// unless p says others. ErrAddressTaken when another pod of this node holds one of the addresses; then nothing was changed.
func AddPod(m *maps.Maps, p Pod) error {
	for _, a := range p.Addrs {
		if err := unclaimed(m, a, uint32(p.IfIndex)); err != nil {
			return err
		}
	}
	state, err := m.State()
	if err != nil {
		return err
	}
	// Half the table at most, so that one pod can't keep the others from opening flows.
	if err := m.NewQuota(uint32(p.IfIndex), max(1, state.MaxFlows/2)); err != nil {
		return err
	}
	w := want(p)
	if err := policyOf(m, p, &w); err != nil {
		return err
	}
	if err := m.PutPod(w); err != nil {
		return err
	}
	for _, a := range p.Addrs {
		if err := m.PutRoute(local(a, uint32(p.IfIndex))); err != nil {
			return err
		}
	}
	_, err = m.RaiseEpoch()
	return err
}

// policyOf completes what will be written for p by the ids that it is judged by.
func policyOf(m *maps.Maps, p Pod, w *maps.Pod) error {
	if p.Policy != nil {
		w.PolicyEgress, w.PolicyIngress = p.Policy.Egress, p.Policy.Ingress
		return nil
	}
	got, err := m.Pod(w.IfIndex)
	if errors.Is(err, maps.ErrNotFound) {
		return nil
	}
	w.PolicyEgress, w.PolicyIngress = got.PolicyEgress, got.PolicyIngress
	return err
}

// RemovePod removes pod p, its routes, the identities of its addresses and its flows, and raises the epoch. What is missing
// is not an error, and what is another pod's, of an address that both claim, stays.
//
// The identities go so that whoever is given the addresses next does not pass for this pod, also where nobody who knows
// policy has heard of either. What else policy says of the addresses is in the maps again when they are somebody's.
func RemovePod(m *maps.Maps, p Pod) error {
	var errs []error
	var own []netip.Addr
	for _, a := range p.Addrs {
		r, err := m.Route(single(a))
		switch {
		case errors.Is(err, maps.ErrNotFound):
		case err != nil:
			errs = append(errs, err)
		case r.Kind == maps.RouteLocalPod && r.IfIndex == uint32(p.IfIndex):
			errs = append(errs, m.RemoveRoute(r.Prefix))
		case r.Kind == maps.RouteLocalPod:
			if _, err := m.Pod(r.IfIndex); !errors.Is(err, maps.ErrNotFound) {
				continue
			}
		}
		own = append(own, a)
	}
	errs = append(errs, m.RemovePod(uint32(p.IfIndex)), m.RemovePeers(singles(own)))
	_, err := m.RaiseEpoch()
	errs = append(errs, err)
	// Flows go last: until the epoch was raised a packet could have opened another.
	_, err = m.PurgeFlows(own)
	errs = append(errs, err, m.RemoveQuota(uint32(p.IfIndex)))
	return errors.Join(errs...)
}

// CheckPod compares what the maps hold for p with p. A MAC address that the pod changed itself is no difference.
func CheckPod(m *maps.Maps, p Pod) error {
	got, err := m.Pod(uint32(p.IfIndex))
	if err != nil {
		return err
	}
	w := want(p)
	switch {
	case !slices.Equal(got.Addresses, w.Addresses):
		return fmt.Errorf("pod %d: addresses in caracal_pods are %v, not %v", p.IfIndex, got.Addresses, w.Addresses)
	case got.MTU != w.MTU:
		return fmt.Errorf("pod %d: MTU in caracal_pods is %d, not %d", p.IfIndex, got.MTU, w.MTU)
	case got.Shaped != w.Shaped:
		return fmt.Errorf("pod %d: shaped in caracal_pods is %t, not %t", p.IfIndex, got.Shaped, w.Shaped)
	case got.Masquerade4 != w.Masquerade4 || got.Masquerade6 != w.Masquerade6:
		return fmt.Errorf("pod %d: masqueraded in caracal_pods are IPv4 %t, IPv6 %t, not %t, %t", p.IfIndex, got.Masquerade4, got.Masquerade6, w.Masquerade4, w.Masquerade6)
	case got.Network != w.Network:
		return fmt.Errorf("pod %d: network in caracal_pods is %d, not %d", p.IfIndex, got.Network, w.Network)
	}
	for _, a := range p.Addrs {
		r, err := m.Route(single(a))
		if err != nil {
			return err
		}
		if w := local(a, uint32(p.IfIndex)); r != w {
			return fmt.Errorf("route to %s in caracal_routes is %v by interface %d, not %v by %d", a, r.Kind, r.IfIndex, w.Kind, w.IfIndex)
		}
	}
	return nil
}

// SetNode makes the routes of the node itself (its own addresses; its blocks as blackholes, none of which overlap) equal to
// what is given, and raises the epoch if that changed any. Routes that are no longer wanted are looked for only when one is
// missing, because that takes a walk over all routes; see RemoveBlock.
func SetNode(m *maps.Maps, host []netip.Addr, blocks []netip.Prefix) error {
	wanted := blackholes(blocks)
	for _, a := range host {
		wanted[single(a)] = maps.RouteHost
	}
	if has(m, wanted) {
		return nil
	}
	return replaceNode(m, wanted)
}

// HasBlocks tells whether the blocks are among the node's routes.
func HasBlocks(m *maps.Maps, blocks []netip.Prefix) bool { return has(m, blackholes(blocks)) }

// RemoveBlock removes the route of a block that this node gives up, and raises the epoch if there was one. ErrInUse when a
// pod has an address of it; then nothing was changed.
func RemoveBlock(m *maps.Maps, block netip.Prefix) error {
	routes, err := m.Routes()
	if err != nil {
		return err
	}
	if err := unused(routes, block); err != nil {
		return err
	}
	if !slices.ContainsFunc(routes, func(r maps.Route) bool { return r.Kind == maps.RouteBlackhole && r.Prefix == block.Masked() }) {
		return nil
	}
	if err := m.RemoveRoute(block.Masked()); err != nil {
		return err
	}
	_, err = m.RaiseEpoch()
	return err
}

// BlockInUse tells whether a pod of this node has an address of a block, by the maps.
func BlockInUse(m *maps.Maps, block netip.Prefix) (bool, error) {
	routes, err := m.Routes()
	return unused(routes, block) != nil, err
}

func unused(routes []maps.Route, block netip.Prefix) error {
	for _, r := range routes {
		if r.Kind == maps.RouteLocalPod && block.Contains(r.Prefix.Addr()) {
			return fmt.Errorf("block %s: %w: %s is that of a pod behind interface %d, of which node.db knows nothing; restart it", block, ErrInUse, r.Prefix.Addr(), r.IfIndex)
		}
	}
	return nil
}

// blackholes are the routes of the node's blocks.
func blackholes(blocks []netip.Prefix) map[netip.Prefix]maps.RouteKind {
	wanted := make(map[netip.Prefix]maps.RouteKind)
	for _, b := range blocks {
		if !b.IsSingleIP() { // such a block's route is its pod's
			wanted[b.Masked()] = maps.RouteBlackhole
		}
	}
	return wanted
}

func has(m *maps.Maps, wanted map[netip.Prefix]maps.RouteKind) bool {
	for p, kind := range wanted {
		if r, err := m.Route(p); err != nil || r.Kind != kind {
			return false
		}
	}
	return true
}

func replaceNode(m *maps.Maps, wanted map[netip.Prefix]maps.RouteKind) error {
	routes, err := m.Routes()
	if err != nil {
		return err
	}
	changed := false
	for _, r := range routes {
		if r.Kind != maps.RouteHost && r.Kind != maps.RouteBlackhole {
			continue
		}
		if wanted[r.Prefix] == r.Kind {
			delete(wanted, r.Prefix)
			continue
		}
		changed = true
		if err := m.RemoveRoute(r.Prefix); err != nil {
			return err
		}
	}
	for p, kind := range wanted {
		changed = true
		if err := m.PutRoute(maps.Route{Prefix: p, Kind: kind}); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	_, err = m.RaiseEpoch()
	return err
}

// unclaimed: nil when no other living pod holds address a.
func unclaimed(m *maps.Maps, a netip.Addr, ifindex uint32) error {
	r, err := m.Route(single(a))
	if errors.Is(err, maps.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if r.Kind != maps.RouteLocalPod || r.IfIndex == ifindex {
		return nil
	}
	if _, err := m.Pod(r.IfIndex); errors.Is(err, maps.ErrNotFound) {
		return nil
	}
	return fmt.Errorf("%s: %w, behind interface %d", a, ErrAddressTaken, r.IfIndex)
}

func want(p Pod) maps.Pod {
	return maps.Pod{
		IfIndex: uint32(p.IfIndex), Addresses: p.Addrs, Network: maps.NetworkID(p.Network),
		MTU: uint16(p.MTU), Shaped: p.Shaped, MAC: p.MAC, HostMAC: p.HostMAC,
		Masquerade4: p.Masquerade4, Masquerade6: p.Masquerade6,
	}
}

func local(a netip.Addr, ifindex uint32) maps.Route {
	return maps.Route{Prefix: single(a), Kind: maps.RouteLocalPod, IfIndex: ifindex}
}

// singles are the prefixes that hold one of the addresses each.
func singles(addrs []netip.Addr) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = single(a)
	}
	return out
}

// single is the prefix that holds one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
