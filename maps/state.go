package maps

import (
	"bytes"
	"fmt"
	"os"
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
	Node     string `json:"node"`
	Build    string `json:"build"` // hex
}

// State reads the node's state.
func (m *Maps) State() (State, error) {
	var s bpf.DataplaneState
	if err := m.state.Lookup(uint32(0), &s); err != nil {
		return State{}, fmt.Errorf("read state: %w", err)
	}
	node, _, _ := bytes.Cut(s.Node[:], []byte{0})
	return State{
		Epoch: s.Epoch, Version: s.Version, MaxFlows: s.MaxFlows, Flows: s.Flows,
		Node: string(node), Build: fmt.Sprintf("%x", s.Build),
	}, nil
}

// RaiseEpoch makes every packet be judged again, with what the maps hold now, and returns the new epoch. It is one
// atomic add in the mapped entry, so it never undoes what the programs write beside it.
func (m *Maps) RaiseEpoch() (uint32, error) {
	b, err := unix.Mmap(m.state.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map state: %w", err)
	}
	defer unix.Munmap(b)
	epoch := (*uint32)(unsafe.Pointer(&b[unsafe.Offsetof(bpf.DataplaneState{}.Epoch)]))
	e := atomic.AddUint32(epoch, 1)
	if e == 0 { // never 0, and the lowest bit goes on alternating
		e = atomic.AddUint32(epoch, 2)
	}
	return e, nil
}
