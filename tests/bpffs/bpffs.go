// Package bpffs gives tests a bpf file system. It imports nothing of the project's, so that every package's tests can use it.
package bpffs

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Mount mounts one of the test's own, until it ends, and returns where. It takes root.
func Mount(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount bpffs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount bpffs: %v", err)
		}
	})
	return dir
}
