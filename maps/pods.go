package maps

import (
	"cmp"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// PodAddresses is how many addresses a pod's interface may have.
const PodAddresses = len(bpf.DataplanePodSlot{}.Addresses)

const ( // POD_*
	flagShaped      = 1
	flagMasquerade4 = 2
	flagMasquerade6 = 4
)

// Pod is an entry of caracal_pods as one epoch sees it.
type Pod struct {
	IfIndex       uint32           `json:"ifindex"` // of the host end of its veth
	Addresses     []netip.Addr     `json:"addresses"`
	PolicyEgress  uint32           `json:"policyEgress"`
	PolicyIngress uint32           `json:"policyIngress"`
	Network       uint32           `json:"network"` // NetworkID
	MTU           uint16           `json:"mtu"`
	Shaped        bool             `json:"shaped"`
	Masquerade4   bool             `json:"masquerade4"` // what it sends out of all pools gets the host's address
	Masquerade6   bool             `json:"masquerade6"`
	MAC           net.HardwareAddr `json:"-"`
	HostMAC       net.HardwareAddr `json:"-"`
}

// NetworkID is the number that stands for a network's name in the maps: its 32-bit FNV-1a hash.
func NetworkID(name string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(name))
	return h.Sum32()
}

// PutPod writes both slots of a pod, so that it is the same in every epoch. At most PodAddresses addresses.
func (m *Maps) PutPod(p Pod) error {
	if len(p.Addresses) > PodAddresses {
		return fmt.Errorf("pod with %d addresses: at most %d", len(p.Addresses), PodAddresses)
	}
	slot := bpf.DataplanePodSlot{PolicyEgress: p.PolicyEgress, PolicyIngress: p.PolicyIngress, Network: p.Network, Mtu: p.MTU}
	for i, a := range p.Addresses {
		slot.Addresses[i] = Address(a)
	}
	for flag, set := range map[uint16]bool{flagShaped: p.Shaped, flagMasquerade4: p.Masquerade4, flagMasquerade6: p.Masquerade6} {
		if set {
			slot.Flags |= flag
		}
	}
	value := bpf.DataplanePod{Slot: [2]bpf.DataplanePodSlot{slot, slot}}
	copy(value.Mac[:], p.MAC)
	copy(value.HostMac[:], p.HostMAC)
	if err := m.pods.Put(p.IfIndex, &value); err != nil {
		return fmt.Errorf("write pod %d: %w", p.IfIndex, full(err))
	}
	return nil
}

// StagePod gives a pod other policy ids from the next epoch on. In the current one nothing changes. Who raises the epoch
// settles the pod afterwards. ErrNotFound when there is none.
func (m *Maps) StagePod(ifindex, egress, ingress uint32) error {
	return m.changePod(ifindex, func(value *bpf.DataplanePod, current uint32) {
		next := value.Slot[current]
		next.PolicyEgress, next.PolicyIngress = egress, ingress
		value.Slot[current^1] = next
	})
}

// PutPodPolicy gives a pod other policy ids in every epoch. ErrNotFound when there is none.
func (m *Maps) PutPodPolicy(ifindex, egress, ingress uint32) error {
	return m.changePod(ifindex, func(value *bpf.DataplanePod, current uint32) {
		value.Slot[current].PolicyEgress, value.Slot[current].PolicyIngress = egress, ingress
		value.Slot[current^1] = value.Slot[current]
	})
}

// SettlePod makes a pod, in the epoch after this one, what it is now. It is for when no program run holds the previous epoch
// any more. ErrNotFound when there is none.
func (m *Maps) SettlePod(ifindex uint32) error {
	return m.changePod(ifindex, func(value *bpf.DataplanePod, current uint32) { value.Slot[current^1] = value.Slot[current] })
}

// changePod changes a pod in the map. current is the index of the slot in force.
func (m *Maps) changePod(ifindex uint32, change func(value *bpf.DataplanePod, current uint32)) error {
	state, err := m.State()
	if err != nil {
		return err
	}
	var value bpf.DataplanePod
	if err := m.pods.Lookup(ifindex, &value); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("pod %d: %w", ifindex, ErrNotFound)
		}
		return fmt.Errorf("read pod %d: %w", ifindex, err)
	}
	change(&value, state.Epoch&1)
	if err := m.pods.Update(ifindex, &value, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("write pod %d: %w", ifindex, err)
	}
	return nil
}

// Pod reads one pod by the ifindex of its host interface, as the current epoch sees it. ErrNotFound when there is none.
func (m *Maps) Pod(ifindex uint32) (Pod, error) {
	state, err := m.State()
	if err != nil {
		return Pod{}, err
	}
	var value bpf.DataplanePod
	if err := m.pods.Lookup(ifindex, &value); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return Pod{}, fmt.Errorf("pod %d: %w", ifindex, ErrNotFound)
		}
		return Pod{}, fmt.Errorf("read pod %d: %w", ifindex, err)
	}
	return decodePod(ifindex, &value, state.Epoch), nil
}

// Pods lists all pods by ifindex.
func (m *Maps) Pods() ([]Pod, error) {
	state, err := m.State()
	if err != nil {
		return nil, err
	}
	var (
		pods    []Pod
		ifindex uint32
		value   bpf.DataplanePod
	)
	entries := m.pods.Iterate()
	for entries.Next(&ifindex, &value) {
		pods = append(pods, decodePod(ifindex, &value, state.Epoch))
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	slices.SortFunc(pods, func(a, b Pod) int { return cmp.Compare(a.IfIndex, b.IfIndex) })
	return pods, nil
}

// RemovePod removes a pod. None there is not an error.
func (m *Maps) RemovePod(ifindex uint32) error {
	if err := remove(m.pods, ifindex); err != nil {
		return fmt.Errorf("remove pod %d: %w", ifindex, err)
	}
	return nil
}

func decodePod(ifindex uint32, value *bpf.DataplanePod, epoch uint32) Pod {
	slot := &value.Slot[epoch&1]
	p := Pod{
		IfIndex: ifindex, PolicyEgress: slot.PolicyEgress, PolicyIngress: slot.PolicyIngress,
		Network: slot.Network, MTU: slot.Mtu, Shaped: slot.Flags&flagShaped != 0,
		Masquerade4: slot.Flags&flagMasquerade4 != 0, Masquerade6: slot.Flags&flagMasquerade6 != 0,
		MAC: slices.Clone(value.Mac[:]), HostMAC: slices.Clone(value.HostMac[:]),
	}
	for _, a := range slot.Addresses {
		if addr := FromAddress(a); addr.IsValid() {
			p.Addresses = append(p.Addresses, addr)
		}
	}
	return p
}

// ErrFull says that a map has no room for another entry.
var ErrFull = errors.New("map is full")

// full makes the kernel's word for a full map readable.
func full(err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
