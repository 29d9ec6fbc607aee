package maps

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// pinnedMaps pins the dataplane's maps, small, in a bpffs of the test's own.
func pinnedMaps(t *testing.T) *Maps {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	if err := unix.Mount("bpf", root, "bpf", 0, ""); err != nil {
		t.Fatalf("mount bpffs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	dir := filepath.Join(root, "node")
	if _, err := Open(dir); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("open of nothing: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object()))
	if err != nil {
		t.Fatal(err)
	}
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		s := spec.Maps[name]
		if s.Type != ebpf.RingBuf {
			s.MaxEntries = min(s.MaxEntries, 1024)
		}
		m, err := ebpf.NewMap(s)
		if err != nil {
			t.Fatalf("create map %s: %v", name, err)
		}
		defer m.Close()
		if err := m.Pin(bpf.MapPath(dir, name)); err != nil {
			t.Fatalf("pin map %s: %v", name, err)
		}
	}
	m, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// A quota that a pod has keeps its limit; without one there is ErrNotFound, and removing is no error.
func TestQuota(t *testing.T) {
	m := pinnedMaps(t)
	if _, err := m.Quota(7); !errors.Is(err, ErrNotFound) {
		t.Errorf("quota of nobody: %v", err)
	}
	for _, limit := range []uint32{100, 200} {
		if err := m.NewQuota(7, limit); err != nil {
			t.Fatal(err)
		}
	}
	if q, err := m.Quota(7); err != nil || q != (Quota{Limit: 100}) {
		t.Errorf("%+v (%v), want the first limit", q, err)
	}
	for range 2 {
		if err := m.RemoveQuota(7); err != nil {
			t.Error(err)
		}
	}
}

func TestRoutes(t *testing.T) {
	m := pinnedMaps(t)
	want := []Route{
		{Prefix: netip.MustParsePrefix("10.244.0.0/26"), Kind: RouteBlackhole},
		{Prefix: netip.MustParsePrefix("10.244.0.7/32"), Kind: RouteLocalPod, IfIndex: 7},
		{Prefix: netip.MustParsePrefix("10.244.0.64/26"), Kind: RouteRemote, IfIndex: 2, NextHop: netip.MustParseAddr("192.0.2.2"), MTU: 1450},
		{Prefix: netip.MustParsePrefix("2001:db8:244::40/122"), Kind: RouteRemote, IfIndex: 2, NextHop: netip.MustParseAddr("2001:db8::2")},
	}
	for _, r := range want {
		if err := m.PutRoute(r); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := m.Routes(); err != nil || !slices.Equal(got, want) {
		t.Errorf("routes %v (%v), want %v", got, err, want)
	}
	for range 2 {
		if err := m.RemoveRoute(want[0].Prefix); err != nil {
			t.Error(err)
		}
	}
	if got, err := m.Routes(); err != nil || !slices.Equal(got, want[1:]) {
		t.Errorf("after a removal: %v (%v)", got, err)
	}
}

func TestAddress(t *testing.T) {
	for _, s := range []string{"0.0.0.0", "10.1.2.3", "::1", "2001:db8::1"} {
		a := netip.MustParseAddr(s)
		if got := FromAddress(Address(a)); got != a {
			t.Errorf("%s came back as %s", a, got)
		}
	}
	if got := FromAddress([16]byte{}); got.IsValid() {
		t.Errorf(":: is the address %s", got)
	}
}
