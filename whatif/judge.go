package whatif

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/caracal-net/caracal/maps"
)

// Verdicts of policy.
const (
	verdictPolicy  = "drop_policy_"
	verdictIngress = "drop_policy_ingress"
	verdictUnknown = "drop_policy_unknown"
)

// judge shows packets of flows to programs.
type judge struct {
	runner *maps.Runner
	pods   map[uint32]maps.Pod
	holder map[netip.Addr]uint32 // ifindex of the pod that has an address
	macs   map[uint32]net.HardwareAddr
	uplink uint32
}

// outcome is what became of a flow's packets; zero: they pass.
type outcome struct {
	denied  *maps.Event // by policy
	unknown string      // why it can't be told
}

func newJudge(m *maps.Maps) (*judge, error) {
	pods, err := m.Pods()
	if err != nil {
		return nil, err
	}
	j := &judge{pods: make(map[uint32]maps.Pod), holder: make(map[netip.Addr]uint32), macs: make(map[uint32]net.HardwareAddr), uplink: 1}
	for _, p := range pods {
		j.pods[p.IfIndex] = p
		for _, a := range p.Addresses {
			j.holder[a] = p.IfIndex
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, i := range interfaces {
		j.macs[uint32(i.Index)] = i.HardwareAddr
	}
	uplinks, err := m.Uplinks()
	if err != nil {
		return nil, err
	}
	for i := range uplinks {
		if _, there := j.macs[i]; there {
			j.uplink = i
		}
	}
	if j.runner, err = m.Runner(); err != nil {
		return nil, err
	}
	return j, nil
}

// flow shows the programs a packet of each direction that packets were seen of, where they were seen.
func (j *judge) flow(f *maps.Flow) (outcome, error) {
	var unknown string
	any := false
	for _, answer := range []bool{false, true} {
		leg := f.Sent
		if answer {
			leg = f.Received
		}
		if !seen(leg) {
			continue
		}
		any = true
		arrival, why := j.arrival(f, leg, answer)
		if why != "" {
			unknown = why
			continue
		}
		packet, err := j.packet(f, arrival, answer)
		if err != nil {
			return outcome{}, err
		}
		drop, err := j.runner.Run(arrival, packet)
		switch {
		case errors.Is(err, maps.ErrNoInterface):
			unknown = fmt.Sprintf("interface %d, by which its packets came, is gone", arrival.IfIndex)
		case err != nil:
			return outcome{}, err
		case drop == nil:
		case strings.HasPrefix(drop.Verdict, verdictPolicy):
			return outcome{denied: drop}, nil
		default:
			unknown = "its packets are dropped whatever policy says: " + drop.Verdict
		}
	}
	if !any {
		unknown = "no packet of it was judged yet"
	}
	return outcome{unknown: unknown}, nil
}

// seen tells whether packets of a direction came by.
func seen(l maps.Leg) bool { return l.Epoch != 0 || l.Packets != 0 }

// arrival says where a direction's packets meet the programs that judge them.
func (j *judge) arrival(f *maps.Flow, leg maps.Leg, answer bool) (a maps.Arrival, why string) {
	src, dst := f.Opener.Addr(), f.Responder.Addr()
	if answer {
		src, dst = dst, src
	}
	sender, fromPod := j.holder[src]
	receiver, toPod := j.holder[dst]
	_, byPod := j.pods[leg.IfIndex]
	switch {
	case leg.Sender != 0:
		a = maps.Arrival{Hook: "to_net", IfIndex: j.uplink, From: leg.Sender, Deferred: true}
		if toPod {
			a.Hook, a.IfIndex = "to_pod", receiver
		}
		return a, ""
	case byPod:
		return maps.Arrival{Hook: "from_pod", IfIndex: leg.IfIndex}, ""
	case leg.IfIndex != 0:
		return maps.Arrival{Hook: "from_net", IfIndex: leg.IfIndex}, ""
	case toPod && f.Entered == "host" && !answer:
		return maps.Arrival{Hook: "to_pod", IfIndex: receiver}, ""
	case toPod: // the stack had it from somewhere
		return maps.Arrival{Hook: "to_pod", IfIndex: receiver, From: j.uplink}, ""
	case fromPod:
		return maps.Arrival{Hook: "to_net", IfIndex: j.uplink, From: sender}, ""
	}
	return maps.Arrival{}, "neither of its ends is a pod of this node any more"
}

// packet is one of a direction, in a frame that its interface takes.
func (j *judge) packet(f *maps.Flow, a maps.Arrival, answer bool) ([]byte, error) {
	pod := j.pods[a.IfIndex].MAC
	own := j.macs[a.IfIndex]
	if a.Hook == "to_pod" {
		return frame(f, answer, own, pod)
	}
	return frame(f, answer, pod, own)
}
