package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/tc"
)

// added are the maps that nodes of the same schema version may lack.
var added = []string{
	bpf.DataplaneMapCaracalPeers, bpf.DataplaneMapCaracalPolicy, bpf.DataplaneMapCaracalRules,
	bpf.DataplaneMapCaracalEvents, bpf.DataplaneMapCaracalTold, bpf.DataplaneMapCaracalChurn,
	bpf.DataplaneMapCaracalService,
}

// Upgrade replaces the programs of a running node by those in this binary, on its existing maps, so that flows go on:
// every interface's link is updated in one step and no packet meets no program. Maps that they do not have yet are made.
// Errors: ErrNotLoaded, ErrVersion when the maps have another layout; then nothing was changed.
func Upgrade(cfg Config) error {
	if err := checkPinned(cfg.Dir); err != nil {
		return err
	}
	unlock, err := lock(cfg.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := removeAsides(cfg.Dir); err != nil {
		return err
	}
	pinned := make(map[string]*ebpf.Map)
	defer func() {
		for _, m := range pinned {
			m.Close()
		}
	}()
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		m, err := ebpf.LoadPinnedMap(bpf.MapPath(cfg.Dir, name), nil)
		if errors.Is(err, fs.ErrNotExist) && slices.Contains(added, name) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open pinned map %s: %w", name, err)
		}
		pinned[name] = m
	}
	// These are made anew: the size of the one goes with the number of hooks; of the other, scratch of one program run,
	// the layout goes with the programs.
	counts, work := pinned[bpf.DataplaneMapCaracalCounts], pinned[bpf.DataplaneMapCaracalWork]
	grown := counts.MaxEntries() < uint32(len(bpf.Hooks)*bpf.VerdictSpace)
	if grown {
		defer counts.Close()
		delete(pinned, bpf.DataplaneMapCaracalCounts)
	}
	if work.ValueSize() != uint32(bpf.WorkSize) {
		defer work.Close()
		delete(pinned, bpf.DataplaneMapCaracalWork)
	}
	objects, err := load(cfg, pinned)
	if err != nil {
		return err
	}
	defer objects.Close()
	if grown {
		if err := moveCounts(counts, objects.CaracalCounts); err != nil {
			return err
		}
	}
	for name, m := range bpf.Maps(objects) {
		if pinned[name] != nil {
			continue
		}
		if err := replacePin(m, bpf.MapPath(cfg.Dir, name)); err != nil {
			return err
		}
	}

	// First the pins, so that interfaces attached from now on get the new programs; then the interfaces there are.
	for name, p := range bpf.Programs(objects) {
		if err := replacePin(p, bpf.ProgramPath(cfg.Dir, name)); err != nil {
			return err
		}
	}
	if err := writeBuild(objects.CaracalState); err != nil {
		return err
	}
	return updateAll(cfg.Dir, objects)
}

// moveCounts copies what was counted. What the old programs count from here on until they are replaced is lost.
func moveCounts(from, to *ebpf.Map) error {
	var perCPU []bpf.DataplaneCount
	for i := range from.MaxEntries() {
		if err := from.Lookup(i, &perCPU); err != nil {
			return fmt.Errorf("read count %d: %w", i, err)
		}
		if err := to.Put(i, perCPU); err != nil {
			return fmt.Errorf("write count %d: %w", i, err)
		}
	}
	return nil
}

// replacePin pins p at path in one step, whatever was pinned there.
func replacePin(p interface{ Pin(string) error }, path string) error {
	aside := bpf.AsidePath(path, os.Getpid())
	if err := p.Pin(aside); err != nil {
		return fmt.Errorf("pin %s: %w", aside, err)
	}
	if err := os.Rename(aside, path); err != nil {
		os.Remove(aside)
		return fmt.Errorf("replace pin: %w", err)
	}
	return nil
}

// updateAll puts the new programs onto every interface that carries the old ones.
func updateAll(dir string, objects *bpf.DataplaneObjects) error {
	names, err := linked(dir, hooks)
	if err != nil {
		return err
	}
	for _, name := range names {
		for _, h := range hooks {
			if err := updateLink(bpf.LinkPath(dir, name, h.program), bpf.Programs(objects)[h.program]); err != nil {
				return fmt.Errorf("upgrade %s: %w", name, err)
			}
		}
	}
	if err := updateLink(hostLink(dir), objects.ToHost); err != nil {
		return err
	}
	all, err := interfaces()
	if err != nil {
		return err
	}
	return eachFilter(objects.CaracalPods, all, hooks, func(ifindex int, h hook) error {
		return tc.Here().Attach(ifindex, h.clsact, h.program, bpf.Programs(objects)[h.program].FD())
	})
}

func updateLink(path string, p *ebpf.Program) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Update(p); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("update link %s: %w", path, err)
	}
	return nil
}

// writeBuild changes the build in the state, nothing else: the entry is mapped, so no other field is written back.
func writeBuild(m *ebpf.Map) error {
	memory, err := m.Memory()
	if err != nil {
		return fmt.Errorf("map state: %w", err)
	}
	build := Build()
	if _, err := memory.WriteAt(build[:], int64(bpf.StateBuildOffset)); err != nil {
		return fmt.Errorf("write build: %w", err)
	}
	return nil
}
