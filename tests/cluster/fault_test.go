package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// TestStoreAway: without a quorum running pods run, new ones start, and the agents say what is wrong; with it again they
// go on, by what was written meanwhile.
func TestStoreAway(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	a := l.Host(1).TestPod(t, "a", lab.PodOptions{})
	b := l.Host(3).TestPod(t, "b", lab.PodOptions{})
	reaches(t, a, b)
	for _, n := range []int{2, 3} {
		must(t, l.Host(n).Signal(ctx, "etcd", unix.SIGKILL))
	}
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" notices", func() error { return hasProblem(t, h, "store", "") })
	}
	reaches(t, a, b)
	c := l.Host(3).TestPod(t, "c", lab.PodOptions{})
	reaches(t, c, a)
	if _, err := l.Host(1).Namespace().ExecInput(ctx, pools, "caracalctl", "apply", "-f", "-"); err == nil || !strings.Contains(err.Error(), "unavailable") {
		t.Errorf("apply without a quorum: %v", err)
	}
	// An agent that starts now knows nothing, and so leaves everything as it is.
	must(t, l.Host(1).Signal(ctx, "caracald", unix.SIGKILL))
	must(t, l.Host(1).StartAgent(ctx))
	eventually(t, "h1 notices again", func() error { return hasProblem(t, l.Host(1), "store", "") })
	reaches(t, a, b)
	for _, n := range []int{2, 3} {
		must(t, l.Host(n).StartEtcdMember())
	}
	for _, h := range l.Hosts() {
		ready(t, h, 2)
	}
	reaches(t, a, b)
}

// TestTwins: a second host of a name neither claims nor peers, and says why.
func TestTwins(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	two := l.Host(2)
	must(t, two.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, two.StartAgent(ctx, "--node-name", "h1"))
	eventually(t, "the twin says so", func() error { return hasProblem(t, two, "node", "another host has it") })
	must(t, two.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, two.StartAgent(ctx, "--node-name", "h3", "--ip", l.Host(1).Addr().String()+"/24"))
	eventually(t, "the one with its address says so", func() error { return hasProblem(t, two, "node", "another host has it") })
	blocks := ctl(t, l.Host(1), "", "ipam", "blocks")
	if strings.Count(blocks, " h1") != 2 || strings.Count(blocks, " h2") != 2 || strings.Contains(blocks, " h3") {
		t.Errorf("%s", blocks)
	}
	must(t, two.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, two.StartAgent(ctx))
	ready(t, two, 1)
	ready(t, l.Host(1), 1)
}

// TestNodeDeleted: a lost host's blocks and routes go when an operator says so, and another can have the blocks.
func TestNodeDeleted(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	must(t, l.Host(3).Signal(ctx, "caracald", unix.SIGKILL))
	if table := ctl(t, l.Host(1), "", "routes"); !strings.Contains(table, l.Host(3).Addr().String()+" ") {
		t.Fatalf("the routes of a host whose agent was killed are gone:\n%s", table)
	}
	out := ctl(t, l.Host(1), "", "delete", "node", "h3")
	if strings.Count(out, "released") != 2 {
		t.Errorf("%s", out)
	}
	for _, h := range l.Hosts()[:2] {
		eventually(t, h.Name+" forgets h3", func() error {
			if table := ctl(t, h, "", "routes"); strings.Contains(table, l.Host(3).Addr().String()+" ") {
				return fmt.Errorf("%s", table)
			}
			routes, err := h.Exec(ctx, "ip", "route")
			if err == nil && strings.Contains(routes, "via "+l.Host(3).Addr().String()) {
				err = fmt.Errorf("%s", routes)
			}
			return err
		})
	}
	must(t, l.Host(3).StartAgent(ctx))
	for _, h := range l.Hosts() {
		ready(t, h, 2)
	}
}

// TestHostJoins: a host whose agent starts is reachable from the others within two seconds of its first pod.
func TestHostJoins(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	a := l.Host(1).TestPod(t, "a", lab.PodOptions{})
	three := l.Host(3)
	must(t, three.Signal(ctx, "caracald", unix.SIGTERM))
	ctl(t, l.Host(1), "", "delete", "node", "h3")
	for _, h := range l.Hosts()[:2] {
		ready(t, h, 1)
	}
	must(t, three.StartAgent(ctx))
	eventually(t, "h3 has its blocks", func() error {
		s, err := status(t, three)
		if err == nil && len(s.Blocks) < 2 {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	b := three.TestPod(t, "b", lab.PodOptions{})
	begin := time.Now()
	reaches(t, a, b)
	t.Logf("reachable %s after its first pod", time.Since(begin).Round(time.Millisecond))
}

// TestGarbageInStore: what can't be read is named; what can counts.
func TestGarbageInStore(t *testing.T) {
	l := newCluster(t, 1)
	h := l.Host(1)
	must(t, putRaw(t, h, "/nodes/broken", "{"))
	must(t, putRaw(t, h, "/blocks/10.9.9.0-26", `{"cidr":"10.9.9.0/26","pool":"10.8.0.0/16","node":"x"}`))
	eventually(t, "both are named", func() error {
		if err := hasProblem(t, h, "resources", "/nodes/broken"); err != nil {
			return err
		}
		return hasProblem(t, h, "resources", "/blocks/10.9.9.0-26")
	})
	h.TestPod(t, "a", lab.PodOptions{})
}

func putRaw(t *testing.T, h *lab.Host, key, value string) error {
	t.Helper()
	head := `{"kind":"caracal-export","version":1,"revision":1,"keys":1}`
	_, err := h.Namespace().ExecInput(t.Context(), head+"\n"+fmt.Sprintf("{\"key\":%q,\"text\":%q}\n", key, value), "caracalctl", "datastore", "import")
	return err
}

func reaches(t *testing.T, from, to *lab.Pod) {
	t.Helper()
	for _, addr := range []string{to.Addr().String(), to.Addr6().String()} {
		eventually(t, from.Name+" reaches "+addr, func() error {
			_, err := from.Exec(t.Context(), "ping", "-c", "1", "-W", "1", addr)
			return err
		})
	}
}

func hasProblem(t *testing.T, h *lab.Host, about, text string) error {
	t.Helper()
	s, err := status(t, h)
	if err != nil {
		return err
	}
	for _, p := range s.Problems {
		if p.About == about && strings.Contains(p.Text, text) {
			return nil
		}
	}
	return fmt.Errorf("%s: %+v", h.Name, s.Problems)
}

// TestNodeRun starts an agent as an operator does by hand.
func TestNodeRun(t *testing.T) {
	l := newHosts(t, 1)
	h := l.Host(1)
	must(t, h.Signal(t.Context(), "caracald", unix.SIGTERM))
	if out, err := h.Exec(t.Context(), "caracalctl", "node", "status"); err == nil || !strings.Contains(out, "Caracal process is not running.") {
		t.Errorf("%s, %v", out, err)
	}
	log := h.Dir() + "/run.log"
	args := []string{"node", "run", "--log-file", log, "--", "--ip", h.Addr().String() + "/24", "--ip6", h.Addr6().String() + "/64"}
	if out := ctl(t, h, "", append([]string{"node", "run", "--dry-run"}, args[4:]...)...); !strings.Contains(out, "caracald --state-dir "+h.StateDir()) {
		t.Errorf("%s", out)
	}
	out := ctl(t, h, "", args...)
	if !strings.HasSuffix(out, "Caracal node started successfully\n") {
		t.Errorf("%s", out)
	}
	if _, err := h.Exec(t.Context(), append([]string{"caracalctl"}, args...)...); err == nil || !strings.Contains(err.Error(), "answers there already") {
		t.Errorf("a second one: %v", err)
	}
	if _, err := h.Exec(t.Context(), "caracalctl", "--socket", h.Dir()+"/other.sock", "node", "run", "--log-file", log, "--", "--node-name", ""); err == nil || !strings.Contains(err.Error(), "caracald ended") {
		t.Errorf("without a name: %v", err)
	}
}

// TestAddBeforeAgent: a node that is to be part of a cluster gives out no address before it knows whose blocks are whose.
func TestAddBeforeAgent(t *testing.T) {
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Cluster: true, Caracal: testenv.Bin(t, "caracal")})
	h := l.Host(1)
	if _, err := h.AddPod(t.Context(), "early", lab.PodOptions{}); err == nil || !strings.Contains(err.Error(), "start caracald") {
		t.Errorf("ADD: %v", err)
	}
	if err := h.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "can't be served now") {
		t.Errorf("STATUS: %v", err)
	}
	ctl(t, h, alone(h), "apply", "-f", "-")
	must(t, h.StartAgent(t.Context()))
	ready(t, h, 0)
	h.TestPod(t, "late", lab.PodOptions{})
	must(t, h.Status(t.Context()))
}
