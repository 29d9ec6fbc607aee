// Package loader loads the eBPF programs of a node, pins them and their maps, attaches them to interfaces, upgrades
// and unloads them. Every path in bpffs is made in the bpf package.
package loader

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/tc"
)

// DefaultMaxFlows is the size of the flow table unless Config says otherwise: 33 MB of kernel memory.
const DefaultMaxFlows = 131072

// Sizes unless Config says otherwise. But for the events they are limits: entries take memory as they are written.
const (
	DefaultMaxPeers   = 524288  // entries of caracal_peers
	DefaultMaxPolicy  = 1048576 // rows of caracal_policy, about 64 bytes each
	DefaultMaxRules   = 65536   // entries of caracal_rules
	DefaultEventBytes = 1 << 20 // of caracal_events
)

// MaxNodeID is how many bytes of a node's name caracal_state has room for.
const MaxNodeID = len(bpf.DataplaneState{}.Node) - 1

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
	Dir string // the node's own directory in a bpffs, e.g. /sys/fs/bpf/caracal
	// Sizes are fixed when the maps are made.
	MaxFlows   uint32 // size of the flow table in entries; 0 = DefaultMaxFlows
	MaxPeers   uint32 // prefixes that have an identity; 0 = DefaultMaxPeers
	MaxPolicy  uint32 // rows of compiled policy; 0 = DefaultMaxPolicy
	MaxRules   uint32 // rules that are counted; 0 = DefaultMaxRules
	EventBytes uint32 // what waits to be read in caracal_events, a power of two of pages; 0 = DefaultEventBytes
	NodeID     string // written into caracal_state, at most MaxNodeID bytes; how agent and plugin know they see the same bpffs
	Timeouts   Timeouts
}

// Timeouts say how long a flow may be silent before its place is taken by a new one. 0: the default in bpf/state.h. They
// are fixed when programs are loaded.
type Timeouts struct {
	Opening time.Duration // one side was heard, or TCP's handshake is not over
	TCP     time.Duration
	UDP     time.Duration
	ICMP    time.Duration // and every protocol without ports
	SCTP    time.Duration
	Closing time.Duration // after FIN from both sides, or SHUTDOWN COMPLETE
	Closed  time.Duration // after RST or ABORT
}

// Ensure loads and pins programs and maps unless a compatible set is pinned in cfg.Dir already, which costs a few
// system calls. Several callers at once are safe: one loads, the others wait for it. What a caller that was killed left
// is removed. Errors: ErrNotBPFFS, ErrVersion, ErrKernel.
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
	unlock, err := lock(cfg.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkPinned(cfg.Dir); !errors.Is(err, ErrNotLoaded) {
		return err
	}
	if err := removeAsides(cfg.Dir); err != nil {
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
	aside := bpf.AsidePath(cfg.Dir, os.Getpid())
	defer os.RemoveAll(aside)
	if err := pinAll(objects, aside); err != nil {
		return err
	}
	if err := os.Rename(aside, cfg.Dir); err != nil {
		return fmt.Errorf("publish %s: %w", cfg.Dir, err)
	}
	return nil
}

// lock keeps other loaders of the nodes beside dir out until unlock is called. The kernel gives it back when its holder
// dies, so whatever stands aside while it is held is nobody's.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return nil, fmt.Errorf("lock loading: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// removeAsides removes what killed loaders of this node left beside its directory or its pins. Callers hold the lock.
func removeAsides(dir string) error {
	for _, parent := range []string{filepath.Dir(dir), dir, bpf.ProgramsDir(dir)} {
		entries, err := os.ReadDir(parent)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look for leftovers: %w", err)
		}
		for _, e := range entries {
			path := filepath.Join(parent, e.Name())
			of, ok := bpf.AsideOf(path)
			if !ok || of != dir && parent == filepath.Dir(dir) {
				continue
			}
			if err := os.RemoveAll(path); err != nil {
				return fmt.Errorf("remove leftover: %w", err)
			}
		}
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
	flows := cmp.Or(cfg.MaxFlows, DefaultMaxFlows)
	// A few more elements than places: a place is taken again just before its old flow's element is free.
	spec.Maps[bpf.DataplaneMapCaracalFlows].MaxEntries = flows + 1024
	spec.Maps[bpf.DataplaneMapCaracalSlots].MaxEntries = flows
	spec.Maps[bpf.DataplaneMapCaracalNat].MaxEntries = 2 * (flows + 1024)
	spec.Maps[bpf.DataplaneMapCaracalPeers].MaxEntries = cmp.Or(cfg.MaxPeers, DefaultMaxPeers)
	spec.Maps[bpf.DataplaneMapCaracalPolicy].MaxEntries = cmp.Or(cfg.MaxPolicy, DefaultMaxPolicy)
	spec.Maps[bpf.DataplaneMapCaracalRules].MaxEntries = cmp.Or(cfg.MaxRules, DefaultMaxRules)
	spec.Maps[bpf.DataplaneMapCaracalEvents].MaxEntries = cmp.Or(cfg.EventBytes, DefaultEventBytes)
	for name, m := range pinned {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	if err := setTick(spec); err != nil {
		return nil, err
	}
	if err := setTimeouts(spec, cfg.Timeouts); err != nil {
		return nil, err
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

// setTick tells the programs how long a tick is: the resolution of the clocks that move by ticks (clock_getres(2)).
func setTick(spec *ebpf.CollectionSpec) error {
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		return fmt.Errorf("read the length of a tick: %w", err)
	}
	if err := spec.Variables[bpf.DataplaneVarTick].Set(uint64(tick.Nano())); err != nil {
		return fmt.Errorf("set tick: %w", err)
	}
	return nil
}

func setTimeouts(spec *ebpf.CollectionSpec, t Timeouts) error {
	for name, d := range map[string]time.Duration{
		bpf.DataplaneVarTimeoutOpening: t.Opening, bpf.DataplaneVarTimeoutTcp: t.TCP, bpf.DataplaneVarTimeoutUdp: t.UDP,
		bpf.DataplaneVarTimeoutIcmp: t.ICMP, bpf.DataplaneVarTimeoutSctp: t.SCTP,
		bpf.DataplaneVarTimeoutClosing: t.Closing, bpf.DataplaneVarTimeoutClosed: t.Closed,
	} {
		if d < 0 {
			return fmt.Errorf("%s is negative: %s", name, d)
		}
		if d == 0 {
			continue
		}
		if err := spec.Variables[name].Set(uint64(d)); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

func initState(m *ebpf.Map, cfg Config) error {
	state := bpf.DataplaneState{Epoch: 1, Version: SchemaVersion, MaxFlows: cmp.Or(cfg.MaxFlows, DefaultMaxFlows), Build: Build()}
	if len(cfg.NodeID) > MaxNodeID {
		return fmt.Errorf("node id %q: longer than %d bytes", cfg.NodeID, MaxNodeID)
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

// Unload takes the programs of the node in dir off its pods' interfaces and its uplinks and removes every pin, and dir. Run it in the
// node's network namespace: clsact filters elsewhere stay until their interface goes. Nothing there is not an error.
func Unload(dir string) error {
	unlock, err := lock(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	if err := detachAll(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return removeAsides(dir)
}

// detachAll removes the clsact filters of the node's programs. TCX links go with their pins.
func detachAll(dir string) error {
	pods, err := ebpf.LoadPinnedMap(bpf.MapPath(dir, bpf.DataplaneMapCaracalPods), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned pods: %w", err)
	}
	defer pods.Close()
	all, err := interfaces()
	if err != nil {
		return err
	}
	return eachFilter(pods, all, hooks, removeFilter)
}

func removeFilter(ifindex int, h hook) error {
	if err := tc.Here().Detach(ifindex, h.clsact); err != nil {
		return err
	}
	return tc.Here().RemoveClsact(ifindex)
}

// interfaces lists the interfaces of the calling thread's network namespace by index.
func interfaces() ([]int, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var indexes []int
	for _, l := range all {
		indexes = append(indexes, l.Index)
	}
	return indexes, nil
}

// eachFilter calls fn for every clsact filter on these interfaces that is one of the hooks' programs and uses this very
// pods map: another node's interface may have the same number. Who may not ask the kernel for that, without CAP_SYS_ADMIN, goes by
// the filter's name.
func eachFilter(pods *ebpf.Map, interfaces []int, all []hook, fn func(ifindex int, h hook) error) error {
	info, err := pods.Info()
	if err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	own, _ := info.ID()
	for _, ifindex := range interfaces {
		for _, h := range all {
			id, name, err := tc.Here().Named(ifindex, h.clsact)
			if err != nil {
				return err
			}
			if id == 0 {
				continue
			}
			ours, err := is(ebpf.ProgramID(id), h.program, own)
			if errors.Is(err, fs.ErrPermission) {
				ours = name == h.program
			}
			if !ours {
				continue
			}
			if err := fn(ifindex, h); err != nil {
				return err
			}
		}
	}
	return nil
}

// is tells whether a loaded program has this name and uses this map.
func is(program ebpf.ProgramID, name string, m ebpf.MapID) (bool, error) {
	p, err := ebpf.NewProgramFromID(program)
	if err != nil {
		return false, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return false, err
	}
	ids, _ := info.MapIDs()
	return info.Name == name && slices.Contains(ids, m), nil
}
