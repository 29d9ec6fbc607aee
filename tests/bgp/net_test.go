// Package bgp tests the speaker against real routers: BIRD 2, gobgpd, FRR, and others of its own kind.
package bgp

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caracal-net/caracal/internal/netns"
)

// A test's routers are namespaces on one bridge:
//
//	bgpt-PID-N-1        bgpt-PID-N-2        bgpt-PID-N-3 ...
//	  192.0.2.1           192.0.2.2           192.0.2.3       /24
//	  2001:db8::1         2001:db8::2         2001:db8::3     /64
//	    | eth0              | eth0              | eth0
//	+---+-------------------+-------------------+---+
//	|                     br0                       |  bgpt-PID-N-switch
//	+-----------------------------------------------+
//
// Router n has 10.10.n.0/26 and 2001:db8:10:n::/122 as its blocks.

func TestMain(m *testing.M) {
	if os.Getenv(speakerVariable) != "" {
		os.Exit(runSpeaker(os.Stdin, os.Stdout))
	}
	code := m.Run()
	if left, _ := filepath.Glob(netns.Path(fmt.Sprintf("bgpt-%d-*", os.Getpid()))); len(left) > 0 {
		fmt.Fprintln(os.Stderr, "left behind:", left)
		code = 1
	}
	os.Exit(code)
}

var serial atomic.Int64

// network is one test's routers and what runs in them.
type network struct {
	t    *testing.T
	name string
	dir  string
}

// router is a namespace on the bridge.
type router struct {
	net    *network
	n      int
	v4, v6 netip.Addr
}

// newNetwork makes the bridge and n routers.
func newNetwork(t *testing.T, n int) (*network, []*router) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: network namespaces")
	}
	w := &network{t: t, name: fmt.Sprintf("bgpt-%d-%d", os.Getpid(), serial.Add(1)), dir: t.TempDir()}
	w.namespace("switch", "link add br0 type bridge", "link set br0 up")
	var all []*router
	for i := 1; i <= n; i++ {
		all = append(all, w.add(i))
	}
	return w, all
}

// add makes router number n.
func (w *network) add(n int) *router {
	w.t.Helper()
	r := &router{net: w, n: n, v4: v4(n), v6: v6(n)}
	name := fmt.Sprint(n)
	w.namespace(name, "link set lo up")
	w.ip("switch", fmt.Sprintf("link add p%d type veth peer name eth0 netns %s-%s", n, w.name, name), fmt.Sprintf("link set p%d master br0 up", n))
	w.ip(name, "link set eth0 up", fmt.Sprintf("addr add %s/24 dev eth0", r.v4), fmt.Sprintf("addr add %s/64 dev eth0 nodad", r.v6))
	return r
}

func v4(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}) }
func v6(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", n)) }

func block4(n int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.10.%d.0/26", n)) }
func block6(n int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("2001:db8:10:%d::/122", n)) }

// namespace makes one and runs ip commands in it.
func (w *network) namespace(name string, commands ...string) {
	w.t.Helper()
	if err := netns.Create(w.name + "-" + name); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := netns.Delete(w.name + "-" + name); err != nil {
			w.t.Error(err)
		}
	})
	w.ip(name, commands...)
}

func (w *network) ip(name string, commands ...string) {
	w.t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := w.in(name, cmd.Run); err != nil {
		w.t.Fatalf("%s: ip %v: %v\n%s", name, commands, err, out.String())
	}
}

func (w *network) in(name string, fn func() error) error {
	return netns.Do(netns.Path(w.name+"-"+name), fn)
}

func (r *router) do(fn func() error) error { return r.net.in(fmt.Sprint(r.n), fn) }

// exec runs a program in the router and returns what it printed.
func (r *router) exec(arg ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, arg[0], arg[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := r.do(cmd.Run)
	return out.String(), err
}

// daemon is a program that runs in a router.
type daemon struct {
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{}
	once sync.Once
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs a program in the router until the test ends. Its output is logged if the test fails.
func (r *router) start(arg ...string) *daemon {
	t := r.net.t
	t.Helper()
	d := &daemon{cmd: exec.Command(arg[0], arg[1:]...), log: &logBuffer{}, done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := r.do(d.cmd.Start); err != nil {
		t.Fatalf("start %v: %v", arg, err)
	}
	go func() {
		_ = d.cmd.Wait()
		close(d.done)
	}()
	t.Cleanup(func() {
		d.kill()
		if t.Failed() {
			t.Logf("%s of router %d:\n%s", filepath.Base(arg[0]), r.n, d.log)
		}
	})
	return d
}

// kill is kill -9, and waits for the end.
func (d *daemon) kill() {
	d.once.Do(func() { _ = d.cmd.Process.Kill() })
	<-d.done
}

// program finds one of a Debian package's, or fails.
func program(t *testing.T, name, debianPackage string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/usr/lib/frr") {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	t.Fatalf("%s is not installed: apt-get install %s", name, debianPackage)
	return ""
}

// patience bounds the wait for one condition.
const patience = 15 * time.Second

// eventually waits until what is true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// write puts a file into the test's directory and returns its path.
func (w *network) write(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return path
}
