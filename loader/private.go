package loader

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// PrivateDir makes a bpf file system that is mounted nowhere and returns a path in it, for a Config.Dir. Only this process
// can use the path. What is pinned there goes with close, or with the process, however it ends.
func PrivateDir() (dir string, close func() error, err error) {
	fs, err := unix.Fsopen("bpf", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return "", nil, explainMount(err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return "", nil, explainMount(err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return "", nil, explainMount(err)
	}
	root := fmt.Sprintf("/proc/self/fd/%d", mount)
	return filepath.Join(root, "node"), func() error { return unix.Close(mount) }, nil
}

func explainMount(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("make a bpf file system: %w; it takes root, outside of containers' user namespaces", err)
	}
	return fmt.Errorf("make a bpf file system: %w", err)
}
