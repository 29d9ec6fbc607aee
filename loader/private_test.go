package loader

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What is loaded in a private directory is mounted nowhere, and goes when it is closed.
func TestPrivateDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, close, err := PrivateDir()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Ensure(Config{Dir: dir, MaxFlows: 16}); err != nil {
			t.Fatal(err)
		}
	}
	id := stateID(t, dir)
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if device := fmt.Sprintf(" %d:%d ", unix.Major(st.Dev), unix.Minor(st.Dev)); strings.Contains(string(mounts), device) {
		t.Errorf("%s, of device%s, is mounted:\n%s", dir, device, mounts)
	}
	if err := close(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		m, err := ebpf.NewMapFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err == nil {
			m.Close()
		}
		if time.Now().After(deadline) {
			t.Fatalf("map %d is there still: %v", id, err)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is there still", dir)
	}
}
