// Package datapath builds the paths that podbench compares: pairs of pod namespaces joined by a bare veth pair, by a
// redirecting program, or by any CNI plugin, each in a host namespace of its own.
package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

const (
	dirPrefix  = "podbench-" // of a session's directory below os.TempDir, followed by the process id
	namePrefix = "pb-"       // of every namespace, followed by the process id
)

// Session owns everything one podbench process puts on the machine: a directory, namespaces, mounts, and processes
// that plugins left running. Close removes all of it. A Session is safe for concurrent use.
type Session struct {
	Dir string // private directory: state, libcni's cache, bpffs mounts

	mu         sync.Mutex
	namespaces map[string]bool
	mounts     []string
	nodes      []*Node
	serial     int
}

// NewSession makes the private directory and makes this process the parent of whatever its descendants leave
// behind (PR_SET_CHILD_SUBREAPER), so that Close finds background processes of plugins.
func NewSession() (*Session, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("network namespaces need root: run podbench as root")
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", dirPrefix, os.Getpid()))
	if err != nil {
		return nil, fmt.Errorf("create private directory: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		os.Remove(dir)
		return nil, fmt.Errorf("become subreaper: %w", err)
	}
	return &Session{Dir: dir, namespaces: map[string]bool{}}, nil
}

// namespace makes a namespace called pb-<pid>-<suffix> and opens it.
func (s *Session) namespace(suffix string) (string, *netns.NS, error) {
	name := fmt.Sprintf("%s%d-%s", namePrefix, os.Getpid(), suffix)
	s.mu.Lock()
	s.namespaces[name] = true
	s.mu.Unlock()
	if err := netns.Create(name); err != nil {
		return "", nil, err
	}
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		return "", nil, errors.Join(err, s.removeNamespace(name))
	}
	return name, ns, nil
}

func (s *Session) removeNamespace(name string) error {
	if err := netns.Delete(name); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.namespaces, name)
	s.mu.Unlock()
	return nil
}

// mountBPF mounts a bpffs of its own at dir.
func (s *Session) mountBPF(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create bpffs directory: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpffs on %s: %w", dir, err)
	}
	s.mu.Lock()
	s.mounts = append(s.mounts, dir)
	s.mu.Unlock()
	return nil
}

func (s *Session) unmount(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	s.mu.Lock()
	s.mounts = slices.DeleteFunc(s.mounts, func(m string) bool { return m == dir })
	s.mu.Unlock()
	return nil
}

// next returns a number that no other caller of this session gets.
func (s *Session) next() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serial++
	return s.serial
}

// Close detaches every pod through its plugin and removes namespaces, mounts, processes and files. It goes on after
// an error and returns all of them; what it could not remove then still exists.
func (s *Session) Close(ctx context.Context) error {
	var errs []error
	s.mu.Lock()
	nodes := slices.Clone(s.nodes)
	s.mu.Unlock()
	for _, n := range slices.Backward(nodes) {
		errs = append(errs, n.Close(ctx))
	}
	errs = append(errs, s.Reap(2*time.Second))
	s.mu.Lock()
	var names []string
	for name := range s.namespaces {
		names = append(names, name)
	}
	mounts := slices.Clone(s.mounts)
	s.mu.Unlock()
	for _, name := range names {
		errs = append(errs, s.removeNamespace(name))
	}
	for _, dir := range slices.Backward(mounts) {
		errs = append(errs, s.unmount(dir))
	}
	if len(s.mounts) == 0 { // never delete through a mount
		errs = append(errs, os.RemoveAll(s.Dir))
	}
	return errors.Join(errs...)
}

// Reap waits for orphans that plugins left running, and kills those that still run after grace. No command may be
// running in this process meanwhile: its exit status would be taken away from it.
func (s *Session) Reap(grace time.Duration) error {
	deadline := time.Now().Add(grace)
	for {
		children, err := childrenOf(os.Getpid())
		if err != nil {
			return err
		}
		if len(children) == 0 {
			return nil
		}
		for _, pid := range children {
			if time.Now().After(deadline) {
				_ = unix.Kill(pid, unix.SIGKILL) // it may have ended
			}
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func childrenOf(pid int) ([]int, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	var out []int
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread ended
		}
		for _, word := range strings.Fields(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return nil, fmt.Errorf("parse %s: %w", f, err)
			}
			out = append(out, child)
		}
	}
	return out, nil
}

var ownedName = regexp.MustCompile(`^(?:pb-|podbench-)([0-9]+)-`)

// Stale lists the namespaces and directories of podbench processes that no longer live: after kill -9 or a crash.
func Stale() (namespaces, dirs []string, err error) {
	collect := func(dir, prefix string, full bool) ([]string, error) {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		var out []string
		for _, e := range entries {
			m := ownedName.FindStringSubmatch(e.Name())
			if m == nil || !strings.HasPrefix(e.Name(), prefix) {
				continue
			}
			pid, err := strconv.Atoi(m[1])
			if err != nil || unix.Kill(pid, 0) == nil {
				continue
			}
			if full {
				out = append(out, filepath.Join(dir, e.Name()))
			} else {
				out = append(out, e.Name())
			}
		}
		return out, nil
	}
	if namespaces, err = collect(netns.RunDir, namePrefix, false); err != nil {
		return nil, nil, fmt.Errorf("list namespaces: %w", err)
	}
	if dirs, err = collect(os.TempDir(), dirPrefix, true); err != nil {
		return nil, nil, fmt.Errorf("list directories: %w", err)
	}
	return namespaces, dirs, nil
}

// RemoveStale removes what Stale listed.
func RemoveStale(namespaces, dirs []string) error {
	var errs []error
	for _, name := range namespaces {
		errs = append(errs, netns.Delete(name))
	}
	for _, dir := range dirs {
		mounts, err := mountsBelow(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		ok := true
		for _, m := range slices.Backward(mounts) {
			if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
				errs, ok = append(errs, fmt.Errorf("unmount %s: %w", m, err)), false
			}
		}
		if ok {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// mountsBelow lists mount points below dir, outer ones first.
func mountsBelow(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var out []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			out = append(out, f[4])
		}
	}
	return out, nil
}
