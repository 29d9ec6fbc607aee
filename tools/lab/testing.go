package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caracal-net/caracal/internal/netns"
)

var testLabs atomic.Uint32

// TestName returns a lab name that no other test, also of another process, has at this time.
func TestName() string { return fmt.Sprintf("t%dn%d", os.Getpid(), testLabs.Add(1)) }

// New is Up for tests: it fails the test on errors, takes the lab down when the test ends and fails it if anything is
// left: namespaces, mounts, files, processes, links outside the lab, descriptors or threads of the test itself.
// Config.Name defaults to TestName. It skips without root.
func New(t testing.TB, cfg Config) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "network namespaces and bpffs need root")
	}
	if cfg.Name == "" {
		cfg.Name = TestName()
	}
	before, err := takeBaseline()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatalf("lab up: %v", err)
	}
	t.Cleanup(func() {
		t.Helper()
		links, inodes := l.trace()
		if t.Failed() {
			l.dump(t)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Errorf("lab down: %v", err)
		}
		for _, what := range l.leftAfter(ctx, before, links, inodes) {
			t.Errorf("left behind by lab %s: %s", l.Name, what)
		}
	})
	return l
}

// Skip skips the test, or fails it where CARACAL_NO_SKIPS says that the machine has all that tests need.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CARACAL_NO_SKIPS") != "" {
		t.Fatalf("%s (and CARACAL_NO_SKIPS is set)", why)
	}
	t.Skip(why)
}

// trace tells by which names and numbers things of the lab can be known after it is gone.
func (l *Lab) trace() (links map[string]bool, inodes map[uint64]string) {
	links, inodes = map[string]bool{}, map[uint64]string{}
	names := l.fixedNamespaces()
	for _, h := range l.Hosts() {
		pods, _ := h.Pods()
		for _, p := range pods {
			names = append(names, p.file.Netns)
			if res := p.Result(); res != nil {
				for _, i := range res.Interfaces {
					links[i.Name] = i.Sandbox == ""
				}
			}
		}
	}
	for _, n := range names {
		ns, err := netns.Open(netns.Path(n))
		if err != nil {
			continue
		}
		if ino, err := ns.Inode(); err == nil {
			inodes[ino] = n
		}
		ns.Close()
	}
	return links, inodes
}

// leftAfter looks until nothing is left or two seconds have passed: a thread that was inside a namespace takes a moment
// to end.
func (l *Lab) leftAfter(ctx context.Context, before baseline, links map[string]bool, inodes map[uint64]string) []string {
	deadline := time.Now().Add(2 * time.Second)
	for {
		left := Leftovers(l.Name)
		more, err := before.newLinks(links)
		if err != nil {
			more = append(more, err.Error())
		}
		left = append(append(left, more...), heldNamespaces(inodes)...)
		if len(left) == 0 || time.Now().After(deadline) || ctx.Err() != nil {
			return left
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// dump logs what helps to understand a failed test.
func (l *Lab) dump(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, h := range l.Hosts() {
		for _, cmd := range [][]string{{"ip", "-br", "addr"}, {"ip", "route"}, {"ip", "-6", "route"}} {
			out, err := h.Exec(ctx, cmd...)
			if err != nil {
				out = err.Error()
			}
			t.Logf("%s# %s\n%s", h.Name, strings.Join(cmd, " "), out)
		}
		logs, _ := filepath.Glob(filepath.Join(h.Dir(), "*.log"))
		for _, f := range logs {
			if data, err := os.ReadFile(f); err == nil {
				t.Logf("%s:\n%s", f, data)
			}
		}
	}
}

// TestPod is AddPod for tests: it fails the test on errors.
func (h *Host) TestPod(t testing.TB, name string, opts PodOptions) *Pod {
	t.Helper()
	p, err := h.AddPod(t.Context(), name, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
