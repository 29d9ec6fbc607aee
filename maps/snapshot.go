package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// ErrChanging says that the maps changed all the time while they were read.
var ErrChanging = errors.New("the maps change faster than they can be read")

// snapshotTries is how often a Snapshot begins anew because the node changed meanwhile.
const snapshotTries = 20

// Snapshot is what the programs decide by, as it was in one epoch, and the flows that there were. Counters, events and quotas
// are no part of it.
type Snapshot struct {
	state    bpf.DataplaneState
	pods     contents[uint32, bpf.DataplanePod]
	routes   contents[bpf.DataplanePrefix, bpf.DataplaneRoute]
	peers    contents[bpf.DataplanePrefix, bpf.DataplanePeer]
	policy   contents[bpf.DataplanePolicyKey, bpf.DataplanePolicyRow]
	uplinks  contents[uint32, bpf.DataplaneUplink]
	services contents[bpf.DataplaneServiceKey, bpf.DataplaneService]
	nat      contents[bpf.DataplaneFlowKey, bpf.DataplaneNat]
	flows    contents[bpf.DataplaneFlowKey, bpf.DataplaneFlow]
}

// contents are some of a map.
type contents[K, V any] struct {
	keys   []K
	values []V
}

// read adds all entries of a map that keep wants.
func (e *contents[K, V]) read(m *Maps, name string, keep func(*V) bool) error {
	pinned, err := m.pinned(name)
	if err != nil {
		return err
	}
	defer pinned.Close()
	err = each(pinned, func(k *K, v *V) {
		if keep == nil || keep(v) {
			e.keys, e.values = append(e.keys, *k), append(e.values, *v)
		}
	})
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

func (e *contents[K, V]) write(m *Maps, name string) error {
	if len(e.keys) == 0 {
		return nil
	}
	pinned, err := m.pinned(name)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if _, err := pinned.BatchUpdate(e.keys, e.values, nil); err != nil {
		return fmt.Errorf("write %d entries of %s: %w", len(e.keys), name, full(err))
	}
	return nil
}

// Snapshot reads the maps. It writes nothing. A flow that comes, goes or is confirmed meanwhile may be missing.
// ErrChanging when no epoch lasted long enough.
func (m *Maps) Snapshot() (*Snapshot, error) {
	for range snapshotTries {
		s := &Snapshot{}
		var after bpf.DataplaneState
		for _, step := range []func() error{
			func() error { return m.state.Lookup(uint32(0), &s.state) },
			func() error { return s.pods.read(m, bpf.DataplaneMapCaracalPods, nil) },
			func() error { return s.routes.read(m, bpf.DataplaneMapCaracalRoutes, nil) },
			func() error { return s.peers.read(m, bpf.DataplaneMapCaracalPeers, nil) },
			func() error { return s.policy.read(m, bpf.DataplaneMapCaracalPolicy, nil) },
			func() error { return s.uplinks.read(m, bpf.DataplaneMapCaracalUplinks, nil) },
			func() error { return m.state.Lookup(uint32(0), &after) },
		} {
			if err := step(); err != nil {
				return nil, fmt.Errorf("copy the maps: %w", err)
			}
		}
		if after.Epoch == s.state.Epoch {
			return s, s.readRest(m)
		}
	}
	return nil, ErrChanging
}

// readRest reads what has no epoch.
func (s *Snapshot) readRest(m *Maps) error {
	if err := s.services.read(m, bpf.DataplaneMapCaracalService, nil); err != nil && !errors.Is(err, ErrNotLoaded) {
		return err // programs of an earlier build have none
	}
	for _, nat := range []string{bpf.DataplaneMapCaracalNatopen, bpf.DataplaneMapCaracalNat} {
		if err := s.nat.read(m, nat, nil); err != nil {
			return err
		}
	}
	// A flow that is confirmed meanwhile is in both: the later one counts.
	staying := func(f *bpf.DataplaneFlow) bool { return f.Charged != 0 }
	for _, flows := range []string{bpf.DataplaneMapCaracalOpens, bpf.DataplaneMapCaracalFlows} {
		if err := s.flows.read(m, flows, staying); err != nil {
			return err
		}
	}
	return nil
}

// Epoch is the one that it is of.
func (s *Snapshot) Epoch() uint32 { return s.state.Epoch }

// Flows is how many flows are in it, with those that expired and wait to be removed.
func (s *Snapshot) Flows() int { return len(s.flows.keys) }

// Restore writes the snapshot into maps that are freshly made, with room for all its flows, and that nobody's packets go
// by. The flows that expired are then removed, what was staged but not in force is forgotten, and every flow is to be judged
// again. Flows that were not confirmed are in the same map as the others; and there is no tunnel, so that what came encapsulated
// can be shown to the programs as it is inside.
func (m *Maps) Restore(s *Snapshot) error {
	var state bpf.DataplaneState
	if err := m.state.Lookup(uint32(0), &state); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	state.NatFirst, state.NatLast, state.Node = s.state.NatFirst, s.state.NatLast, s.state.Node
	// The flows were read last, and have epochs that came meanwhile. None of them is to be one of these maps'.
	if state.Epoch = s.state.Epoch + 1<<31; state.Epoch == 0 {
		state.Epoch = 2 // the lowest bit selects the slot
	}
	state.Flows, state.Staged = uint32(s.Flows()), 1
	if err := m.state.Update(uint32(0), &state, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	for _, err := range []error{
		s.pods.write(m, bpf.DataplaneMapCaracalPods),
		s.routes.write(m, bpf.DataplaneMapCaracalRoutes),
		s.peers.write(m, bpf.DataplaneMapCaracalPeers),
		s.policy.write(m, bpf.DataplaneMapCaracalPolicy),
		s.uplinks.write(m, bpf.DataplaneMapCaracalUplinks),
		s.services.write(m, bpf.DataplaneMapCaracalService),
		s.nat.write(m, bpf.DataplaneMapCaracalNat),
		s.flows.write(m, bpf.DataplaneMapCaracalFlows),
	} {
		if err != nil {
			return err
		}
	}
	if _, err := m.PurgeFlows(nil); err != nil {
		return err
	}
	_, err := m.RaiseEpoch()
	return err
}
