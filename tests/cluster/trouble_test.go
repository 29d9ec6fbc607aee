package cluster

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// logLine is one of an agent's log in JSON.
type logLine struct{ Time, Level, Msg, About, Error string }

func agentLog(t *testing.T, h *lab.Host) []logLine {
	t.Helper()
	text, err := os.ReadFile(h.AgentLog())
	must(t, err)
	return testenv.ReadLog(t, text, func(l logLine) string { return l.Time })
}

// TestLogStoreAway: an agent whose store is away for long says so once, and once that it is there again. A clean start has no
// warning.
func TestLogStoreAway(t *testing.T) {
	const away = 10 * time.Second
	l := newCluster(t, 1)
	h, ctx := l.Host(1), t.Context()
	must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, os.Truncate(h.AgentLog(), 0))
	must(t, h.StartAgent(ctx, "--log-format", "json"))
	ready(t, h, 0)
	for _, l := range agentLog(t, h) {
		if l.Level != "INFO" {
			t.Errorf("at a clean start: %+v", l)
		}
	}
	before := len(agentLog(t, h))
	must(t, h.Signal(ctx, "etcd", unix.SIGKILL))
	eventually(t, "the agent notices", func() error { return hasProblem(t, h, "store", "") })
	h.TestPod(t, "meanwhile", lab.PodOptions{}) // there is something that can't be published
	time.Sleep(away)
	must(t, h.StartEtcdMember())
	ready(t, h, 0)
	lines := agentLog(t, h)[before:]
	said := make(map[string]int)
	for _, l := range lines {
		said[l.Msg+" "+l.About]++
	}
	if said["problem store"] < 1 || said["over store"] != 1 || len(lines) > 8 {
		t.Errorf("%d lines: %+v", len(lines), lines)
	}
	t.Logf("%d lines about %s without the store: %v", len(lines), away, said)
	must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
	if lines := agentLog(t, h); lines[len(lines)-1].Msg != "ends" {
		t.Errorf("the log ends with %+v", lines[len(lines)-1])
	}
}

// TestPortsTaken: an agent does what it can while others have its ports, says who has them and which option gives it another, and
// takes them when they are free.
func TestPortsTaken(t *testing.T) {
	l := newCluster(t, 1)
	h, ctx := l.Host(1), t.Context()
	must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
	var taken []net.Listener
	listen := func(address string) {
		t.Helper()
		must(t, h.Do(func() error {
			l, err := net.Listen("tcp", address)
			taken = append(taken, l)
			return err
		}))
	}
	listen("127.0.0.1:9099")
	listen("127.0.0.1:9091")
	listen(fmt.Sprintf("%s:179", h.Addr()))
	must(t, h.StartAgent(ctx))
	self := fmt.Sprintf("by process %d (cluster.test)", os.Getpid())
	for about, want := range map[string]string{
		"health address":  "/health is not served: port 9099 is taken " + self + ": end that, or give the agent another (--health)",
		"metrics address": "/metrics is not served: port 9091 is taken " + self + ": end that, or give the agent another (--metrics)",
		"bgp":             "port 179 is taken " + self + ": end that, or give the agent another (--bgp-port, or listenPort of the BGPConfiguration)",
	} {
		eventually(t, "the agent says of "+about+" "+want, func() error { return hasProblem(t, h, about, want) })
	}
	h.TestPod(t, "meanwhile", lab.PodOptions{})
	out, _ := h.Exec(ctx, "caracalctl", "doctor", "--resolv-conf", "/dev/null")
	for _, want := range []string{"port 9099 is taken " + self, "port 9091 is taken " + self, "port 179 is taken " + self} {
		if !strings.Contains(out, want) {
			t.Errorf("doctor does not say %q:\n%s", want, out)
		}
	}
	for _, l := range taken {
		must(t, l.Close())
	}
	ready(t, h, 0)
	for path, want := range map[string]string{"127.0.0.1:9099/health": "ok\n", "127.0.0.1:9091/metrics": "caracal_problems 0\n"} {
		if got, err := h.Exec(ctx, "curl", "-sS", path); err != nil || !strings.Contains(got, want) {
			t.Errorf("%s answers %s, %v", path, got, err)
		}
	}
}

// TestAgentEnds: an agent that is told to end does so soon, whatever it waits for.
func TestAgentEnds(t *testing.T) {
	l := newCluster(t, 1)
	h, ctx := l.Host(1), t.Context()
	h.TestPod(t, "a", lab.PodOptions{})
	for _, c := range []struct {
		name string
		hold func(t *testing.T) (release func())
	}{
		{"nothing", func(*testing.T) func() { return func() {} }},
		{"the node lock", func(t *testing.T) func() {
			lock, err := node.LockNode(ctx, h.StateDir())
			must(t, err)
			return func() { must(t, lock.Unlock()) }
		}},
		{"node.db", func(t *testing.T) func() {
			var lock *node.Lock
			eventually(t, "node.db is free", func() (err error) {
				lock, err = node.TryLock(h.StateDir(), "node.db.lock")
				return err
			})
			return func() { must(t, lock.Unlock()) }
		}},
		{"the store", func(t *testing.T) func() {
			must(t, h.Signal(ctx, "etcd", unix.SIGSTOP))
			return func() { must(t, h.Signal(ctx, "etcd", unix.SIGCONT)) }
		}},
	} {
		release := c.hold(t)
		// It has something to do with what is held: the kernel's table has lost its blocks, and node.db was written.
		_, _ = h.Exec(ctx, "ip", "route", "flush", "type", "blackhole", "proto", "202")
		must(t, os.Chtimes(filepath.Join(h.StateDir(), "node.db"), time.Now(), time.Now()))
		time.Sleep(300 * time.Millisecond) // it looks every 100 ms, and waits then
		begin := time.Now()
		must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
		took := time.Since(begin)
		t.Logf("with %s held it ended after %s", c.name, took)
		if took > 10*time.Second { // locks are waited for 30 s
			t.Errorf("with %s held it took %s to end", c.name, took)
		}
		release()
		must(t, h.StartAgent(ctx))
		ready(t, h, 0)
	}
}

// TestTwoAgents: one agent runs on a node. A second one says which process is in its way and changes nothing; one that was killed
// is in nobody's way; and what can't be the agent's is left alone.
func TestTwoAgents(t *testing.T) {
	l := newHosts(t, 1)
	h, ctx := l.Host(1), t.Context()
	pid, err := os.ReadFile(filepath.Join(h.Dir(), "caracald.pid"))
	must(t, err)
	first := fmt.Sprintf("process %s (caracald)", pid)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, []byte("mine"), 0o600))
	locked := filepath.Join(dir, "locked")
	must(t, os.Mkdir(locked, 0o700))
	must(t, unix.Mount("tmpfs", locked, "tmpfs", unix.MS_RDONLY, ""))
	defer func() { must(t, unix.Unmount(locked, 0)) }()
	fails := func(want string, args ...string) {
		t.Helper()
		out, err := h.Exec(ctx, append([]string{"timeout", "10", "caracald", "--health", "", "--metrics", "", "--bgp-port", "-1"}, args...)...)
		if err == nil || !strings.Contains(out+err.Error(), want) {
			t.Errorf("caracald %v: %v %s; want %q", args, err, out, want)
		}
	}
	fails("another agent of this node runs (" + first + ")")
	fails("another agent of this node runs ("+first+")", "--socket", filepath.Join(dir, "other.sock"))
	fails("another program answers there: "+first, "--state-dir", filepath.Join(dir, "state"))
	own := []string{"--state-dir", filepath.Join(dir, "state")}
	fails("file is no socket, and stays; make that possible, or give another (--socket", append(own, "--socket", file)...)
	fails("read-only file system; make that possible, or give another (--socket", append(own, "--socket", filepath.Join(locked, "run", "agent.sock"))...)
	fails("read-only file system; make that possible, or give another (--socket", append(own, "--socket", filepath.Join(locked, "agent.sock"))...)
	fails("read-only file system", "--state-dir", filepath.Join(locked, "state"), "--socket", filepath.Join(dir, "agent.sock"))
	fails("write it as 127.0.0.1:9099", append(own, "--socket", filepath.Join(dir, "agent.sock"), "--health", "9099")...)
	config := filepath.Join(dir, "caracalctl.cfg")
	must(t, os.WriteFile(config, []byte("apiVersion: projectcalico.org/v3\n  kind: [\n"), 0o600))
	fails(config+": line 2: ", append(own, "--socket", filepath.Join(dir, "agent.sock"), "--config", config)...)
	if text, err := os.ReadFile(file); err != nil || string(text) != "mine" {
		t.Errorf("a file in place of the socket: %q, %v", text, err)
	}
	ready(t, h, 0)

	must(t, h.Signal(ctx, "caracald", unix.SIGKILL))
	if _, err := os.Stat(h.Socket()); err != nil {
		t.Fatalf("a killed agent left no socket: %v", err)
	}
	h.TestPod(t, "meanwhile", lab.PodOptions{}) // for which nobody answers there
	if out, err := h.Exec(ctx, "caracalctl", "node", "status"); err == nil || !strings.Contains(out, "is not running") {
		t.Errorf("caracalctl beside a dead agent's socket: %v %s", err, out)
	}
	must(t, h.StartAgent(ctx))
	ready(t, h, 0)
}

// sample is a line of Prometheus's text format (0.0.4).
var sample = regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="[^"\\]*"(?:,[a-z_]+="[^"\\]*")*\})? ([0-9.e+-]+)$`)

// TestMetrics scrapes an agent: each line is as Prometheus wants it, and those about policy say what the agent says otherwise.
func TestMetrics(t *testing.T) {
	l := newHosts(t, 1)
	h, ctx := l.Host(1), t.Context()
	scrape := func() map[string]float64 {
		t.Helper()
		out, err := h.Exec(ctx, "curl", "-sS", "127.0.0.1:9091/metrics")
		must(t, err)
		all, types := make(map[string]float64), make(map[string]string)
		for line := range strings.Lines(out + "\n") {
			line = strings.TrimSpace(line)
			if f := strings.Fields(line); len(f) > 3 && f[0] == "#" && f[1] == "HELP" || len(f) == 0 {
				continue
			} else if len(f) == 4 && f[1] == "TYPE" {
				types[f[2]] = f[3]
				continue
			}
			m := sample.FindStringSubmatch(line)
			if m == nil || types[m[1]] == "" || strings.HasSuffix(m[1], "_total") != (types[m[1]] == "counter") {
				t.Errorf("no sample of a metric with a type: %q", line)
				continue
			}
			if _, twice := all[m[1]+m[2]]; twice {
				t.Errorf("twice: %q", line)
			}
			all[m[1]+m[2]], err = strconv.ParseFloat(m[3], 64)
			must(t, err)
		}
		return all
	}
	if before := scrape(); before["caracal_policies"] != 0 || before["caracal_policy_rows"] != 0 {
		t.Errorf("without policy: %v", before)
	}
	for i := range 3 {
		h.TestPod(t, fmt.Sprint("pod", i), lab.PodOptions{Labels: map[string]string{"app": fmt.Sprint("app", i)}})
	}
	ctl(t, h, appPolicy(0, 80)+appPolicy(1, 81), "apply", "-f", "-")
	is(t, h, "has policy in force", func(s agent.Status) bool { return s.Policy.Policies == 2 && s.Policy.Rows > 0 && s.Policy.Pods == 3 })
	s, err := status(t, h)
	must(t, err)
	got := scrape()
	for name, want := range map[string]int{
		"caracal_policies": 2, "caracal_policy_rules": s.Policy.Rules, "caracal_policy_ids": s.Policy.PolicyIDs, "caracal_policy_rows": s.Policy.Rows,
		"caracal_policy_prefixes": s.Policy.Prefixes, "caracal_policy_identities": s.Policy.Identities, "caracal_policy_refused": 0, "caracal_problems": 0,
	} {
		if value, ok := got[name]; !ok || value != float64(want) {
			t.Errorf("%s is %v (%t), want %d", name, value, ok, want)
		}
	}
	if got["caracal_policy_rules"] < 2 || got["caracal_policy_commits_total"] < 1 || got["caracal_policy_commit_seconds"] <= 0 || got["caracal_policy_commit_seconds"] > 60 {
		t.Errorf("metrics about policy: %v", got)
	}
}
