package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tools/lab"
)

// mostMemory is what an idle agent of a node with 250 pods may keep resident, MB (1,000,000 bytes).
const mostMemory = 60

// TestAgentMemory: what an idle agent of a node with 250 pods keeps resident, with a store of etcd and one of its own, without
// policy and with 1,000 policies that are about all of the pods.
func TestAgentMemory(t *testing.T) {
	const pods, policies = 250, 1000
	h, ctx := newCluster(t, 1).Host(1), t.Context()
	for i := range pods {
		_, err := h.AddPod(ctx, fmt.Sprint("pod", i), lab.PodOptions{Labels: map[string]string{"app": fmt.Sprint("app", i%50)}})
		must(t, err)
	}
	var all strings.Builder
	for i := range policies {
		all.WriteString(appPolicy(i, 80))
	}
	own := filepath.Join(h.Dir(), "own.cfg")
	must(t, os.WriteFile(own, []byte("apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec: {datastoreType: bolt}\n"), 0o600))
	for _, store := range []struct {
		name string
		args []string
	}{{"etcd", nil}, {"bolt", []string{"--config", own}}} {
		if store.args != nil {
			must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
			ctl(t, h, pools, append(store.args, "apply", "-f", "-")...)
			must(t, h.StartAgent(ctx, store.args...))
		}
		is(t, h, "has published all pods", func(s agent.Status) bool { return s.Ready && s.Policy.Resources >= pods })
		withinMemory(t, h, store.name+", 250 pods")
		ctl(t, h, all.String(), append(store.args, "apply", "-f", "-")...)
		is(t, h, "has all in force", func(s agent.Status) bool {
			return s.Policy.Policies == policies && s.Policy.Resources >= pods+policies
		})
		withinMemory(t, h, store.name+", 250 pods, 1,000 policies")
	}
}

// withinMemory waits until an agent's memory has not changed for some seconds, and wants it to be within mostMemory.
func withinMemory(t *testing.T, h *lab.Host, what string) {
	t.Helper()
	const still = 5 * time.Second // longer than the agent waits until it gives memory back
	var m map[string]int
	since, last := time.Now(), 0
	eventually(t, "the agent's memory stays the same", func() error {
		m = memory(t, h)
		if change := m["VmRSS"] - last; change > 200 || change < -200 { // kB
			since, last = time.Now(), m["VmRSS"]
		}
		if time.Since(since) < still {
			return fmt.Errorf("%d kB", m["VmRSS"])
		}
		return nil
	})
	t.Logf("%s: resident %d kB: anonymous %d, files (the program's text) %d, shared %d; peak %d",
		what, m["VmRSS"], m["RssAnon"], m["RssFile"], m["RssShmem"], m["VmHWM"])
	if bytes := m["VmRSS"] * 1024; bytes > mostMemory*1_000_000 {
		t.Errorf("%s: the idle agent has %d bytes resident, more than %d MB", what, bytes, mostMemory)
	}
}

// memory is what the kernel says of the agent's, kB (proc_pid_status(5)).
func memory(t *testing.T, h *lab.Host) map[string]int {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(h.Dir(), "caracald.pid"))
	must(t, err)
	text, err := os.ReadFile("/proc/" + string(pid) + "/status")
	must(t, err)
	m := make(map[string]int)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "kB" {
			m[strings.TrimSuffix(f[0], ":")], _ = strconv.Atoi(f[1])
		}
	}
	return m
}
