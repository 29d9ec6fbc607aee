package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

// asCommand makes the test binary behave as the lab command.
const asCommand = "CARACAL_TEST_AS_LAB"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Unsetenv(asCommand)
		main()
		os.Exit(0)
	}
	testscript.Main(m, map[string]func(){"lab": main})
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		lab.Skip(t, "network namespaces and bpffs need root")
	}
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		lab.Skip(t, "needs the standard CNI plugins (apt-get install containernetworking-plugins)")
	}
}

// takeDown fails the test if the lab is still there, and removes it.
func takeDown(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := lab.Down(ctx, name); err != nil && !errors.Is(err, lab.ErrNotFound) {
		t.Error(err)
	}
	if left := lab.Leftovers(name); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestScripts(t *testing.T) {
	needRoot(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			name := lab.TestName()
			e.Setenv("LAB", name)
			e.Setenv("PATH", e.Getenv("PATH")+":/usr/sbin:/sbin")
			e.Defer(func() { takeDown(t, name) })
			return nil
		},
	})
}

// labCommand runs the lab command in a process of its own.
func labCommand(arg ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], arg...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

// bridgeConflist writes a configuration list of Debian's bridge plugin, which keeps all its state in the lab.
func bridgeConflist(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "conflist")
	text := `{"cniVersion":"1.0.0","name":"{{.Network}}","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,
		"ipam":{"type":"host-local","dataDir":"{{.StateDir}}","ranges":[[{"subnet":"{{index .IPv4Pools 0}}"}]]}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Kill up, pod add, pod del and down themselves after longer and longer times: down must always find everything.
func TestDownAfterKill(t *testing.T) {
	needRoot(t)
	conflist := bridgeConflist(t)
	name := lab.TestName()
	t.Cleanup(func() { takeDown(t, name) })
	up := []string{"up", "--name", name, "--hosts", "2", "--conflist", conflist}
	steps := []struct {
		name   string
		before [][]string
		kill   []string
	}{
		{"up", nil, up},
		{"pod add", [][]string{up}, []string{"pod", "add", "h1", "web", "--name", name}},
		{"pod del", [][]string{up, {"pod", "add", "h1", "web", "--name", name}}, []string{"pod", "del", "h1", "web", "--name", name}},
		{"down", [][]string{up, {"pod", "add", "h1", "web", "--name", name}}, []string{"down", "--name", name}},
	}
	for _, s := range steps {
		t.Run(s.name, func(t *testing.T) {
			killed := 0
			for after := time.Millisecond; ; after += max(3*time.Millisecond, after/4) { // bounded on a slow machine too
				for _, b := range s.before {
					if out, err := labCommand(b...).CombinedOutput(); err != nil {
						t.Fatalf("lab %s: %v\n%s", strings.Join(b, " "), err, out)
					}
				}
				finished := runAndKill(t, after, s.kill)
				// Twice: the second time finds nothing.
				for range 2 {
					if out, err := labCommand("down", "--name", name).CombinedOutput(); err != nil {
						t.Fatalf("down after a kill at %v: %v\n%s", after, err, out)
					}
				}
				if left := lab.Leftovers(name); len(left) != 0 {
					t.Fatalf("left behind after a kill at %v: %v", after, left)
				}
				if finished {
					break
				}
				killed++
			}
			if killed == 0 {
				t.Error("was never killed before it had finished")
			}
			t.Logf("killed %d times", killed)
		})
	}
}

// runAndKill runs the lab command, kills it after a time and tells whether it had finished before.
func runAndKill(t *testing.T, after time.Duration, arg []string) (finished bool) {
	t.Helper()
	cmd := labCommand(arg...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(after, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	if ws, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool }); ok && ws.Signaled() {
		return false
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("lab %s: %v\n%s", strings.Join(arg, " "), err, out.String())
	}
	return true
}

// Two downs at once, and ups of the same name in between, end with one winner each and nothing left.
func TestUpAndDownAtOnce(t *testing.T) {
	needRoot(t)
	conflist := bridgeConflist(t)
	name := lab.TestName()
	t.Cleanup(func() { takeDown(t, name) })
	var ups, downs []*exec.Cmd
	for range 3 {
		ups = append(ups, labCommand("up", "--name", name, "--conflist", conflist))
		downs = append(downs, labCommand("down", "--name", name))
	}
	for i := range ups {
		for _, c := range []*exec.Cmd{ups[i], downs[i]} {
			var out bytes.Buffer
			c.Stdout, c.Stderr = &out, &out
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range ups {
		if err := ups[i].Wait(); err != nil && !strings.Contains(fmt.Sprint(ups[i].Stderr), "already exists") {
			t.Errorf("up: %v: %s", err, ups[i].Stderr)
		}
		if err := downs[i].Wait(); err != nil {
			t.Errorf("down: %v: %s", err, downs[i].Stderr)
		}
	}
}

// exec keeps the command's own pid, signals and exit status.
func TestExecIsTheCommand(t *testing.T) {
	needRoot(t)
	conflist := bridgeConflist(t)
	name := lab.TestName()
	t.Cleanup(func() { takeDown(t, name) })
	if out, err := labCommand("up", "--name", name, "--conflist", conflist).CombinedOutput(); err != nil {
		t.Fatalf("up: %v\n%s", err, out)
	}
	cmd := labCommand("exec", "--name", name, "h1", "--", "sh", "-c", "echo $$ $CARACAL_LAB_HOST; kill -9 $$")
	out, err := cmd.Output()
	if want := fmt.Sprintf("%d h1\n", cmd.Process.Pid); string(out) != want {
		t.Errorf("exec prints %q, want %q", out, want)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(interface{ Signal() unix.Signal }).Signal() != unix.SIGKILL {
		t.Errorf("exec of a command that is killed: %v", err)
	}

	data, err := labCommand("status", "--name", name, "-o", "json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var labs []lab.Status
	if err := json.Unmarshal(data, &labs); err != nil || len(labs) != 1 || !labs[0].Up {
		t.Fatalf("status: %v\n%s", err, data)
	}
	if i := slices.IndexFunc(labs[0].Hosts, func(h lab.HostStatus) bool { return h.Name == "h1" }); i < 0 {
		t.Errorf("status has no host h1: %s", data)
	}
}
