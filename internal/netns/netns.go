// Package netns runs code in, and makes and removes, Linux network namespaces.
package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// RunDir is where named namespaces are kept, as iproute2 keeps them.
const RunDir = "/run/netns"

// ErrNotNamespace says that a path exists but is not a network namespace.
var ErrNotNamespace = errors.New("not a network namespace")

// ErrAborted says that a function run inside a namespace ended its goroutine (runtime.Goexit) instead of returning.
var ErrAborted = errors.New("function in network namespace did not return")

// NS is an open network namespace. Close it when done; the namespace lives on as long as something else holds it.
type NS struct {
	file *os.File
}

// Path returns the path of the named namespace, as `ip netns add name` makes it.
func Path(name string) string { return filepath.Join(RunDir, name) }

// Open opens the namespace at path: a bind mount such as Path(name), or /proc/PID/ns/net.
// The error is os.ErrNotExist when nothing is there and ErrNotNamespace when it is something else.
func Open(path string) (*NS, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe would wait for its writer
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, ErrNotNamespace)
	}
	return &NS{file: f}, nil
}

// Current opens the calling thread's own namespace.
func Current() (*NS, error) {
	return Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
}

// FD returns the namespace's file descriptor; it is the NS's own and is closed by Close.
func (n *NS) FD() int { return int(n.file.Fd()) }

// Close closes the descriptor.
func (n *NS) Close() error { return n.file.Close() }

// Same tells whether a and b are one namespace.
func (n *NS) Same(b *NS) (bool, error) {
	x, err := n.Inode()
	if err != nil {
		return false, err
	}
	y, err := b.Inode()
	return x == y, err
}

// Inode returns the inode number that identifies the namespace while it lives.
func (n *NS) Inode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.FD(), &st); err != nil {
		return 0, fmt.Errorf("stat network namespace: %w", err)
	}
	return st.Ino, nil
}

// Do runs fn on a thread of its own inside the namespace. Sockets that fn opens stay in the namespace afterwards.
// fn must not start goroutines that expect to be inside it.
func (n *NS) Do(fn func() error) error {
	return away(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// away runs fn, which moves its thread to another namespace, and brings the thread back. A thread that cannot be brought
// back is not given to another goroutine. Leaving each thread to the runtime to end would not do: the process's main
// thread it can only park, and there it would hold the namespace and be seen in /proc/PID as if the process lived in it.
func away(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := ErrAborted              // unless fn returns: t.FailNow, say, ends the goroutine instead
		defer func() { done <- err }() // last: the thread is back when the caller goes on
		runtime.LockOSThread()
		home, openErr := Current()
		if openErr != nil {
			runtime.UnlockOSThread()
			err = openErr
			return
		}
		defer home.Close()
		defer func() {
			if unix.Setns(home.FD(), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = fn()
	}()
	return <-done
}

// Do opens the namespace at path, runs fn inside it and closes it.
func Do(path string, fn func() error) error {
	n, err := Open(path)
	if err != nil {
		return err
	}
	defer n.Close()
	return n.Do(fn)
}

// Create makes a named namespace under RunDir, with the loopback interface left down. It fails if the name is taken.
func Create(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("create network namespace %q: illegal name", name)
	}
	if err := shareRunDir(); err != nil {
		return err
	}
	path := Path(name)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("create network namespace %s: %w", name, err)
	}
	f.Close()
	err = away(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare network namespace: %w", err)
		}
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(self, path, "none", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind network namespace %s: %w", name, err)
		}
		return nil
	})
	if err != nil {
		os.Remove(path)
		return err
	}
	return nil
}

// Delete removes the named namespace. Its interfaces go once the last process and descriptor in it are gone too.
// A name that does not exist is not an error.
func Delete(name string) error {
	path := Path(name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount network namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
}

// shareRunDir makes RunDir a shared mount point, as `ip netns add` does, so that namespaces made here are seen in,
// and can be removed from, other mount namespaces.
func shareRunDir() error {
	if err := os.MkdirAll(RunDir, 0o755); err != nil {
		return fmt.Errorf("create %s: %w", RunDir, err)
	}
	err := unix.Mount("", RunDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err = unix.Mount(RunDir, RunDir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", RunDir, "none", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", RunDir, err)
	}
	return nil
}
