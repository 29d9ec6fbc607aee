package bolt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/storetest"
)

// writerVariable makes this test binary a process that writes to the store in the directory it names.
const writerVariable = "CARACAL_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerVariable); dir != "" {
		if err := write(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// write changes keys for ever and says of each change that it is done.
func write(dir string) error {
	s, err := Open(dir, Options{})
	if err != nil {
		return err
	}
	kv, err := s.Get(context.Background(), "/n")
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	n := 0
	fmt.Sscan(string(kv.Value), &n)
	for {
		n++
		if _, err := s.Update(context.Background(), fmt.Sprintf("/all/%d", n), make([]byte, n%20000), 0); err != nil {
			return err
		}
		if _, err := s.Update(context.Background(), "/n", fmt.Append(nil, n), kv.Revision); err != nil {
			return err
		}
		if kv, err = s.Get(context.Background(), "/n"); err != nil {
			return err
		}
		fmt.Println(n)
	}
}

func startWriter(t *testing.T, dir string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerVariable+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, bufio.NewScanner(out)
}

// A writer that is killed has lost nothing that it was told is written, and a watch of another process has seen all of it.
func TestKilledWriter(t *testing.T) {
	dir := t.TempDir()
	s := newStore(t, dir, Options{History: 100000})
	w, err := s.Watch(storetest.Context(t), "/n", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	seen := 0
	for round := range 8 {
		cmd, said := startWriter(t, dir)
		for range 3 + rand.IntN(20) {
			if !said.Scan() {
				t.Fatalf("round %d: the writer ended: %v", round, cmd.Wait())
			}
		}
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond) // anywhere in the next change
		if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		acknowledged := said.Text()
		for said.Scan() {
			acknowledged = said.Text()
		}
		cmd.Wait()
		n, want := 0, 0
		fmt.Sscan(acknowledged, &want)
		kv, err := s.Get(storetest.Context(t), "/n")
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		fmt.Sscan(string(kv.Value), &n)
		if n < want || n > want+1 {
			t.Errorf("round %d: counted to %d, %d was acknowledged", round, n, want)
		}
		kvs, _, err := s.List(storetest.Context(t), "/all/")
		if err != nil || len(kvs) < want {
			t.Errorf("round %d: %d keys of %d: %v", round, len(kvs), want, err)
		}
		for seen < n {
			seen++
			if e := storetest.Next(t, w); string(e.Value) != fmt.Sprint(seen) {
				t.Fatalf("round %d: told %q, want %d", round, e.Value, seen)
			}
		}
	}
}

func TestHistory(t *testing.T) {
	ctx := storetest.Context(t)
	s := newStore(t, t.TempDir(), Options{History: 10})
	slow, err := s.Watch(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	var last store.Revision
	for i := range 30 {
		last = storetest.Put(t, s, "/k", fmt.Sprint(i))
	}
	if _, err := slow.Next(ctx); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("a watch that was overtaken: %v", err)
	}
	for _, test := range []struct {
		after store.Revision
		ok    bool
	}{{0, false}, {last - 11, false}, {last - 10, true}, {last - 1, true}} {
		w, err := s.Watch(ctx, "", test.after)
		if err != nil {
			t.Fatal(err)
		}
		e, err := w.Next(ctx)
		if test.ok && (err != nil || e.Revision != test.after+1) || !test.ok && !errors.Is(err, store.ErrCompacted) {
			t.Errorf("after %d of %d: %+v, %v", test.after, last, e, err)
		}
		w.Close()
	}
}

// Large values make the history shorter, not the file larger without bounds.
func TestHistoryOfLargeValues(t *testing.T) {
	s := newStore(t, t.TempDir(), Options{})
	large := make([]byte, store.MaxValue)
	for range maxLog>>20 + 20 {
		if _, err := s.Update(storetest.Context(t), "/k", large, 0); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(s.path)
	if err != nil || st.Size() > 3*maxLog {
		t.Errorf("%d MB: %v", st.Size()>>20, err)
	}
}

// A watch sees what becomes of a directory that is not there yet, where nobody tells of writes.
func TestWatchBeforeThereIsADirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s := newStore(t, dir, Options{})
	w, err := s.Watch(storetest.Context(t), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if kvs, at, err := s.List(storetest.Context(t), ""); len(kvs) != 0 || at != 0 || err != nil {
		t.Errorf("list: %v at %d, %v", kvs, at, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("reading made a directory: %v", err)
	}
	other := newStore(t, dir, Options{})
	storetest.Put(t, other, "/k", "1")
	if e := storetest.Next(t, w); e.Key != "/k" {
		t.Errorf("told %+v", e)
	}
}

// A file that was replaced by another is another store.
func TestReplacedFile(t *testing.T) {
	s := newStore(t, t.TempDir(), Options{})
	for range 5 {
		storetest.Put(t, s, "/k", "")
	}
	other := newStore(t, t.TempDir(), Options{})
	storetest.Put(t, other, "/k", "")
	w, err := s.Watch(storetest.Context(t), "", 5)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := os.Rename(other.path, s.path); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Next(storetest.Context(t)); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("next: %v", err)
	}
}

func TestSpaces(t *testing.T) {
	dir := t.TempDir()
	ours, later, all := newStore(t, dir, Options{}), newStore(t, dir, Options{Prefix: "/caracal/v10/"}), newStore(t, dir, Options{Prefix: "/"})
	storetest.Put(t, ours, "/k", "1")
	storetest.Put(t, later, "/k", "10")
	storetest.Put(t, all, "/k", "other")
	for _, test := range []struct {
		s    *Store
		want string
	}{{ours, "/k"}, {later, "/k"}, {all, "/caracal/v1/k /caracal/v10/k /k"}} {
		kvs, _, err := test.s.List(storetest.Context(t), "")
		var keys []string
		for _, kv := range kvs {
			keys = append(keys, kv.Key)
		}
		if got := strings.Join(keys, " "); got != test.want || err != nil {
			t.Errorf("%s: %s, %v", test.s.space, got, err)
		}
	}
	if _, err := Open(dir, Options{Prefix: "caracal"}); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("a relative prefix: %v", err)
	}
}

// What can't be read is an error that says what to do, and nobody writes over it.
func TestCorrupt(t *testing.T) {
	whole := newStore(t, t.TempDir(), Options{})
	for i := range 100 {
		storetest.Put(t, whole, fmt.Sprintf("/k/%d", i), strings.Repeat("x", 500))
	}
	good, err := os.ReadFile(whole.path)
	if err != nil {
		t.Fatal(err)
	}
	damaged := func(fn func(b []byte) []byte) []byte { return fn(append([]byte{}, good...)) }
	for name, content := range map[string][]byte{
		"empty":     {},
		"text":      []byte("this is no store"),
		"half":      damaged(func(b []byte) []byte { return b[:len(b)/2] }),
		"two pages": damaged(func(b []byte) []byte { return b[:8192] }),
		"heads":     damaged(func(b []byte) []byte { clear(b[:8192]); return b }),
		"pages":     damaged(func(b []byte) []byte { clear(b[8192:]); return b }),
		"noise": damaged(func(b []byte) []byte {
			for i := 8192; i < len(b); i++ {
				b[i] ^= byte(i*7 + i>>8)
			}
			return b
		}),
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, t.TempDir(), Options{})
			if err := os.WriteFile(s.path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			ctx := storetest.Context(t)
			w, err := s.Watch(ctx, "", 0)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			_, next := w.Next(ctx)
			_, get := s.Get(ctx, "/k/1")
			_, _, list := s.List(ctx, "")
			_, create := s.Create(ctx, "/new", nil)
			_, update := s.Update(ctx, "/k/1", nil, 0)
			for what, err := range map[string]error{"next": next, "get": get, "list": list, "create": create, "update": update,
				"delete": s.Delete(ctx, "/k/1", 0)} {
				if !errors.Is(err, store.ErrCorrupt) || !strings.Contains(err.Error(), s.path) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if after, err := os.ReadFile(s.path); err != nil || string(after) != string(content) {
				t.Errorf("the file was touched: %v", err)
			}
		})
	}
}

// Files that are damaged anywhere end in an error or not, but never in a panic, and never hold the next one up.
func TestDamagedAnywhere(t *testing.T) {
	whole := newStore(t, t.TempDir(), Options{})
	for i := range 50 {
		storetest.Put(t, whole, fmt.Sprintf("/k/%d", i), strings.Repeat("x", 300))
	}
	good, err := os.ReadFile(whole.path)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		b := append([]byte{}, good...)
		for range 1 + random.IntN(4) {
			b[random.IntN(len(b))] ^= byte(1 << random.IntN(8))
		}
		s := newStore(t, t.TempDir(), Options{Wait: 5 * time.Second})
		if err := os.WriteFile(s.path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx := storetest.Context(t)
		_, _, list := s.List(ctx, "")
		_, update := s.Update(ctx, "/k/1", []byte("new"), 0)
		for _, err := range []error{list, update, s.Delete(ctx, "/k/2", 0)} {
			if errors.Is(err, store.ErrUnavailable) {
				t.Fatalf("somebody holds it: %v", err)
			}
		}
	}
}

func TestNewerVersion(t *testing.T) {
	s := newStore(t, t.TempDir(), Options{})
	storetest.Put(t, s, "/k", "")
	err := s.update(storetest.Context(t), func(tx *tx) error { return putNumber(tx.meta, nameVersion, schemaVersion+1) })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(storetest.Context(t), "/k"); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("get: %v", err)
	}
}

func TestHeldByAnother(t *testing.T) {
	s := newStore(t, t.TempDir(), Options{Wait: 50 * time.Millisecond})
	storetest.Put(t, s, "/k", "")
	turn, err := s.lock(storetest.Context(t), true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(storetest.Context(t), "/k"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("get: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Get(ctx, "/k"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("get with a shorter deadline: %v", err)
	}
	turn.Close()
	if _, err := s.Get(storetest.Context(t), "/k"); err != nil {
		t.Errorf("get afterwards: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("caracal-test", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	ctx := storetest.Context(t)
	s := newStore(t, dir, Options{})
	value := make([]byte, 100_000)
	n := 0
	var err error
	for ; n < 100 && err == nil; n++ {
		_, err = s.Create(ctx, fmt.Sprintf("/k/%02d", n), value)
	}
	if !errors.Is(err, store.ErrNoSpace) {
		t.Fatalf("after %d keys: %v", n, err)
	}
	kvs, at, err := s.List(ctx, "")
	if err != nil || len(kvs) != n-1 || at != store.Revision(n-1) {
		t.Errorf("%d keys at %d, %d were written: %v", len(kvs), at, n-1, err)
	}
	for i, kv := range kvs {
		if kv.Key != fmt.Sprintf("/k/%02d", i) || len(kv.Value) != len(value) {
			t.Errorf("%d: %s of %d bytes", i, kv.Key, len(kv.Value))
		}
	}
	// A new store can't be made there, and leaves nothing half.
	if err := os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("ballast: %v", err)
	}
	sub := newStore(t, filepath.Join(dir, "sub"), Options{})
	if _, err := sub.Create(ctx, "/k", nil); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("create: %v", err)
	}
	entries, _ := os.ReadDir(filepath.Join(dir, "sub"))
	for _, e := range entries {
		if e.Name() != FileName+".lock" {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}
