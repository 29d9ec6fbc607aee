package logs

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

// writerVariable makes this program one of those that write a log at once: the file, and the writer's number.
const writerVariable = "CARACAL_TEST_WRITER"

const (
	writers   = 50
	lines     = 200
	smallFile = 64 << 10 // bytes: some dozen rotations
)

func TestMain(m *testing.M) {
	if arg := os.Getenv(writerVariable); arg != "" {
		var path string
		var n int
		if _, err := fmt.Sscan(arg, &path, &n); err != nil {
			panic(err)
		}
		f := newFile(Config{Path: path, MaxCount: 1 << 20})
		f.max = smallFile
		_, _ = io.ReadAll(os.Stdin) // until all are there
		for i := range lines {
			if err := f.write(line(n, i)); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		return
	}
	os.Exit(m.Run())
}

// line is one that shows when a part of it is not there; they differ in length.
func line(writer, i int) []byte {
	return fmt.Appendf(nil, "<%d %d %s>\n", writer, i, strings.Repeat("x", (writer*7+i*13)%900))
}

// TestManyProcesses: no line of 50 processes that write and rotate one file at once is lost, torn or written twice.
func TestManyProcesses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cni.log")
	var all []*exec.Cmd
	var start []io.Closer
	for n := range writers {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", writerVariable, path, n))
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		must(t, err)
		must(t, cmd.Start())
		all, start = append(all, cmd), append(start, in)
	}
	for _, in := range start {
		must(t, in.Close())
	}
	for _, cmd := range all {
		must(t, cmd.Wait())
	}
	missing := make(map[string]bool)
	for n := range writers {
		for i := range lines {
			missing[string(line(n, i))] = true
		}
	}
	files := list(t, dir)
	for _, name := range files {
		f, err := os.Open(filepath.Join(dir, name))
		must(t, err)
		for r := bufio.NewReader(f); ; {
			got, err := r.ReadString('\n')
			if errors.Is(err, io.EOF) && got == "" {
				break
			}
			if !missing[got] {
				t.Fatalf("%s has the line %q, which nobody wrote, or wrote twice", name, got)
			}
			delete(missing, got)
		}
		must(t, f.Close())
	}
	if len(missing) > 0 || len(files) < 10 {
		t.Errorf("%d of %d lines are in none of %d files", len(missing), writers*lines, len(files))
	}
	t.Logf("%d lines in %d files", writers*lines, len(files))
}

// TestKept: files put aside go when they are too many or too old; others of the directory stay, and so does the file's mode.
func TestKept(t *testing.T) {
	dir := t.TempDir()
	f := newFile(Config{Path: filepath.Join(dir, "cni.log"), MaxCount: 2, MaxAge: 7})
	f.max = 100
	old := filepath.Base(f.aside(time.Now().Add(-8 * day)))
	young := filepath.Base(f.aside(time.Now().Add(-6 * day)))
	others := []string{"cni-notes.log", "cni-2020-01-01T00-00-00.000.txt", "other-2020-01-01T00-00-00.000.log"}
	for _, name := range append(others, old, young) {
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	must(t, f.write([]byte("first\n")))
	if got := list(t, dir); slices.Contains(got, old) || !slices.Contains(got, young) {
		t.Errorf("after the first line: %v", got)
	}
	must(t, os.Chmod(f.path, 0o640))
	for range 3 {
		must(t, f.write(bytes.Repeat([]byte("x"), 99)))
		must(t, f.write([]byte("\n.\n")))
	}
	got := list(t, dir)
	if len(got) != len(others)+3 || slices.Contains(got, young) {
		t.Errorf("after three files: %v", got)
	}
	for _, name := range others {
		if !slices.Contains(got, name) {
			t.Errorf("%s is gone", name)
		}
	}
	st, err := os.Stat(f.path)
	must(t, err)
	if st.Mode() != 0o640 {
		t.Errorf("the new file's mode is %v", st.Mode())
	}
}

// TestMovedAway: what logrotate moves away is no reason to write on into it, and what it truncates has no hole.
func TestMovedAway(t *testing.T) {
	f := newFile(Config{Path: filepath.Join(t.TempDir(), "a", "b", "cni.log")})
	must(t, f.write([]byte("1\n")))
	must(t, os.Rename(f.path, f.path+".1"))
	must(t, f.write([]byte("2\n")))
	must(t, os.Truncate(f.path, 0))
	must(t, f.write([]byte("3\n")))
	must(t, os.RemoveAll(filepath.Dir(f.path)))
	must(t, f.write([]byte("4\n")))
	if got, err := os.ReadFile(f.path); err != nil || string(got) != "4\n" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestTrouble: whatever is in the way of the file, lines are on stderr, and the trouble is said once, and once that it is over.
func TestTrouble(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T, path string) (mend func())
		want string
	}{
		{"directory", func(t *testing.T, path string) func() {
			must(t, os.Mkdir(path, 0o755))
			return func() { must(t, os.Remove(path)) }
		}, "it is a directory"},
		{"symbolic link", func(t *testing.T, path string) func() {
			must(t, os.Symlink(filepath.Join(t.TempDir(), "elsewhere"), path))
			return func() { must(t, os.Remove(path)) }
		}, "it is a symbolic link"},
		{"pipe", func(t *testing.T, path string) func() {
			must(t, unix.Mkfifo(path, 0o600))
			return func() { must(t, os.Remove(path)) }
		}, "not a regular file"},
		{"socket", func(t *testing.T, path string) func() {
			must(t, unix.Mknod(path, unix.S_IFSOCK|0o600, 0))
			return func() { must(t, os.Remove(path)) }
		}, "not a regular file"},
		{"a file in place of the directory", func(t *testing.T, path string) func() {
			dir := filepath.Dir(path)
			must(t, os.Remove(dir))
			must(t, os.WriteFile(dir, nil, 0o600))
			return func() { must(t, os.Remove(dir)) }
		}, "not a directory"},
		{"read-only", func(t *testing.T, path string) func() {
			dir := filepath.Dir(path)
			mount(t, dir, "size=64k")
			must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			return func() { must(t, unix.Mount("", dir, "", unix.MS_REMOUNT, "")) }
		}, "read-only file system"},
		{"full disk", func(t *testing.T, path string) func() {
			dir := filepath.Dir(path)
			mount(t, dir, "size=64k")
			must(t, os.WriteFile(path, []byte("earlier\n"), 0o600))
			filler := filepath.Join(dir, "filler")
			if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("the disk is not full: %v", err)
			}
			must(t, os.Truncate(path, 4096-20)) // a part of a line fits
			return func() { must(t, os.Remove(filler)) }
		}, "no space left"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if os.Geteuid() != 0 {
				lab.Skip(t, "mounts need root")
			}
			path := filepath.Join(t.TempDir(), "log", "cni.log")
			must(t, os.Mkdir(filepath.Dir(path), 0o755))
			mend := c.make(t, path)
			var stderr bytes.Buffer
			log := New(Config{Stderr: &stderr, Path: path, Format: JSON})
			log.Info("one of some length, to be sure")
			log.Info("two")
			mend()
			log.Info("three")
			log.Info("four")
			var said []string
			for d := json.NewDecoder(&stderr); d.More(); {
				var l struct{ Msg, Error, Time string }
				must(t, d.Decode(&l))
				if _, err := time.Parse(time.RFC3339, l.Time); err != nil {
					t.Error(err)
				}
				said = append(said, strings.SplitN(l.Msg, ";", 2)[0])
				if l.Error != "" && !strings.Contains(l.Error, c.want) {
					t.Errorf("it says %q, not %q", l.Error, c.want)
				}
			}
			want := []string{"one of some length, to be sure", "the log file can't be written", "two", "three", "the log file can be written again", "four"}
			if !slices.Equal(said, want) {
				t.Errorf("stderr has %q", said)
			}
			text, err := os.ReadFile(path)
			must(t, err)
			if got := strings.Count(string(text), `"msg":`); got != 2 || !strings.HasSuffix(string(text), "\"four\"}\n") {
				t.Errorf("the file has %q", text)
			}
		})
	}
}

// TestStopped: a process that is stopped while it rotates holds up nobody.
func TestStopped(t *testing.T) {
	f := newFile(Config{Path: filepath.Join(t.TempDir(), "cni.log")})
	f.max = 10
	must(t, f.write([]byte("0123456789\n")))
	other, err := os.Open(f.path)
	must(t, err)
	defer other.Close()
	must(t, unix.Flock(int(other.Fd()), unix.LOCK_EX))
	must(t, f.write([]byte("on\n")))
	if got, _ := os.ReadFile(f.path); string(got) != "0123456789\non\n" {
		t.Errorf("the file has %q", got)
	}
}

func TestWords(t *testing.T) {
	for _, s := range []string{"loud", " info"} {
		if _, err := ParseLevel(s); err == nil {
			t.Errorf("level %q is taken", s)
		}
		if _, err := ParseFormat(s); err == nil {
			t.Errorf("form %q is taken", s)
		}
	}
	if err := (Config{MaxAge: -1}).Check("size", "age", "count"); err == nil || !strings.HasPrefix(err.Error(), "age -1: ") {
		t.Errorf("an age of -1: %v", err)
	}
}

func mount(t *testing.T, dir, options string) {
	t.Helper()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, options))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A runtime shows its user what the plugin writes to stderr: with a file that is what he should know.
func TestQuiet(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	var stderr bytes.Buffer
	log := New(Config{Stderr: &stderr, Path: path, Quiet: true}).With("pod", "web")
	log.Info("done")
	log.Warn("careful")
	if got := stderr.String(); strings.Contains(got, "done") || strings.Count(got, "msg=careful pod=web") != 1 {
		t.Errorf("stderr has %q; want the warning alone", got)
	}
	if file, err := os.ReadFile(path); err != nil || !strings.Contains(string(file), "msg=done pod=web") || !strings.Contains(string(file), "msg=careful") {
		t.Errorf("the file has %q, %v; want both", file, err)
	}
	stderr.Reset()
	log = New(Config{Stderr: &stderr, Path: t.TempDir(), Quiet: true}) // a directory
	log.Info("done")
	log.Warn("careful")
	if got := stderr.String(); strings.Count(got, "msg=done") != 1 || strings.Count(got, "msg=careful") != 1 || strings.Count(got, "can't be written") != 1 {
		t.Errorf("stderr has %q; want both lines and what is wrong with the file, once each", got)
	}
}
