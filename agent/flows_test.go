package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// newFlowTable is an agent with the maps of a node on which no pod is.
func newFlowTable(t *testing.T, places uint32) *Agent {
	t.Helper()
	root := bpffs.Mount(t)
	a := &Agent{Config: Config{BPFFSDir: filepath.Join(root, "node"), Log: slog.New(slog.DiscardHandler)}, problems: make(map[string]Problem)}
	if err := loader.Ensure(loader.Config{Dir: a.BPFFSDir, MaxFlows: places}); err != nil {
		t.Fatal(err)
	}
	var err error
	if a.maps, err = maps.Open(a.BPFFSDir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.maps.Close() })
	return a
}

// hold makes flows of one pod hold the first places, of which some are expired, as the programs would have.
func (a *Agent) hold(t *testing.T, pod uint32, flows, expired int) {
	t.Helper()
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(bpf.MapPath(a.BPFFSDir, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	table, slots, quota, state := open(bpf.DataplaneMapCaracalFlows), open(bpf.DataplaneMapCaracalSlots), open(bpf.DataplaneMapCaracalQuota), open(bpf.DataplaneMapCaracalState)
	for i := range flows {
		key := bpf.DataplaneFlowKey{Protocol: 6}
		binary.BigEndian.PutUint32(key.AddressA[12:], uint32(i))
		value := bpf.DataplaneFlow{State: 3, Slot: uint32(i), Charged: pod}
		if i >= expired {
			value.Leg[0].LastSeen = 1 << 62
		}
		if err := errors.Join(table.Put(&key, &value), slots.Put(uint32(i), &key)); err != nil {
			t.Fatal(err)
		}
	}
	var q bpf.DataplaneQuota
	var s bpf.DataplaneState
	if err := errors.Join(quota.Lookup(pod, &q), state.Lookup(uint32(0), &s)); err != nil {
		t.Fatal(err)
	}
	q.Flows, s.Flows = uint32(flows), uint32(flows)
	if err := errors.Join(quota.Put(pod, &q), state.Put(uint32(0), &s)); err != nil {
		t.Fatal(err)
	}
}

// TestSweepTable: expired flows go, piece by piece, with what they were charged; and a table or a pod's share that is nearly full
// is a problem until there is room again.
func TestSweepTable(t *testing.T) {
	const places, pod = 3000, 77 // three pieces
	a := newFlowTable(t, places)
	if err := a.maps.NewQuota(pod, places); err != nil {
		t.Fatal(err)
	}
	a.hold(t, pod, 2900, 700)
	s := &sweeper{full: make(map[string]bool)}
	held := func(want uint32) {
		t.Helper()
		state, err := a.maps.State()
		if err != nil {
			t.Fatal(err)
		}
		q, err := a.maps.Quota(pod)
		if err != nil {
			t.Fatal(err)
		}
		if state.Flows != want || q.Flows != want {
			t.Errorf("%d flows, %d of the pod; want %d", state.Flows, q.Flows, want)
		}
	}
	if err := a.fullness(s, maps.State{Flows: 2900, MaxFlows: places}); err == nil || !strings.Contains(err.Error(), "table is nearly full") || !strings.Contains(err.Error(), "behind interface 77") {
		t.Errorf("2900 of 3000: %v", err)
	}
	for i := range 3 { // 700 of the first 1000 places
		if err := a.sweep(s); i > 0 && err != nil {
			t.Errorf("sweep %d: %v", i, err)
		}
		held(2200)
	}
	if s.next != 0 {
		t.Errorf("after three pieces the next is at %d", s.next)
	}
	for flows, full := range []bool{2699: false, 2700: true} {
		if flows < 2699 {
			continue
		}
		err := a.fullness(&sweeper{}, maps.State{Flows: uint32(flows), MaxFlows: places})
		if (err != nil) != full {
			t.Errorf("%d of 3000: %v", flows, err)
		}
	}
	was := &sweeper{full: map[string]bool{"table": true}}
	if err := a.fullness(was, maps.State{Flows: 2400, MaxFlows: places}); err == nil {
		t.Error("2400 of 3000, after it was nearly full: no problem")
	}
	if err := a.fullness(was, maps.State{Flows: 2399, MaxFlows: places}); err != nil {
		t.Errorf("2399 of 3000: %v", err)
	}

	var out bytes.Buffer
	a.flowMetrics(&out)
	for _, want := range []string{
		"\ncaracal_flows 2200\n", "\ncaracal_flows_max 3000\n", "\ncaracal_flows_opening 0\n", "\ncaracal_flows_opening_max 16384\n", "\ncaracal_flows_displaced_total 0\n",
		"\ncaracal_flows_reclaimed_total{by=\"sweep\"} 700\n", "\ncaracal_flows_refused_total{reason=\"quota\"} 0\n",
		"\ncaracal_pod_flows{interface=\"interface 77\"} 2200\n", "\ncaracal_pod_flows_max{interface=\"interface 77\"} 3000\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}

	// Programs of an earlier build can't: that is no problem of the flows.
	if err := os.Remove(bpf.ProgramPath(a.BPFFSDir, bpf.DataplaneProgSweep)); err != nil {
		t.Fatal(err)
	}
	if err := a.sweep(s); err != nil || !s.warned {
		t.Errorf("without the program: %v", err)
	}
}
