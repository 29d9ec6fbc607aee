package maps

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// State is caracal_state, the node's one entry.
type State struct {
	Epoch    uint32 `json:"epoch"`
	Version  uint32 `json:"version"`
	MaxFlows uint32 `json:"maxFlows"`
	Flows    uint32 `json:"flows"`
	NATPorts Ports  `json:"natPorts"`
	Tunnel   uint32 `json:"tunnel"` // ifindex of the VXLAN interface; 0: none
	Node     string `json:"node"`
	Build    string `json:"build"` // hex
}

// State reads the node's state.
func (m *Maps) State() (State, error) {
	var s bpf.DataplaneState
	if err := m.state.Lookup(uint32(0), &s); err != nil {
		return State{}, fmt.Errorf("read state: %w", err)
	}
	return State{
		Epoch: s.Epoch, Version: s.Version, MaxFlows: s.MaxFlows, Flows: s.Flows, NATPorts: Ports{s.NatFirst, s.NatLast}, Tunnel: s.Tunnel,
		Node: text(s.Node[:]), Build: fmt.Sprintf("%x", s.Build),
	}, nil
}

// Ports is a range of ports, both ends included; zero: none.
type Ports struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// String is "61000-65535".
func (p Ports) String() string { return fmt.Sprintf("%d-%d", p.First, p.Last) }

// ParsePorts is the inverse of String. Ports below 1024 are none of it.
func ParsePorts(s string) (Ports, error) {
	first, last, _ := strings.Cut(s, "-")
	f, err1 := strconv.ParseUint(first, 10, 16)
	l, err2 := strconv.ParseUint(last, 10, 16)
	if err1 != nil || err2 != nil || f < 1024 || f > l {
		return Ports{}, fmt.Errorf("ports %q: write them as 61000-65535, from 1024 on", s)
	}
	return Ports{uint16(f), uint16(l)}, nil
}

// SetNATPorts sets the ports that masqueraded flows leave from; zero: nothing is masqueraded. Flows with others are cut.
func (m *Maps) SetNATPorts(p Ports) error {
	return m.inState(func(b []byte) {
		// One store: both ports at once.
		both := (*uint32)(unsafe.Pointer(&b[unsafe.Offsetof(bpf.DataplaneState{}.NatFirst)]))
		var value uint32
		*(*[2]uint16)(unsafe.Pointer(&value)) = [2]uint16{p.First, p.Last}
		atomic.StoreUint32(both, value)
	})
}

// SetTunnel says which interface what other hosts encapsulate comes in by; 0: none.
func (m *Maps) SetTunnel(ifindex uint32) error {
	return m.inState(func(b []byte) {
		atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[unsafe.Offsetof(bpf.DataplaneState{}.Tunnel)])), ifindex)
	})
}

// RaiseEpoch makes every packet be judged again, with what the maps hold now, and returns the new epoch. What somebody staged
// who did not come to raise the epoch himself is forgotten, or settled if he did. Callers hold the node lock.
func (m *Maps) RaiseEpoch() (uint32, error) {
	if err := m.Settle(); err != nil {
		return 0, err
	}
	return m.Flip()
}

// Stage says that what follows, until Settle, makes the slots of pods and peers differ.
func (m *Maps) Stage() error { return m.setStaged(1) }

// Settle makes pods and peers the same in both epochs, as they are now, if somebody staged a change and ended before he did.
func (m *Maps) Settle() error {
	staged := false
	err := m.inState(func(b []byte) { staged = atomic.LoadUint32(stagedIn(b)) != 0 })
	if err != nil || !staged {
		return err
	}
	pods, err := m.Pods()
	if err != nil {
		return err
	}
	for _, p := range pods {
		if err := m.SettlePod(p.IfIndex); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	peers, err := m.Peers()
	if err != nil {
		return err
	}
	var differ []netip.Prefix
	for _, p := range peers {
		if p.Identity != p.Next {
			differ = append(differ, p.Prefix)
		}
	}
	if err := m.SettlePeers(differ); err != nil {
		return err
	}
	return m.Settled()
}

// Settled says that the slots are equal again.
func (m *Maps) Settled() error { return m.setStaged(0) }

func (m *Maps) setStaged(v uint32) error {
	return m.inState(func(b []byte) { atomic.StoreUint32(stagedIn(b), v) })
}

func stagedIn(state []byte) *uint32 {
	return (*uint32)(unsafe.Pointer(&state[unsafe.Offsetof(bpf.DataplaneState{}.Staged)]))
}

// Flip puts what is staged in force: for all pods and both ends of every packet at once. It is one atomic add in the mapped
// entry, so it never undoes what the programs write beside it.
func (m *Maps) Flip() (uint32, error) {
	var e uint32
	err := m.inState(func(b []byte) {
		epoch := (*uint32)(unsafe.Pointer(&b[unsafe.Offsetof(bpf.DataplaneState{}.Epoch)]))
		e = atomic.AddUint32(epoch, 1)
		if e == 0 { // never 0, and the lowest bit goes on alternating
			e = atomic.AddUint32(epoch, 2)
		}
	})
	return e, err
}

// inState gives fn the entry, mapped.
func (m *Maps) inState(fn func([]byte)) error {
	b, err := unix.Mmap(m.state.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map state: %w", err)
	}
	defer unix.Munmap(b)
	fn(b)
	return nil
}

// text is what comes before the first zero.
func text(b []byte) string {
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}
