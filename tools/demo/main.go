// Command demo is the quick tour: one simulated host, three pods wired by real CNI calls, and a look at everything that
// carries their packets; then three hosts that find each other over BGP, and the world outside. It takes down what it built, also when it is
// interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes network namespaces and loads eBPF programs")
	}
	bin, err := filepath.Abs("bin")
	if err != nil {
		return err
	}
	caracal := filepath.Join(bin, "caracal")
	err = inLab(ctx, lab.Config{Name: "demo", Caracal: caracal}, func(l *lab.Lab) error {
		return (&tour{ctx: ctx, host: l.Host(1), bin: bin}).walk()
	})
	if err != nil {
		return err
	}
	err = inLab(ctx, lab.Config{Name: "demo", Caracal: caracal, Hosts: 3, Cluster: true, Outside: true}, func(l *lab.Lab) error {
		return (&journey{ctx: ctx, lab: l}).walk()
	})
	if err == nil {
		title("And nothing stays behind")
		fmt.Println("no namespace, no link, no pin, no process, no file")
	}
	return err
}

// inLab does something in a lab of its own, takes it down and looks for what it left.
func inLab(ctx context.Context, cfg lab.Config, do func(*lab.Lab) error) (err error) {
	l, err := lab.Up(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() {
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, l.Down(down))
		if left := lab.Leftovers(l.Name); len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, ", ")))
		}
	}()
	return do(l)
}

// tour is the demo at work. The first error ends it.
type tour struct {
	ctx  context.Context
	host *lab.Host
	bin  string
	pods []*lab.Pod
}

func (t *tour) walk() error {
	for _, step := range []func() error{t.add, t.look, t.talk, t.maps, t.tables, t.check, t.remove} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func title(format string, args ...any) { fmt.Printf("\n== %s\n", fmt.Sprintf(format, args...)) }

func (t *tour) add() error {
	title("Three pods, each by one call of the CNI plugin; no agent runs")
	for _, name := range []string{"web", "db", "client"} {
		begin := time.Now()
		p, err := t.host.AddPod(t.ctx, name, lab.PodOptions{})
		if err != nil {
			return err
		}
		fmt.Printf("%-7s %-12s %-18s %s  ADD took %s\n", name, p.Addr(), p.Addr6(), p.HostIfName(), time.Since(begin).Round(100*time.Microsecond))
		t.pods = append(t.pods, p)
	}
	return nil
}

// look shows pod and host as `ip` sees them.
func (t *tour) look() error {
	if _, err := exec.LookPath("ip"); err != nil {
		fmt.Println("(no ip command here to show addresses and routes with)")
		return nil
	}
	title("In pod web: ip addr show eth0; ip route")
	if err := t.show(t.pods[0].Exec, "ip", "addr", "show", "eth0"); err != nil {
		return err
	}
	if err := t.show(t.pods[0].Exec, "ip", "route"); err != nil {
		return err
	}
	title("On the host: ip addr; ip route")
	if err := t.show(t.host.Exec, "ip", "addr"); err != nil {
		return err
	}
	return t.show(t.host.Exec, "ip", "route")
}

func (t *tour) show(run func(context.Context, ...string) (string, error), arg ...string) error {
	out, err := run(t.ctx, arg...)
	fmt.Print(out)
	return err
}

// talk sends 100 datagrams from client to web and back and shows the TTLs that arrive.
func (t *tour) talk() error {
	title("client asks web a hundred times; one router between them takes 1 off the TTL of 64, every time")
	web, client := t.pods[0], t.pods[2]
	for _, to := range []netip.Addr{web.Addr(), web.Addr6()} {
		if err := askHundred(client.Namespace(), web.Namespace(), to, 63); err != nil {
			return err
		}
	}
	return nil
}

// maps dumps every kernel map with bpftool, a few entries each.
func (t *tour) maps() error {
	if _, err := exec.LookPath("bpftool"); err != nil {
		title("The kernel maps (install bpftool to see them raw; caracalctl reads them below)")
		return nil
	}
	title("The kernel maps: bpftool map dump pinned %s/...", t.host.BPFDir())
	for _, name := range []string{"pods", "routes", "flows", "opens", "quota", "state", "counts", "frags", "slots", "nat", "natopen", "uplinks"} {
		path := filepath.Join(t.host.BPFDir(), name)
		out, err := exec.CommandContext(t.ctx, "bpftool", "map", "dump", "pinned", path).CombinedOutput()
		if err != nil {
			return fmt.Errorf("bpftool map dump pinned %s: %w: %s", path, err, out)
		}
		lines := strings.SplitAfter(string(out), "\n")
		fmt.Printf("-- %s: %d lines, the first:\n%s", name, len(lines)-1, strings.Join(lines[:min(len(lines), 24)], ""))
	}
	return nil
}

// tables shows the same by caracalctl.
func (t *tour) tables() error {
	for _, noun := range []string{"pods", "routes", "flows", "counters", "ipam show"} {
		title("caracalctl %s", noun)
		if err := t.show(t.host.Exec, append([]string{filepath.Join(t.bin, "caracalctl")}, strings.Fields(noun)...)...); err != nil {
			return err
		}
	}
	return nil
}

func (t *tour) check() error {
	title("CNI CHECK compares interfaces, routes, programs and maps with what ADD made")
	for _, p := range t.pods {
		if err := p.Check(t.ctx); err != nil {
			return err
		}
		fmt.Println(p.Name, "as it should be")
	}
	return nil
}

func (t *tour) remove() error {
	title("DEL")
	for _, p := range t.pods {
		begin := time.Now()
		if err := t.host.DelPod(t.ctx, p.Name); err != nil {
			return err
		}
		fmt.Printf("%-7s gone in %s\n", p.Name, time.Since(begin).Round(100*time.Microsecond))
	}
	return nil
}
