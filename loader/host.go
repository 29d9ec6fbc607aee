package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// AttachHost puts to_host onto the socket look-ups of the calling thread's network namespace, the node's. One that is there already
// gets the pinned one.
func AttachHost(dir string) error {
	path := hostLink(dir)
	p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(dir, bpf.DataplaneProgToHost), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w: the loaded programs are of an earlier build, which caracalctl upgrade replaces", dir, ErrNotLoaded)
	}
	if err != nil {
		return fmt.Errorf("open program %s: %w", bpf.DataplaneProgToHost, err)
	}
	defer p.Close()
	l, err := link.LoadPinnedLink(path, nil)
	if err == nil {
		err = l.Update(p)
		l.Close()
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("update link %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil { // its namespace is gone
			return fmt.Errorf("remove link: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open link %s: %w", path, err)
	}
	here, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer here.Close()
	made, err := link.AttachNetNs(int(here.Fd()), p)
	if err != nil {
		return fmt.Errorf("attach %s: %w", bpf.DataplaneProgToHost, err)
	}
	defer made.Close()
	if err := made.Pin(path); err != nil {
		return fmt.Errorf("pin link %s: %w", path, err)
	}
	return nil
}

// hostLink: /sys/fs/bpf/caracal/links/host-to_host
func hostLink(dir string) string { return bpf.LinkPath(dir, "host", bpf.DataplaneProgToHost) }
