// Package testenv is what tests that need the built binaries stand on:
//
//	func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }
//
//	func TestX(t *testing.T) { l := lab.New(t, lab.Config{Caracal: testenv.Bin(t, "caracal")}) ... }
package testenv

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/leak"
	"github.com/caracal-net/caracal/tools/lab"
)

// BinDirVariable names a directory with binaries built before (bin/ after `make build`), which are then not built.
const BinDirVariable = "CARACAL_BIN_DIR"

// aliases are the second names that the binaries answer to.
var aliases = map[string]string{"caracal-ipam": "caracal", "caracalctl": "caracald"}

var (
	scratch   string // made and removed by Main
	buildOnce sync.Once
	binDir    string
	errBuild  error
)

// Main runs a package's tests, removes what Bin built and looks for what the tests left behind. It returns the exit code.
func Main(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "caracal-test-*"); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 1
	}
	code := m.Run()
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		code = 1
	}
	for _, what := range leak.Mine() {
		fmt.Fprintln(os.Stderr, "testenv: left behind:", what)
		code = 1
	}
	return code
}

// Bin returns the path of one of our binaries: caracal, caracal-ipam, caracald or caracalctl. All are built, statically,
// at the first call in a test process; the build cache makes that cheap after the first process.
func Bin(t testing.TB, name string) string {
	t.Helper()
	buildOnce.Do(func() { binDir, errBuild = build() })
	if errBuild != nil {
		t.Fatalf("build binaries: %v", errBuild)
	}
	path := filepath.Join(binDir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("find binary: %v", err)
	}
	return path
}

func build() (string, error) {
	if dir := os.Getenv(BinDirVariable); dir != "" {
		return filepath.Abs(dir)
	}
	if scratch == "" {
		return "", errNoMain
	}
	return scratch, goBuild(scratch, "./cmd/...")
}

var errNoMain = errors.New("no TestMain in this package calls testenv.Main")

// Faulty returns the path of one of our binaries as Bin does, built so that CARACAL_FAULT fails it at a step (see
// internal/fault).
func Faulty(t testing.TB, name string) string {
	t.Helper()
	dir, err := buildFaulty()
	if err != nil {
		t.Fatalf("build binaries: %v", err)
	}
	return filepath.Join(dir, name)
}

var buildFaulty = sync.OnceValues(func() (string, error) {
	if scratch == "" {
		return "", errNoMain
	}
	dir := filepath.Join(scratch, "faulty")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	return dir, goBuild(dir, "-tags", "faults", "./cmd/...")
})

// Build builds a program of this module that only tests use, such as "./tests/x/y", and returns its path.
func Build(t testing.TB, program string) string {
	t.Helper()
	if scratch == "" {
		t.Fatalf("build %s: %v", program, errNoMain)
	}
	if err := goBuild(scratch, program); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(scratch, filepath.Base(program))
}

// Scratch makes a directory that lasts until all tests of the package have ended.
func Scratch(t testing.TB, name string) string {
	t.Helper()
	if scratch == "" {
		t.Fatal(errNoMain)
	}
	dir := filepath.Join(scratch, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// goBuild builds into a directory, and gives the binaries their second names.
func goBuild(dir string, what ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-o", dir + "/"}, what...)...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", strings.Join(what, " "), err, out)
	}
	for alias, target := range aliases {
		if err := os.Symlink(target, filepath.Join(dir, alias)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// ReadLog reads a log in JSON: each line must be an object with a time by RFC 3339, which at returns.
func ReadLog[Line any](t testing.TB, text []byte, at func(Line) string) (lines []Line) {
	t.Helper()
	for s := range bytes.Lines(text) {
		var l Line
		if err := json.Unmarshal(s, &l); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if _, err := time.Parse(time.RFC3339, at(l)); err != nil {
			t.Error(err)
		}
		lines = append(lines, l)
	}
	return lines
}

// Eventually repeats fn until it has no error. After the limit it fails the test with the last one.
func Eventually(t testing.TB, limit time.Duration, what string, fn func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
	}
}

// Root is the directory of the module, found from the working directory, which for a test is its package's.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("find go.mod: not in a module")
}

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		lab.Skip(t, "needs root: network namespaces, mounts, eBPF")
	}
}

// NeedProgram returns the path of a program and skips the test, naming the Debian package, if it is not installed.
func NeedProgram(t testing.TB, name, debianPackage string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/lib/cni") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	lab.Skip(t, fmt.Sprintf("needs %s (apt-get install %s)", name, debianPackage))
	return ""
}
