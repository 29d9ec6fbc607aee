package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// Down takes the lab down: processes, namespaces, pins, mounts, files. It waits, as long as ctx allows, for calls that
// are adding or removing pods. It may be repeated, and called on what an interrupted Up or Down left.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.Name) }

// Down takes the lab of that name down. The error is ErrNotFound when nothing is there.
func Down(ctx context.Context, name string) error {
	if !labName.MatchString(name) {
		return fmt.Errorf("lab %q: %w", name, ErrNotFound)
	}
	l := &Lab{Name: name, Dir: filepath.Join(BaseDir, name)}
	unlock, err := lockDir(ctx, l.Dir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	if err := l.load(); errors.Is(err, ErrClosing) {
		// No lab.json: nothing it names was made yet, or all of it is gone.
		l.file = labFile{Name: name}
	} else if err != nil {
		return err
	}
	return l.tearDown(ctx)
}

// tearDown needs the exclusive lock. It goes on after errors, but keeps lab.json as long as something it names may be left.
// That a foreign plugin's DEL failed is told, and keeps nothing.
func (l *Lab) tearDown(ctx context.Context) error {
	var errs, delErrs []error
	wasUp := l.file.Up
	if wasUp {
		l.file.Up = false // from here on nobody adds a pod
		if err := l.save(); err != nil {
			return err
		}
	}
	var podNetns []string
	for _, h := range l.Hosts() {
		pods, err := h.Pods()
		if err != nil {
			errs = append(errs, err)
		}
		for _, p := range pods {
			if l.file.Foreign && wasUp && p.file.State != PodNew {
				err := p.del(ctx)
				if err != nil {
					err = p.del(ctx) // a killed process's own DEL may have been at it at the same time
				}
				delErrs = append(delErrs, err)
			}
			podNetns = append(podNetns, p.file.Netns)
		}
	}
	namespaces := append(podNetns, l.fixedNamespaces()...)
	if err := endProcesses(ctx, l.Name, namespaces); err != nil {
		errs = append(errs, err)
	}
	for _, n := range namespaces {
		if err := netns.Delete(n); err != nil {
			errs = append(errs, err)
		}
	}
	// Pins by hand: a copy of the mount in another mount namespace would keep them alive. The kernel's own preloaded
	// iterators (maps.debug, progs.debug) cannot be unlinked and go with the mount.
	if isBPF(l.bpfDir()) {
		errs = append(errs, removeChildren(l.bpfDir(), "maps.debug", "progs.debug"))
	}
	errs = append(errs, unmountBelow(l.Dir))
	for _, h := range l.Hosts() {
		errs = append(errs, await(ctx, "control groups of "+h.Name+" are empty", func() error { return removeCgroups(h.cgroup()) }))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab %s: %w", l.Name, err)
	}
	if err := removeChildren(l.Dir, labJSON); err != nil {
		return err
	}
	for _, path := range []string{filepath.Join(l.Dir, labJSON), l.Dir} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove lab: %w", err)
		}
	}
	// The last lab takes the base directory along; another lab's presence makes this fail.
	if err := os.Remove(BaseDir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove lab: %w", err)
	}
	if err := errors.Join(delErrs...); err != nil {
		return fmt.Errorf("lab %s is down, but what its plugin keeps elsewhere may be left: %w", l.Name, err)
	}
	return nil
}

func isBPF(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// removeChildren empties a directory but for the names in keep.
func removeChildren(dir string, keep ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("empty %s: %w", dir, err)
	}
	var errs []error
next:
	for _, e := range entries {
		for _, k := range keep {
			if e.Name() == k {
				continue next
			}
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			errs = append(errs, fmt.Errorf("empty %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// unmountBelow unmounts everything mounted below dir, the innermost first.
func unmountBelow(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	sort.Sort(sort.Reverse(sort.StringSlice(mounts)))
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return nil
}

// mountsBelow lists the mount points below dir, one entry per mount.
func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var mounts []string
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 5 {
			continue
		}
		if m := unescapeMount(f[4]); strings.HasPrefix(m, dir+"/") {
			mounts = append(mounts, m)
		}
	}
	return mounts, nil
}

// unescapeMount undoes the octal escapes (space, tab, newline, backslash) of proc_pid_mountinfo(5).
func unescapeMount(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

const (
	termWait = 2 * time.Second // between SIGTERM and SIGKILL
	killWait = 5 * time.Second // after SIGKILL, until it is an error
)

// endProcesses ends the processes that live in one of the named namespaces or, if lab is not empty, carry its marker in
// their environment: first politely, then not. It spares the caller and its ancestors, which may have entered the lab.
func endProcesses(ctx context.Context, lab string, namespaces []string) error {
	inodes := namespaceInodes(namespaces)
	if len(inodes) == 0 && lab == "" {
		return nil
	}
	signal, deadline := unix.SIGTERM, time.Now().Add(termWait)
	told := map[string]unix.Signal{} // by pid and start time
	for {
		procs := labProcesses(lab, inodes)
		if len(procs) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			if signal == unix.SIGKILL {
				return fmt.Errorf("end processes: still there after SIGKILL: %v", procs)
			}
			signal, deadline = unix.SIGKILL, time.Now().Add(killWait)
		}
		for _, p := range procs {
			if told[p.id()] == signal {
				continue
			}
			told[p.id()] = signal
			if err := p.signal(signal); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end processes %v: %w", procs, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// process is one that belongs to a lab.
type process struct {
	pid   int
	start string // start time in clock ticks: with the pid it names one process for ever
	comm  string
}

func (p process) id() string     { return fmt.Sprintf("%d@%s", p.pid, p.start) }
func (p process) String() string { return fmt.Sprintf("%s[%d]", p.comm, p.pid) }

// signal sends to exactly this process: the pid may belong to another one by now, a pidfd may not.
func (p process) signal(s unix.Signal) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %s: %w", p, err)
	}
	defer unix.Close(fd)
	if now, ok := readProcess(p.pid); !ok || now.start != p.start {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %s: %w", p, err)
	}
	return nil
}

// statFields are the fields of /proc/PID/stat behind the command, from the state on.
func statFields(pid int) (comm string, fields []string, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", nil, false
	}
	open, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 0 || end < open {
		return "", nil, false
	}
	fields = strings.Fields(string(data[end+1:]))
	return string(data[open+1 : end]), fields, len(fields) > 19
}

// readProcess returns false for one that is gone or dead already (a zombie is its parent's business).
func readProcess(pid int) (process, bool) {
	comm, f, ok := statFields(pid)
	if !ok || f[0] == "Z" || f[0] == "X" {
		return process{}, false
	}
	return process{pid: pid, start: f[19], comm: comm}, true
}

// labProcesses lists the processes in namespaces of these inodes or with the lab's marker, without us and our ancestors.
func labProcesses(lab string, inodes map[uint64]bool) []process {
	spare := map[int]bool{}
	for pid := os.Getpid(); pid > 0 && !spare[pid]; {
		spare[pid] = true
		_, f, ok := statFields(pid)
		if !ok {
			break
		}
		pid, _ = strconv.Atoi(f[1])
	}
	entries, _ := os.ReadDir("/proc")
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || spare[pid] {
			continue
		}
		p, ok := readProcess(pid)
		if !ok {
			continue
		}
		var st unix.Stat_t
		inside := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) == nil && inodes[st.Ino]
		if inside || lab != "" && hasEnv(pid, marker+"="+lab) {
			out = append(out, p)
		}
	}
	return out
}

// Processes lists the processes whose main thread is in the namespace, as "command[pid]", without the caller and its
// ancestors.
func (n Namespace) Processes() []string {
	var out []string
	for _, p := range labProcesses("", namespaceInodes([]string{filepath.Base(n.Netns)})) {
		out = append(out, p.String())
	}
	return out
}

func hasEnv(pid int, want string) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false
	}
	for _, v := range bytes.Split(data, []byte{0}) {
		if string(v) == want {
			return true
		}
	}
	return false
}

// namespaceInodes tells by which inodes the named namespaces are known. Names that are gone, or only half made, have none.
func namespaceInodes(names []string) map[uint64]bool {
	inodes := map[uint64]bool{}
	for _, n := range names {
		ns, err := netns.Open(netns.Path(n))
		if err != nil {
			continue
		}
		if ino, err := ns.Inode(); err == nil {
			inodes[ino] = true
		}
		ns.Close()
	}
	return inodes
}
