package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/tc"
)

// Mode says how programs get onto an interface.
type Mode int

const (
	// Quick attaches in a few hundred microseconds by clsact; Settle moves the interface to TCX later.
	Quick Mode = iota
	// TCX attaches by TCX links, which takes an RCU grace period a hook (about 10 ms); clsact where the kernel has none.
	TCX
)

// How an interface carries its programs, as Attached says it.
const (
	ByTCX    = "tcx"
	ByClsact = "clsact"
)

// hook is a place of an interface and its program.
type hook struct {
	program string
	tcx     ebpf.AttachType
	clsact  tc.Direction
}

// podHooks are those of a pod's host interface, from_pod first; netHooks are an uplink's.
var (
	podHooks = []hook{
		{bpf.DataplaneProgFromPod, ebpf.AttachTCXIngress, tc.Ingress},
		{bpf.DataplaneProgToPod, ebpf.AttachTCXEgress, tc.Egress},
	}
	netHooks = []hook{
		{bpf.DataplaneProgFromNet, ebpf.AttachTCXIngress, tc.Ingress},
		{bpf.DataplaneProgToNet, ebpf.AttachTCXEgress, tc.Egress},
	}
	hooks = slices.Concat(podHooks, netHooks)
)

// probeTCX asks the kernel for a TCX hook of an interface that does not exist: only one that knows TCX looks for it.
func probeTCX() bool {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err == nil || errors.Is(err, unix.ENOENT)
}

// Attach puts from_pod and to_pod onto the host end of a pod's veth. An interface that carries them already gets the
// pinned ones; what a dead interface of that name left is replaced.
func Attach(c tc.Conn, dir, ifname string, ifindex int, mode Mode) error {
	for i, h := range podHooks {
		if err := attach(c, dir, ifname, ifindex, h, mode, i == 0); err != nil {
			return err
		}
	}
	return nil
}

func attach(c tc.Conn, dir, ifname string, ifindex int, h hook, mode Mode, first bool) error {
	l, err := openLink(dir, ifname, h.program, ifindex)
	if err != nil {
		return err
	}
	if l == nil && (mode == Quick || !HasTCX()) {
		return attachQuick(c, dir, ifindex, h, first)
	}
	p, err := openProgram(dir, h.program)
	if err != nil {
		return err
	}
	defer p.Close()
	if l != nil {
		defer l.Close()
		if err := update(l, p, ifname); err != nil {
			return err
		}
		return c.Detach(ifindex, h.clsact) // what a Settle that was killed left
	}
	id, err := c.Attached(ifindex, h.clsact)
	if err != nil {
		return err
	}
	if id != 0 {
		return settle(dir, ifname, ifindex, h)
	}
	return attachTCX(dir, ifname, ifindex, h, p)
}

func attachQuick(c tc.Conn, dir string, ifindex int, h hook, first bool) error {
	fd, err := programFD(dir, h.program)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if first {
		if err := c.AddClsact(ifindex); err != nil {
			return err
		}
	}
	return c.Attach(ifindex, h.clsact, h.program, fd)
}

func attachTCX(dir, ifname string, ifindex int, h hook, p *ebpf.Program) error {
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: p, Attach: h.tcx})
	if err != nil {
		return fmt.Errorf("attach %s to %s by TCX: %w", h.program, ifname, err)
	}
	defer l.Close()
	// Over what a dead interface of that name may have left, in one step. A process killed between the two calls below
	// leaves its link aside.
	path := bpf.LinkPath(dir, ifname, h.program)
	if err := removeAsideLinks(path); err != nil {
		return err
	}
	aside := bpf.AsidePath(path, os.Getpid())
	if err := l.Pin(aside); err != nil {
		return fmt.Errorf("pin link of %s to %s: %w", h.program, ifname, err)
	}
	if err := os.Rename(aside, path); err != nil {
		os.Remove(aside)
		return fmt.Errorf("pin link of %s to %s: %w", h.program, ifname, err)
	}
	return nil
}

// removeAsideLinks removes what killed processes left beside the link at path.
func removeAsideLinks(path string) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("look for stale links: %w", err)
	}
	for _, e := range entries {
		aside := filepath.Join(filepath.Dir(path), e.Name())
		if of, ok := bpf.AsideOf(aside); ok && of == path {
			os.Remove(aside)
		}
	}
	return nil
}

func update(l link.Link, p *ebpf.Program, ifname string) error {
	if err := l.Update(p); err != nil {
		return fmt.Errorf("update program of %s: %w", ifname, err)
	}
	return nil
}

// Attached says how from_pod is attached, ByTCX or ByClsact; or, of either program, what is missing or not the pinned one, as
// an error.
func Attached(dir, ifname string, ifindex int) (string, error) {
	return allAttached(dir, ifname, ifindex, podHooks)
}

// allAttached says how the first of the hooks is attached.
func allAttached(dir, ifname string, ifindex int, all []hook) (string, error) {
	how := ""
	for i, h := range all {
		want, err := programID(dir, h.program)
		if err != nil {
			return "", err
		}
		got, by, err := attached(dir, ifname, ifindex, h, want)
		switch {
		case err != nil:
			return "", err
		case by == "":
			return "", fmt.Errorf("program %s is not attached to %s", h.program, ifname)
		case got != want:
			return "", fmt.Errorf("program %s on %s has id %d, pinned is %d", h.program, ifname, got, want)
		}
		if i == 0 {
			how = by
		}
	}
	return how, nil
}

// attached returns the id of the program on one hook, which should be want, and how it got there, "" when there is none.
func attached(dir, ifname string, ifindex int, h hook, want ebpf.ProgramID) (ebpf.ProgramID, string, error) {
	id, err := attachedTCX(dir, ifname, ifindex, h)
	if err != nil || id == want {
		return id, ByTCX, err
	}
	quick, err := tc.Here().Attached(ifindex, h.clsact)
	if err != nil || ebpf.ProgramID(quick) == want {
		return want, ByClsact, err
	}
	// Settle, which moves nothing back, may have been at work between the two looks: a placeholder there, nothing here.
	if id, err = attachedTCX(dir, ifname, ifindex, h); err != nil || id != 0 {
		return id, ByTCX, err
	}
	if quick != 0 {
		return ebpf.ProgramID(quick), ByClsact, nil
	}
	return 0, "", nil
}

// attachedTCX returns the id of the program of a hook's link, 0 when there is no link.
func attachedTCX(dir, ifname string, ifindex int, h hook) (ebpf.ProgramID, error) {
	l, err := openLink(dir, ifname, h.program, ifindex)
	if err != nil || l == nil {
		return 0, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("read link of %s: %w", ifname, err)
	}
	return info.Program, nil
}

// Settle moves an interface's from_pod from clsact to TCX, which every packet of the pod gains by. to_pod stays where it
// is: it sees only what comes through the host's stack, and a TCX hook more costs an RCU grace period when the interface is
// removed, with the kernel's network lock held.
//
// There is no moment without a program: a placeholder waits out the grace period on the TCX hook, then the real program
// takes its place and the filter goes. Between these two calls a packet that is left to the host's stack meets both and is
// counted twice, here and in its flow; it is not changed twice, for only what is redirected is rewritten. The other order
// would let packets pass unjudged. Nothing to do is not an error.
func Settle(dir, ifname string, ifindex int) error {
	if !HasTCX() {
		return nil
	}
	return settle(dir, ifname, ifindex, podHooks[0])
}

func settle(dir, ifname string, ifindex int, h hook) error {
	l, err := openLink(dir, ifname, h.program, ifindex)
	if err != nil {
		return err
	}
	if l == nil {
		wait, err := openProgram(dir, bpf.DataplaneProgPlaceholder)
		if err != nil {
			return err
		}
		defer wait.Close()
		if err := attachTCX(dir, ifname, ifindex, h, wait); err != nil {
			return err
		}
		if l, err = openLink(dir, ifname, h.program, ifindex); err != nil {
			return err
		}
		if l == nil {
			return fmt.Errorf("settle %s: interface went away", ifname)
		}
	}
	defer l.Close()
	p, err := openProgram(dir, h.program)
	if err != nil {
		return err
	}
	defer p.Close()
	if err := update(l, p, ifname); err != nil {
		return err
	}
	return tc.Here().Detach(ifindex, h.clsact)
}

// Detach removes the pins of an interface's links. On an interface that lives this detaches the programs, which
// takes an RCU grace period each; so remove the interface first. No pins are not an error.
func Detach(dir, ifname string) error { return unpin(dir, ifname, podHooks) }

func unpin(dir, ifname string, all []hook) error {
	for _, h := range all {
		if err := os.Remove(bpf.LinkPath(dir, ifname, h.program)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove link pin: %w", err)
		}
	}
	return nil
}

// Links lists the pods' interface names that have link pins in dir, each once, sorted.
func Links(dir string) ([]string, error) { return linked(dir, podHooks) }

func linked(dir string, all []hook) ([]string, error) {
	entries, err := os.ReadDir(bpf.LinksDir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var names []string
	for _, e := range entries {
		for _, h := range all {
			if name, ok := bpf.LinkInterface(e.Name(), h.program); ok && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return names, nil
}

// openLink opens the pinned link of one hook, or returns nil when there is none for this very interface: a link whose
// interface is gone (defunct), or another one of the same name, counts as absent. It changes nothing, because readers call it too.
func openLink(dir, ifname, program string, ifindex int) (link.Link, error) {
	path := bpf.LinkPath(dir, ifname, program)
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open link %s: %w", path, err)
	}
	info, err := l.Info()
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("read link %s: %w", path, err)
	}
	if t := info.TCX(); t != nil && int(t.Ifindex) == ifindex {
		return l, nil
	}
	return nil, l.Close()
}

// programFD opens a pinned program by BPF_OBJ_GET (bpf(2)) alone. The library would also ask what it is, and try what the
// kernel knows of names and tokens: a quarter of a millisecond in every ADD.
func programFD(dir, name string) (int, error) {
	path, err := unix.BytePtrFromString(bpf.ProgramPath(dir, name))
	if err != nil {
		return 0, fmt.Errorf("open program %s in %s: %w", name, dir, err)
	}
	attr := struct {
		path      uint64
		fd, flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(path)))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(path)
	switch errno {
	case 0:
		return int(fd), nil
	case unix.ENOENT:
		return 0, fmt.Errorf("open program %s in %s: %w", name, dir, ErrNotLoaded)
	}
	return 0, fmt.Errorf("open program %s in %s: %w", name, dir, errno)
}

func openProgram(dir, name string) (*ebpf.Program, error) {
	p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(dir, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open program %s in %s: %w", name, dir, ErrNotLoaded)
	}
	if err != nil {
		return nil, fmt.Errorf("open program %s in %s: %w", name, dir, err)
	}
	return p, nil
}

func programID(dir, name string) (ebpf.ProgramID, error) {
	p, err := openProgram(dir, name)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("read program %s: %w", name, err)
	}
	id, _ := info.ID()
	return id, nil
}
