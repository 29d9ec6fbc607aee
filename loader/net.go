package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/tc"
)

// AttachNet puts from_net and to_net onto an uplink: by TCX, or by clsact where the kernel has none. One that carries them
// already gets the pinned ones; what a dead interface of that name left is replaced. Call it in the node's network
// namespace. A TCX hook takes an RCU grace period (about 10 ms).
func AttachNet(dir, ifname string, ifindex int) error {
	for i, h := range netHooks {
		if err := attach(tc.Here(), dir, ifname, ifindex, h, TCX, i == 0); err != nil {
			return err
		}
	}
	return nil
}

// AttachedNet says how from_net is attached to an uplink, ByTCX or ByClsact; or, of either program, what is missing or not
// the pinned one, as an error.
func AttachedNet(dir, ifname string, ifindex int) (string, error) {
	return allAttached(dir, ifname, ifindex, netHooks)
}

// DetachNet takes from_net and to_net off an uplink. Nothing there is not an error, nor is an interface that is gone.
func DetachNet(dir, ifname string) error {
	for _, h := range netHooks {
		if err := detachLink(bpf.LinkPath(dir, ifname, h.program)); err != nil {
			return err
		}
	}
	if err := unpin(dir, ifname, netHooks); err != nil {
		return err
	}
	l, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil // its filters went with it
	}
	pods, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalPods), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned pods: %w", err)
	}
	defer pods.Close()
	return eachFilter(pods, []int{l.Index}, netHooks, removeFilter)
}

// detachLink detaches a pinned link at once; the kernel would do it some time after the last descriptor is closed.
func detachLink(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open link %s: %w", path, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detach link %s: %w", path, err)
	}
	return nil
}

// Uplinks lists the interface names that have link pins of from_net or to_net in dir, each once, sorted. An uplink that is
// attached by clsact has none.
func Uplinks(dir string) ([]string, error) { return linked(dir, netHooks) }
