// Package loader loads the eBPF programs of a node, pins them and their maps, attaches them to interfaces, upgrades
// and unloads them. Every path in bpffs is made in the bpf package.
package loader

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// DefaultMaxFlows is the size of the flow table unless Config says otherwise: 33 MB of kernel memory.
const DefaultMaxFlows = 131072

// SchemaVersion is the version of the maps' layout. Programs and maps of different versions do not work together.
const SchemaVersion = bpf.SchemaVersion

var (
	// ErrNotBPFFS says that the directory is not in a bpffs.
	ErrNotBPFFS = errors.New("not in a bpf file system")
	// ErrVersion says that the pinned maps have another layout than these programs.
	ErrVersion = errors.New("pinned maps are of another schema version")
	// ErrNotLoaded says that nothing is pinned in the directory.
	ErrNotLoaded = errors.New("no programs are pinned there")
	// ErrKernel says that the kernel lacks something that the programs need.
	ErrKernel = errors.New("kernel too old")
)

// Config says where and how a node's programs are loaded.
type Config struct {
	Dir      string // the node's own directory in a bpffs, e.g. /sys/fs/bpf/caracal
	MaxFlows uint32 // size of the flow table in entries; 0 = DefaultMaxFlows; fixed when the maps are made
	NodeID   string // written into caracal_state, at most 31 bytes; how agent and plugin know they see the same bpffs
}

// Ensure loads and pins programs and maps unless a compatible set is pinned in cfg.Dir already, which costs a few
// system calls. Several callers at once are safe: one of them wins. Errors: ErrNotBPFFS, ErrVersion, ErrKernel.
func Ensure(cfg Config) error {
	if err := checkPinned(cfg.Dir); !errors.Is(err, ErrNotLoaded) {
		return err
	}
	if err := CheckBPFFS(filepath.Dir(cfg.Dir)); err != nil {
		return err
	}
	if err := Probe(); err != nil {
		return err
	}
	objects, err := load(cfg, nil)
	if err != nil {
		return err
	}
	defer objects.Close()
	if err := initState(objects.CaracalState, cfg); err != nil {
		return err
	}

	// Everything is pinned aside and appears at once.
	aside := fmt.Sprintf("%s-%d", cfg.Dir, os.Getpid())
	defer os.RemoveAll(aside)
	if err := pinAll(objects, aside); err != nil {
		return err
	}
	if err := os.Rename(aside, cfg.Dir); err != nil {
		if checkPinned(cfg.Dir) == nil {
			return nil // another process was first; ours goes away unused
		}
		return fmt.Errorf("publish %s: %w", cfg.Dir, err)
	}
	return nil
}

// CheckBPFFS tells whether dir is in a bpf file system: nil, ErrNotBPFFS, or why it can't be told.
func CheckBPFFS(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s: %w", dir, ErrNotBPFFS)
	}
	return nil
}

// checkPinned tells whether dir holds a complete, compatible set: nil, ErrNotLoaded or ErrVersion.
func checkPinned(dir string) error {
	m, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalState), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %w", dir, ErrNotLoaded)
	}
	if err != nil {
		return fmt.Errorf("open pinned state in %s: %w", dir, err)
	}
	defer m.Close()
	if m.ValueSize() != uint32(bpf.StateSize) {
		return fmt.Errorf("%s: %w: its state has %d bytes, not %d; unload it with the version that loaded it", dir, ErrVersion, m.ValueSize(), bpf.StateSize)
	}
	var state bpf.DataplaneState
	if err := m.Lookup(uint32(0), &state); err != nil {
		return fmt.Errorf("read state in %s: %w", dir, err)
	}
	if state.Version != SchemaVersion {
		return fmt.Errorf("%s: %w: %d, these programs need %d; unload it with the version that loaded it", dir, ErrVersion, state.Version, SchemaVersion)
	}
	return nil
}

// load loads the programs, with the given maps in place of new ones where there are any.
func load(cfg Config, pinned map[string]*ebpf.Map) (*bpf.DataplaneObjects, error) {
	spec, err := bpf.LoadDataplane()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	flows := cfg.MaxFlows
	if flows == 0 {
		flows = DefaultMaxFlows
	}
	// A few more elements than places: a place is taken again just before its old flow's element is free.
	spec.Maps[bpf.DataplaneMapCaracalFlows].MaxEntries = flows + 1024
	spec.Maps[bpf.DataplaneMapCaracalSlots].MaxEntries = flows
	for name, m := range pinned {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	var objects bpf.DataplaneObjects
	if err := spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{MapReplacements: pinned}); err != nil {
		if errors.Is(err, ebpf.ErrMapIncompatible) {
			return nil, fmt.Errorf("%s: %w: %w", cfg.Dir, ErrVersion, err)
		}
		return nil, fmt.Errorf("load programs: %w", err)
	}
	return &objects, nil
}

func initState(m *ebpf.Map, cfg Config) error {
	state := bpf.DataplaneState{Epoch: 1, Version: SchemaVersion, MaxFlows: cfg.MaxFlows, Build: Build()}
	if state.MaxFlows == 0 {
		state.MaxFlows = DefaultMaxFlows
	}
	if len(cfg.NodeID) >= len(state.Node) {
		return fmt.Errorf("node id %q: longer than %d bytes", cfg.NodeID, len(state.Node)-1)
	}
	copy(state.Node[:], cfg.NodeID)
	if err := m.Put(uint32(0), &state); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// Build identifies the programs in this binary: the first bytes of their SHA-256.
func Build() [8]byte {
	sum := sha256.Sum256(bpf.Object())
	return [8]byte(sum[:8])
}

func pinAll(objects *bpf.DataplaneObjects, dir string) error {
	for _, d := range []string{dir, bpf.ProgramsDir(dir), bpf.LinksDir(dir)} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("create %s: %w", d, err)
		}
	}
	for name, m := range bpf.Maps(objects) {
		if err := m.Pin(bpf.MapPath(dir, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	for name, p := range bpf.Programs(objects) {
		if err := p.Pin(bpf.ProgramPath(dir, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// Unload removes every pin of the node in dir, and dir. Interfaces keep no program that was attached by TCX; clsact
// filters stay until their interface goes or Detach removes them. Nothing there is not an error.
func Unload(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}
