package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// Reboot does to the host what a reboot does: its processes, pods' namespaces, links, kernel routes and pins are gone and
// the boot id is new; what is on disk (state directory, libcni's cache, configuration) stays. The uplink comes back with
// its addresses; routes of Config.StaticRoutes do not. The pods are PodDead until they are deleted.
func (h *Host) Reboot(ctx context.Context) error {
	unlock, err := lockDir(ctx, h.lab.Dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	pods, err := h.Pods()
	if err != nil {
		return err
	}
	namespaces := []string{h.file.Netns}
	for _, p := range pods {
		p.file.State, p.file.Result = PodDead, nil
		if err := p.save(); err != nil {
			return err
		}
		namespaces = append(namespaces, p.file.Netns)
	}
	if err := endProcesses(ctx, "", namespaces); err != nil {
		return err
	}
	for _, n := range namespaces {
		if err := netns.Delete(n); err != nil {
			return err
		}
	}
	// Not only the directory: it is made under a name of its own ("h1~...") and then renamed.
	for _, pattern := range []string{h.BPFDir(), h.BPFDir() + "[^0-9]*"} {
		dirs, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("list pins: %w", err)
		}
		for _, d := range dirs {
			if err := os.RemoveAll(d); err != nil {
				return fmt.Errorf("remove pins: %w", err)
			}
		}
	}
	if err := h.SetBootID(); err != nil {
		return err
	}
	if err := h.lab.unplug(h.Name); err != nil {
		return err
	}
	if err := h.plugIn(); err != nil {
		return fmt.Errorf("host %s: %w", h.Name, err)
	}
	return nil
}
