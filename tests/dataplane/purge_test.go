package dataplane

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/loader"
)

// BenchmarkPurgeFlows removes the flows of an address that has none, from tables of the default size: what the removal of
// a pod costs beside others'.
func BenchmarkPurgeFlows(b *testing.B) {
	for name, flows := range map[string]int{"empty": 0, "full": loader.DefaultMaxFlows} {
		b.Run(name, func(b *testing.B) {
			n := newNode(b, loader.Config{MaxFlows: loader.DefaultMaxFlows})
			n.fill(b, flows)
			for b.Loop() {
				if removed, err := n.maps.PurgeFlows([]netip.Addr{nobody4, nobody6}); err != nil || removed != 0 {
					b.Fatalf("%d removed: %v", removed, err)
				}
			}
		})
	}
}

// BenchmarkSweepFlows looks at a thousand places of the table, all held by flows that live.
func BenchmarkSweepFlows(b *testing.B) {
	n := newNode(b, loader.Config{MaxFlows: loader.DefaultMaxFlows})
	n.fill(b, loader.DefaultMaxFlows)
	first := uint32(0)
	for b.Loop() {
		if removed, err := n.maps.SweepFlows(first, 1000); err != nil || removed != 0 {
			b.Fatalf("%d removed: %v", removed, err)
		}
		first = (first + 1000) % loader.DefaultMaxFlows
	}
}

// fill makes so many flows that do not expire.
func (n *node) fill(b *testing.B, flows int) {
	b.Helper()
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(bpf.MapPath(n.dir, name), nil)
		if err != nil {
			b.Fatal(err)
		}
		return m
	}
	table, slots := open(bpf.DataplaneMapCaracalFlows), open(bpf.DataplaneMapCaracalSlots)
	defer table.Close()
	defer slots.Close()
	for i := range flows {
		key := bpf.DataplaneFlowKey{Protocol: 6}
		binary.BigEndian.PutUint32(key.AddressA[12:], uint32(i))
		value := bpf.DataplaneFlow{State: 3, Slot: uint32(i)}
		value.Leg[0].LastSeen = 1 << 62
		if err := table.Put(&key, &value); err != nil {
			b.Fatal(err)
		}
		if err := slots.Put(uint32(i), &key); err != nil {
			b.Fatal(err)
		}
	}
	if flows > 0 {
		n.countFlows(b, uint32(flows))
	}
}

// countFlows writes the number of flows into the state, as the programs would have.
func (n *node) countFlows(b *testing.B, flows uint32) {
	b.Helper()
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(n.dir, bpf.DataplaneMapCaracalState), nil)
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	var s bpf.DataplaneState
	if err := m.Lookup(uint32(0), &s); err != nil {
		b.Fatal(err)
	}
	s.Flows = flows
	if err := m.Put(uint32(0), &s); err != nil {
		b.Fatal(err)
	}
}
