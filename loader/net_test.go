package loader

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/tc"
)

// wantNet fails unless both programs are on the uplink in this way; "" for not at all.
func (h *host) wantNet(dir, name string, index int, want string) {
	h.t.Helper()
	h.do(func() error {
		how, err := AttachedNet(dir, name, index)
		if (want == "") != (err != nil) || how != want {
			h.t.Errorf("%s is attached by %q (%v), want %q", name, how, err, want)
		}
		return nil
	})
}

// without makes this kernel one without TCX.
func without(t *testing.T) {
	old := hasTCX
	t.Cleanup(func() { hasTCX = old })
	hasTCX = func() bool { return false }
}

// Uplinks of names that file systems, patterns and our own pins might stumble over.
func TestAttachNet(t *testing.T) {
	needTCX(t)
	dir := ensured(t)
	h := newHost(t, "n")
	names := []string{"eth0.100", "a*", "a[b", "-", "a-from_net", "a~1", "é"}
	indexes := make(map[string]int)
	for _, name := range names {
		index := h.veth(name)
		indexes[name] = index
		h.wantNet(dir, name, index, "")
		for range 2 {
			h.do(func() error { return AttachNet(dir, name, index) })
			h.wantNet(dir, name, index, ByTCX)
		}
		h.wantAttached(dir, name, index, "")
	}
	slices.Sort(names)
	if got, err := Uplinks(dir); err != nil || !slices.Equal(got, names) {
		t.Errorf("uplinks %q (%v), want %q", got, err, names)
	}
	if got, err := Links(dir); err != nil || len(got) != 0 {
		t.Errorf("links of pods %q (%v)", got, err)
	}
	h.do(func() error { return Upgrade(Config{Dir: dir, Timeouts: Timeouts{UDP: time.Minute}}) })
	for _, name := range names {
		h.wantNet(dir, name, indexes[name], ByTCX)
	}

	// The interface goes and another of its name comes.
	h.remove(indexes["a*"])
	again := h.veth("a*")
	h.wantNet(dir, "a*", again, "")
	h.do(func() error { return AttachNet(dir, "a*", again) })
	h.wantNet(dir, "a*", again, ByTCX)

	for range 2 {
		h.do(func() error { return DetachNet(dir, "a*") })
		h.wantNet(dir, "a*", again, "")
	}
	h.do(func() error { return DetachNet(dir, "gone") })
	for _, name := range names {
		if name != "a*" {
			h.wantNet(dir, name, indexes[name], ByTCX)
		}
	}
	h.do(func() error { return Unload(dir) })
	if got := entries(t, filepath.Dir(dir)); len(got) != 0 {
		t.Errorf("left in bpffs: %v", got)
	}
	h.do(func() error { return DetachNet(dir, "eth0.100") })
}

func TestAttachNetWithoutTCX(t *testing.T) {
	without(t)
	dir := ensured(t)
	h := newHost(t, "nc")
	index, other := h.veth("up"), h.veth("up2")
	for range 2 {
		h.do(func() error { return AttachNet(dir, "up", index) })
		h.do(func() error { return AttachNet(dir, "up2", other) })
		h.wantNet(dir, "up", index, ByClsact)
	}
	// Found without an entry in any map.
	h.do(func() error { return Upgrade(Config{Dir: dir, Timeouts: Timeouts{UDP: time.Minute}}) })
	h.wantNet(dir, "up", index, ByClsact)
	for range 2 {
		h.do(func() error { return DetachNet(dir, "up") })
		h.wantNet(dir, "up", index, "")
	}
	h.wantNet(dir, "up2", other, ByClsact)
	h.do(func() error { return Unload(dir) })
	h.do(func() error {
		for _, d := range []tc.Direction{tc.Ingress, tc.Egress} {
			if id, err := tc.Here().Attached(other, d); id != 0 || err != nil {
				t.Errorf("filter of program %d stayed (%v)", id, err)
			}
		}
		return nil
	})
}

// A node that was loaded before these hooks were counted keeps what it has counted.
func TestUpgradeGrowsCounts(t *testing.T) {
	dir := ensured(t)
	path := bpf.MapPath(dir, bpf.DataplaneMapCaracalCounts)
	small, err := ebpf.NewMap(&ebpf.MapSpec{Name: "caracal_counts", Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: 16, MaxEntries: 2 * bpf.VerdictSpace})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	perCPU := make([]bpf.DataplaneCount, ebpf.MustPossibleCPU())
	perCPU[0] = bpf.DataplaneCount{Packets: 5, Bytes: 500}
	if err := errors.Join(small.Put(uint32(70), perCPU), os.Remove(path), small.Pin(path)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Upgrade(Config{Dir: dir}); err != nil {
			t.Fatal(err)
		}
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var got []bpf.DataplaneCount
	if err := m.Lookup(uint32(70), &got); err != nil || got[0] != perCPU[0] || int(m.MaxEntries()) != len(bpf.Hooks)*bpf.VerdictSpace {
		t.Errorf("%d entries; %v (%v)", m.MaxEntries(), got, err)
	}
}
