package cluster

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
	ctl(t, l.Host(1), "apiVersion: projectcalico.org/v3\nkind: BGPConfiguration\nmetadata: {name: default}\nspec: {nodeMeshMaxRestartTime: 5s}\n", "apply", "-f", "-")
	a := l.Host(1).TestPod(t, "a", lab.PodOptions{})
	b := l.Host(3).TestPod(t, "b", lab.PodOptions{})
	reaches(t, a, b)
	picture := filepath.Join(l.Host(1).StateDir(), "cluster.json")
	eventually(t, "h1 has kept what it heard", func() error {
		text, err := os.ReadFile(picture)
		if err == nil && !strings.Contains(string(text), "nodeMeshMaxRestartTime") {
			err = errors.New(string(text))
		}
		return err
	})
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
	// An agent that starts now knows what was heard last, and tells the other hosts again of its blocks before they forget them.
	must(t, l.Host(1).Signal(ctx, "caracald", unix.SIGKILL))
	must(t, l.Host(1).StartAgent(ctx))
	eventually(t, "h1 notices again", func() error { return hasProblem(t, l.Host(1), "store", "") })
	eventually(t, "h1 has its sessions again, and its routes", func() error {
		s, err := status(t, l.Host(1))
		if err != nil {
			return err
		}
		for _, p := range s.Peers {
			if p.Info != "Established" {
				return fmt.Errorf("%+v", s)
			}
		}
		if len(s.Peers) != 4 || !s.Synced || s.Written < 4 || len(s.Blocks) < 2 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	reaches(t, a, b)
	reaches(t, b, a)
	for _, n := range []int{2, 3} {
		must(t, l.Host(n).StartEtcdMember())
	}
	for _, h := range l.Hosts() {
		ready(t, h, 2)
	}
	reaches(t, a, b)
}

// TestPartitioned: a host that is cut off from the members of the store, or from everybody, goes on: its pods run, new ones
// start, and its agent says what is wrong. The others have a quorum without its member and go on too. What they wrote
// meanwhile counts when it is back, though etcd has forgotten how that came about.
func TestPartitioned(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	one, three := l.Host(1), l.Host(3)
	a := one.TestPod(t, "a", lab.PodOptions{})
	b := three.TestPod(t, "b", lab.PodOptions{})
	reaches(t, a, b)
	ip := func(n lab.Namespace, lines ...string) {
		t.Helper()
		_, err := n.ExecInput(ctx, strings.Join(lines, "\n"), "ip", "-batch", "-")
		must(t, err)
	}
	rules := []string{"pref 9 ipproto tcp dport 2379-2380 blackhole", "pref 9 ipproto tcp sport 2379-2380 blackhole"}
	for i, cut := range []struct {
		name      string
		cut, heal func()
	}{
		{"from the members",
			func() { ip(three.Namespace(), "rule add "+rules[0], "rule add "+rules[1]) },
			func() { ip(three.Namespace(), "rule del "+rules[0], "rule del "+rules[1]) }},
		{"from everybody",
			func() { ip(l.Switch(), "link set h3 down") },
			func() { ip(l.Switch(), "link set h3 up") }},
	} {
		begin := time.Now()
		cut.cut()
		eventually(t, "h3 notices", func() error { return hasProblem(t, three, "store", "store is unavailable; running pods keep running") })
		t.Logf("cut off %s: noticed after %s", cut.name, time.Since(begin).Round(time.Millisecond))
		c := three.TestPod(t, fmt.Sprint("c", i), lab.PodOptions{})
		reaches(t, c, b)
		if i == 0 {
			reaches(t, a, c)
		}
		d := l.Host(2).TestPod(t, fmt.Sprint("d", i), lab.PodOptions{})
		reaches(t, a, d)
		eventually(t, "the others write", func() error {
			pool := fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: later%d}\nspec: {cidr: 10.%d.0.0/16}\n", i, 245+i)
			_, err := one.Namespace().ExecInput(ctx, pool, "caracalctl", "apply", "-f", "-")
			return err
		})
		eventually(t, "h1 has a block of the new pool", func() error { return hasBlock(t, one, fmt.Sprintf("10.%d.", 245+i)) })
		compact(t, one)
		if err := hasBlock(t, three, fmt.Sprintf("10.%d.", 245+i)); err == nil {
			t.Error("h3 has a block of a pool that it can't have heard of")
		}
		begin = time.Now()
		cut.heal()
		eventually(t, "h3 has a block of the new pool", func() error { return hasBlock(t, three, fmt.Sprintf("10.%d.", 245+i)) })
		t.Logf("cut off %s: it goes on %s after that ended", cut.name, time.Since(begin).Round(time.Millisecond))
		for _, h := range l.Hosts() {
			ready(t, h, 2)
		}
		reaches(t, a, c)
		reaches(t, d, b)
	}
}

func hasBlock(t *testing.T, h *lab.Host, prefix string) error {
	t.Helper()
	s, err := status(t, h)
	if err != nil {
		return err
	}
	for _, b := range s.Blocks {
		if strings.HasPrefix(b.String(), prefix) {
			return nil
		}
	}
	return fmt.Errorf("%s: %v, %v", h.Name, s.Blocks, s.Problems)
}

// compact makes the store forget how it came to be as it is, by its HTTP gateway.
func compact(t *testing.T, h *lab.Host) {
	t.Helper()
	ask := func(what, body string) string {
		t.Helper()
		out, err := h.Exec(t.Context(), "curl", "-sSf", "-d", body, fmt.Sprintf("http://%s:2379/v3/kv/%s", h.Addr(), what))
		must(t, err)
		return out
	}
	var answer struct{ Header struct{ Revision string } }
	must(t, json.Unmarshal([]byte(ask("range", `{"key":"AA=="}`)), &answer))
	ask("compaction", fmt.Sprintf(`{"revision":%q,"physical":true}`, answer.Header.Revision))
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
	eventually(t, "the one with its address says so", func() error {
		return hasProblem(t, two, "node", "address "+l.Host(1).Addr().String()+": another host has it: node h1")
	})
	must(t, two.Signal(ctx, "caracald", unix.SIGTERM))
	must(t, two.StartAgent(ctx, "--node-name", "h3", "--ip6", l.Host(1).Addr6().String()+"/64"))
	eventually(t, "so does the one with its IPv6 address", func() error {
		return hasProblem(t, two, "node", "address "+l.Host(1).Addr6().String()+": another host has it: node h1")
	})
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

// TestGarbageInStore: what can't be read is named, whatever it is; what can counts.
func TestGarbageInStore(t *testing.T) {
	l := newCluster(t, 1)
	h := l.Host(1)
	before, err := status(t, h)
	must(t, err)
	const own = `,"pool":"10.244.0.0/16","node":"h1"}`
	resource := func(kind, name, spec string) string {
		return fmt.Sprintf(`{"apiVersion":"projectcalico.org/v3","kind":%q,"metadata":{"name":%q},"spec":%s}`, kind, name, spec)
	}
	garbage := map[string]string{
		"/foreign":                   "not ours",
		"/elsewhere/deep/down":       `{"kind":"Pod"}`,
		"/nodes/broken":              "{",
		"/nodes/empty":               "",
		"/nodes/null":                "null",
		"/nodes/list":                "[]",
		"/nodes/number":              "42",
		"/nodes/other-name":          resource("Node", "h9", `{"bgp":{"ipv4Address":"192.0.2.9/24"}}`),
		"/nodes/other-kind":          resource("IPPool", "other-kind", `{"cidr":"10.9.0.0/16"}`),
		"/nodes/address":             resource("Node", "address", `{"bgp":{"ipv4Address":"300.0.2.9/24"}}`),
		"/nodes/family":              resource("Node", "family", `{"bgp":{"ipv4Address":"2001:db8::1/64"}}`),
		"/nodes/unknown-key":         resource("Node", "unknown-key", `{"bpg":{}}`),
		"/ippools/broken":            "\x00\xff\xfe",
		"/ippools/cidr":              resource("IPPool", "cidr", `{"cidr":"10.0.0.0"}`),
		"/ippools/size":              resource("IPPool", "size", `{"cidr":"10.9.0.0/16","blockSize":8}`),
		"/ippools/zz-overlap":        resource("IPPool", "zz-overlap", `{"cidr":"10.244.0.0/20"}`),
		"/bgppeers/broken":           `"text"`,
		"/bgppeers/peer":             resource("BGPPeer", "peer", `{"peerIP":"nobody","asNumber":64512}`),
		"/bgppeers/as":               resource("BGPPeer", "as", `{"peerIP":"192.0.2.77","asNumber":-1}`),
		"/bgpconfigurations/default": resource("BGPConfiguration", "default", `{"listenPort":"bgp"}`),
		"/bgpconfigurations/node.h1": "}",
		"/networkpolicies/x":         resource("NetworkPolicy", "x", `{}`), // its namespace is missing
		"/globalnetworkpolicies/x":   "{",
		"/workloadendpoints/a/b":     resource("WorkloadEndpoint", "b", `{}`),
		"/blocks/10.9.9.0-26":        `{"cidr":"10.9.9.0/26","pool":"10.8.0.0/16","node":"x"}`,
		"/blocks/10.244.7.1-26":      `{"cidr":"10.244.7.1/26"` + own,
		"/blocks/10.244.0.0-15":      `{"cidr":"10.244.0.0/15"` + own,
		"/blocks/10.244.9.0-26":      `{"cidr":"10.244.8.0/26"` + own,
		"/blocks/10.244.10.0-26":     `{"cidr":"10.244.10.0/26","pool":"10.244.0.0/16","node":""}`,
		"/blocks/10.244.11.0-26":     `{"cidr":"10.244.11.0/26","pool":"10.244.0.0/16","node":"h1","more":1}`,
		"/blocks/10.244.12.0-26":     "[",
		"/blocks/nothing":            `{"cidr":"","pool":"","node":"h1"}`,
		"/blocks/2001.db8.244..-48":  `{"cidr":"2001:db8:244::/48","pool":"2001:db8:245::/48","node":"h1"}`,
	}
	for key, value := range garbage {
		must(t, putRaw(t, h, key, value))
	}
	eventually(t, "all are named", func() error {
		for key := range garbage {
			about := "resources"
			if strings.HasPrefix(key, "/networkpolicies/") || strings.HasPrefix(key, "/globalnetworkpolicies/") || strings.HasPrefix(key, "/workloadendpoints/") {
				about = "policy"
			}
			if err := hasProblem(t, h, about, key+": "); err != nil {
				return fmt.Errorf("nothing of %s: %w", key, err)
			}
		}
		return nil
	})
	h.TestPod(t, "a", lab.PodOptions{})
	after, err := status(t, h)
	must(t, err)
	if !slices.Equal(after.Blocks, before.Blocks) || len(after.Problems) != 2 || !after.Ready {
		t.Errorf("%+v\nwas\n%+v", after, before)
	}
}

func putRaw(t *testing.T, h *lab.Host, key, value string) error {
	t.Helper()
	head := `{"kind":"caracal-export","version":1,"revision":1,"keys":1}`
	_, err := h.Namespace().ExecInput(t.Context(), head+"\n"+fmt.Sprintf("{\"key\":%q,\"base64\":%q}\n", key, base64.StdEncoding.EncodeToString([]byte(value))), "caracalctl", "datastore", "import")
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
	ctl(t, h, `{"apiVersion": "projectcalico.org/v3", "kind": "Node", "metadata": {"name": "gone"}, "spec": {"bgp": {"ipv4Address": "192.0.2.99/24"}}}`, "apply", "-f", "-")
	out := ctl(t, h, "", args...)
	if !strings.HasSuffix(out, "The way to the pods behind 192.0.2.99 is not known yet (caracalctl node status)\nCaracal node started successfully\n") {
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
