package ctl

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// way finds the packet's route, and what else than policy would drop it: the reason, and a sentence. from and to are its ends
// as pods of this node, own the host's addresses.
func (c *whyCase) way(from, to *maps.Pod, own []netip.Addr) (reason, sentence string, err error) {
	if c.maps == nil {
		return "", "", nil
	}
	p := c.packet
	if from != nil {
		if reason, sentence = c.admitted(); reason != "" {
			return reason, sentence, nil
		}
	} else if r, err := c.routeTo(p.Source); err != nil {
		return "", "", err
	} else if r != nil && !slices.Contains(own, p.Source) && (r.Kind == maps.RouteBlackhole || r.Kind == maps.RouteLocalPod) {
		return "drop_spoof", fmt.Sprintf("no pod of this node has %s, which is in one of its blocks: whoever sends with it is not believed "+
			"(drop_spoof from a pod, drop_spoof_net from the net)", p.Source), nil
	}
	r, err := c.routeTo(p.Destination)
	if err != nil {
		return "", "", err
	}
	switch {
	case r == nil:
		c.Route = "no prefix covers it: to the host's stack"
	default:
		c.Route = r.Kind.String()
		if r.IfIndex != 0 {
			c.Route += fmt.Sprintf(" by interface %d", r.IfIndex)
			if ifs, err := openInterfaces(); err == nil {
				if name, err := ifs.name(r.IfIndex); err == nil && name != "" {
					c.Route = r.Kind.String() + " by " + name
				}
				ifs.close()
			}
		}
		if r.NextHop.IsValid() {
			c.Route += " to " + r.NextHop.String()
		}
	}
	kind := maps.RouteStack
	if r != nil {
		kind = r.Kind
	}
	const noPod = "drop_no_pod"
	switch {
	case kind == maps.RouteBlackhole:
		return noPod, fmt.Sprintf("%s is in one of this node's blocks, and no pod has it", p.Destination), nil
	case kind == maps.RoutePool && from != nil:
		return noPod, fmt.Sprintf("%s is in a pool, and no node is known that has its block", p.Destination), nil
	case kind == maps.RouteLocalPod && to == nil:
		return noPod, fmt.Sprintf("there is a route to %s, but no pod of this node has it", p.Destination), nil
	case from == nil:
		return "", "", nil
	}
	inside := slices.Contains([]maps.RouteKind{maps.RouteLocalPod, maps.RouteBlackhole, maps.RoutePool, maps.RouteTunnel}, kind) || r != nil && r.InPool
	if !inside {
		s, err := c.maps.FindService(netip.AddrPortFrom(p.Destination, p.TargetPort), strings.ToLower(c.protocol.String()), kind == maps.RouteHost)
		switch {
		case err == nil:
			c.Service, c.Route = s.Name, "to the host's stack, which translates it"
			return "", "", nil
		case !errors.Is(err, maps.ErrNotFound) && !errors.Is(err, maps.ErrNotLoaded):
			return "", "", err
		}
	}
	switch {
	case p.Protocol == uint8(api.TCP) || p.Protocol == uint8(api.UDP) || c.isICMP():
		return "", "", nil
	}
	masquerade := from.Masquerade4
	if p.Source.Is6() {
		masquerade = from.Masquerade6
	}
	if masquerade && !inside && !slices.Contains(own, p.Destination) {
		return "drop_nat_protocol", fmt.Sprintf("%s is masqueraded on its way out of the pools, which can't be done with %s", c.Source, c.protocol), nil
	}
	return "", "", nil
}

// routeTo is what caracal_routes says of an address, nil if nothing.
func (c *whyCase) routeTo(a netip.Addr) (*maps.Route, error) {
	r, err := c.maps.Route(single(a))
	if errors.Is(err, maps.ErrNotFound) {
		return nil, nil
	}
	return &r, err
}

// admitted says why no pod may send the packet, as from_pod does (admit.h).
func (c *whyCase) admitted() (reason, sentence string) {
	p, to := c.packet, c.packet.Destination
	switch {
	case to.IsMulticast() || to == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "drop_multicast", fmt.Sprintf("%s is multicast or broadcast, which is not forwarded", to)
	case to.IsUnspecified(), to.IsLoopback(), to.Is4() && to.As4()[0] == 0, to.Is6() && to.IsLinkLocalUnicast(), to == cni.Gateway4:
		return "drop_martian", fmt.Sprintf("%s is never forwarded to: unspecified, loopback or link-local", to)
	case p.Protocol == uint8(api.UDP) && (p.SourcePort == 67 || p.SourcePort == 547):
		return "drop_dhcp_server", fmt.Sprintf("port %d is a DHCP server's, which no pod may be", p.SourcePort)
	case c.protocol == api.ICMP && p.ICMPType == 5, c.protocol == api.ICMPv6 && p.ICMPType == 137:
		return "drop_redirect", "no pod may send ICMP redirects"
	case c.protocol == api.ICMP && p.ICMPType == 9, c.protocol == api.ICMPv6 && p.ICMPType == 134:
		return "drop_router_advertisement", "no pod may advertise routers"
	}
	return "", ""
}

// mostRanges is how many ranges of ports are looked at where no port was asked for: each costs as much as the question.
const mostRanges = 64

// otherPorts finds ports that fare otherwise than those that no rule names.
func (c *whyCase) otherPorts() {
	begins, seen := []uint16{0}, map[int]bool{0: true}
	verdicts := make(map[uint16]policy.FlowVerdict)
	note := func(port int) {
		if port <= 65535 && !seen[port] {
			seen[port] = true
			begins = append(begins, uint16(port))
		}
	}
	for i := 0; i < len(begins) && i < mostRanges; i++ {
		p := c.packet
		p.TargetPort = begins[i]
		f := c.model.Flow(p)
		verdicts[begins[i]] = f
		for _, v := range []*policy.Verdict{f.Egress, f.Ingress} {
			if v == nil {
				continue
			}
			for _, l := range v.Trace {
				for _, r := range c.numbers(slices.Concat(l.Rule.Destination.Ports, l.Rule.Destination.NotPorts)) {
					note(int(r.First))
					note(int(r.Last) + 1)
				}
			}
		}
	}
	if len(begins) > mostRanges {
		c.note("rules name more ports than are looked at: ask with one")
		return
	}
	slices.Sort(begins)
	for i, first := range begins {
		f, last := verdicts[first], uint16(65535)
		if i+1 < len(begins) {
			last = begins[i+1] - 1
		}
		if f.Action() == verdicts[0].Action() {
			continue
		}
		x := ports{Verdict: verdictAllowed, Ports: policy.Ports{First: first, Last: last}.String()}
		if f.Action() == policy.Deny {
			x.Verdict = verdictDenied
		}
		for _, end := range []struct {
			policy.Direction
			*policy.Verdict
		}{{policy.Egress, f.Egress}, {policy.Ingress, f.Ingress}} {
			if v := end.Verdict; v == nil || v.Action != f.Action() || v.Rule.Policy == "" || x.By != "" && f.Action() == policy.Deny {
				continue // it does not decide, or the packet does not come so far
			}
			x.By = c.nameOf(end.Rule, end.Direction, decider(*end.Verdict)).String()
		}
		if x.By == "" {
			x.By = "no policy"
		}
		c.Ports = append(c.Ports, x)
	}
}

// decider is the rule that decided, nil if it was the end of a list or nothing.
func decider(v policy.Verdict) *policy.Rule {
	for _, l := range v.Trace {
		if l.Ref == v.Rule {
			return l.Rule
		}
	}
	return nil
}

// numbers are ports, names as those that the destination gives them for the protocol.
func (c *whyCase) numbers(all []policy.Ports) []policy.Ports {
	var out []policy.Ports
	for _, p := range all {
		if p.Name == "" {
			out = append(out, p)
		} else if e := c.model.At(c.packet.Destination); e != nil {
			for _, n := range e.Ports {
				if n.Name == p.Name && n.Protocol == c.packet.Protocol {
					out = append(out, policy.Ports{First: n.Port, Last: n.Port})
				}
			}
		}
	}
	return out
}
