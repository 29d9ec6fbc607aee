package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func testName(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	name := fmt.Sprintf("netnstest%d", os.Getpid())
	t.Cleanup(func() {
		if err := Delete(name); err != nil {
			t.Error(err)
		}
	})
	return name
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestDoRunsInsideAndComesBack(t *testing.T) {
	name := testName(t)
	if err := Create(name); err != nil {
		t.Fatal(err)
	}
	if err := Create(name); !errors.Is(err, os.ErrExist) {
		t.Errorf("second Create: %v, want os.ErrExist", err)
	}
	ns, err := Open(Path(name))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	ino, err := ns.Inode()
	if err != nil {
		t.Fatal(err)
	}
	home := inode(t, "/proc/self/task/"+fmt.Sprint(os.Getpid())+"/ns/net")

	// Enough at once that some run on the process's main thread, and some find all threads taken.
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			err := ns.Do(func() error {
				cur, err := Current()
				if err != nil {
					return err
				}
				defer cur.Close()
				if same, err := cur.Same(ns); err != nil || !same {
					return fmt.Errorf("inside: same %v, %w", same, err)
				}
				ifaces, err := net.Interfaces()
				if err != nil {
					return err
				}
				for _, i := range ifaces {
					if i.Name == "lo" && i.Flags&net.FlagUp != 0 {
						return errors.New("lo is up: not the new namespace")
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		var st unix.Stat_t
		if unix.Stat(task, &st) == nil && st.Ino != home {
			t.Errorf("%s is in namespace %d (made: %d, home: %d)", task, st.Ino, ino, home)
		}
	}
}

func TestDoReturnsWhatHappened(t *testing.T) {
	name := testName(t)
	if err := Create(name); err != nil {
		t.Fatal(err)
	}
	want := errors.New("fn's own")
	if err := Do(Path(name), func() error { return want }); err != want {
		t.Errorf("Do: %v, want fn's error as it is", err)
	}
	if err := Do(Path(name), func() error { runtime.Goexit(); return nil }); !errors.Is(err, ErrAborted) {
		t.Errorf("Do of a function that ends its goroutine: %v, want ErrAborted", err)
	}
}

func TestSocketsStayInside(t *testing.T) {
	name := testName(t)
	if err := Create(name); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	err := Do(Path(name), func() (err error) {
		l, err = net.Listen("tcp", "0.0.0.0:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// The port is free out here: a second listener on it is no conflict.
	out, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	out.Close()
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want error
	}{
		{filepath.Join(dir, "missing"), os.ErrNotExist},
		{file, ErrNotNamespace},
		{dir, ErrNotNamespace},
		{"/proc/self/ns/uts", ErrNotNamespace},
		{"/dev/null", ErrNotNamespace},
	} {
		if ns, err := Open(c.path); !errors.Is(err, c.want) {
			t.Errorf("Open(%s) = %v, %v, want %v", c.path, ns, err, c.want)
		}
	}
}

func TestCreateRefusesNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "../x", "a\x00b"} {
		if err := Create(name); err == nil || !strings.Contains(err.Error(), "illegal name") {
			t.Errorf("Create(%q) = %v, want illegal name", name, err)
		}
	}
}

func TestDeleteTakesWhatever(t *testing.T) {
	name := testName(t)
	if err := Delete(name); err != nil {
		t.Errorf("Delete of nothing: %v", err)
	}
	// What a Create that was killed half way leaves: the file, with nothing mounted on it.
	if err := os.WriteFile(Path(name), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := Delete(name); err != nil {
		t.Errorf("Delete of a file: %v", err)
	}
	if _, err := os.Lstat(Path(name)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Delete: %v", err)
	}
}
