// Package cluster tests hosts that share a store: real etcd members, real agents, real BGP sessions, real pods.
//
//	     h1              h2              h3
//	etcd caracald   etcd caracald   etcd caracald
//	      |               |               |
//	      +------------ switch -----------+------ outside
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) {
	if config := os.Getenv(changerVariable); config != "" {
		if err := runChanger(config, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(testenv.Main(m))
}

const pools = `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v4}
spec: {cidr: 10.244.0.0/16, natOutgoing: true}
---
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: "2001:db8:244::/64"}
`

// newCluster starts hosts with etcd, pools and agents, and waits until every host has its blocks and its sessions.
func newCluster(t testing.TB, hosts int) *lab.Lab {
	t.Helper()
	return newClusterOf(t, hosts, pools, testenv.Bin)
}

// newClusterOf is newCluster with other pools, and with binaries that bin builds.
func newClusterOf(t testing.TB, hosts int, pools string, bin func(testing.TB, string) string) *lab.Lab {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedProgram(t, "etcd", "etcd-server")
	l := lab.New(t, lab.Config{Hosts: hosts, Outside: true, Cluster: true, Caracal: bin(t, "caracal")})
	ctx := t.Context()
	must(t, l.StartEtcd(ctx))
	ctl(t, l.Host(1), pools, "apply", "-f", "-")
	for _, h := range l.Hosts() {
		must(t, h.StartAgent(ctx))
	}
	for _, h := range l.Hosts() {
		ready(t, h, hosts-1)
	}
	return l
}

// newHosts starts hosts without a shared store: each is told of the others and of a pool of its own.
func newHosts(t *testing.T, hosts int) *lab.Lab {
	t.Helper()
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: hosts, Outside: true, Cluster: true, Caracal: testenv.Bin(t, "caracal")})
	for _, h := range l.Hosts() {
		ctl(t, h, alone(h), "apply", "-f", "-")
		must(t, h.StartAgent(t.Context()))
	}
	for _, h := range l.Hosts() {
		ready(t, h, hosts-1)
	}
	return l
}

// alone is what a host without a shared store is told.
func alone(h *lab.Host) string {
	var text strings.Builder
	for _, o := range h.Lab().Hosts() {
		fmt.Fprintf(&text, "apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: %s}\nspec: {bgp: {ipv4Address: %s/24, ipv6Address: '%s/64'}}\n---\n", o.Name, o.Addr(), o.Addr6())
	}
	for i, p := range h.Pools() {
		fmt.Fprintf(&text, "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: own%d}\nspec: {cidr: '%s'}\n---\n", i, p)
	}
	return text.String()
}

// ready waits until a host's agent has nothing to complain of and a session with so many others, in each family.
func ready(t testing.TB, h *lab.Host, others int) {
	t.Helper()
	eventually(t, h.Name+" is ready", func() error {
		s, err := status(t, h)
		if err != nil {
			return err
		}
		up := 0
		for _, p := range s.Peers {
			if p.Info == "Established" {
				up++
			}
		}
		if !s.Ready || len(s.Problems) > 0 || up != 2*others || len(s.Blocks) < 2 || s.Written < 2*others {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

func status(t testing.TB, h *lab.Host) (agent.Status, error) {
	var s agent.Status
	out, err := h.Exec(t.Context(), "caracalctl", "node", "status", "-o", "json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

func ctl(t testing.TB, h *lab.Host, stdin string, args ...string) string {
	t.Helper()
	out, err := h.Namespace().ExecInput(t.Context(), stdin, append([]string{"caracalctl"}, args...)...)
	must(t, err)
	return out
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, 2*time.Minute, what, fn)
}

var ttls = regexp.MustCompile(`ttl=(\d+)`)

// TestThreeHosts is the walk-through: a block for each host, routes to the others, pods that reach each other over two
// hops, and calicoctl's table.
func TestThreeHosts(t *testing.T) {
	l := newCluster(t, 3)
	ctx := t.Context()
	var pods []*lab.Pod
	for _, h := range l.Hosts() {
		pods = append(pods, h.TestPod(t, "web-"+h.Name, lab.PodOptions{}))
	}
	for i, from := range pods {
		for j, to := range pods {
			if i == j {
				continue
			}
			for _, addr := range []string{to.Addr().String(), to.Addr6().String()} {
				var out string
				eventually(t, from.Name+" reaches "+addr, func() (err error) {
					out, err = from.Exec(ctx, "ping", "-c", "3", "-i", "0.05", "-W", "1", addr)
					return err
				})
				for _, m := range ttls.FindAllStringSubmatch(out, -1) {
					if m[1] != "62" {
						t.Errorf("%s to %s: ttl %s\n%s", from.Name, addr, m[1], out)
					}
				}
			}
		}
	}
	for i, h := range l.Hosts() {
		routes, err := h.Exec(ctx, "ip", "route")
		must(t, err)
		for _, other := range l.Hosts() {
			want := fmt.Sprintf(" via %s dev", other.Addr())
			if other.Number != h.Number && !strings.Contains(routes, want) {
				t.Errorf("%s: no route%s\n%s", h.Name, want, routes)
			}
		}
		if !strings.Contains(routes, "blackhole 10.244.") || !strings.Contains(routes, pods[i].Addr().String()+" dev cali") {
			t.Errorf("%s: %s", h.Name, routes)
		}
		table := ctl(t, h, "", "node", "status")
		if got := strings.Count(table, "| node-to-node mesh | up    |"); got != 4 {
			t.Errorf("%s: %d sessions\n%s", h.Name, got, table)
		}
		t.Logf("%s# ip route\n%s%s# caracalctl node status\n%s", h.Name, routes, h.Name, table)
	}
}

// TestAgentKilled: killing and starting an agent loses no packet, and no route is withdrawn, here or at its peer.
func TestAgentKilled(t *testing.T) {
	l := newHosts(t, 2)
	ctx := t.Context()
	a := l.Host(1).TestPod(t, "a", lab.PodOptions{})
	b := l.Host(2).TestPod(t, "b", lab.PodOptions{})
	eventually(t, "a reaches b", func() error {
		_, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", b.Addr().String())
		return err
	})
	var monitors []func() string
	for _, h := range l.Hosts() {
		monitors = append(monitors, follow(t, h, "ip", "monitor", "route"))
	}
	ping, stop := context.WithCancel(ctx)
	defer stop()
	pings := exec.CommandContext(ping, "ping", "-i", "0.01", "-W", "1", b.Addr().String())
	pings.Cancel = func() error { return pings.Process.Signal(os.Interrupt) }
	var out bytes.Buffer
	pings.Stdout = &out
	must(t, a.Namespace().Start(pings))
	for _, h := range l.Hosts() {
		must(t, h.Signal(ctx, "caracald", 9))
		begin := time.Now()
		must(t, h.StartAgent(ctx))
		ready(t, h, 1)
		t.Logf("%s: killed, started and ready again in %s", h.Name, time.Since(begin).Round(time.Millisecond))
	}
	stop()
	pings.Wait() // says that it was interrupted
	if !strings.Contains(out.String(), " 0% packet loss") {
		t.Error(out.String()[max(0, out.Len()-300):])
	}
	for i, m := range monitors {
		if said := m(); strings.Contains(said, "Deleted 10.244.") || strings.Contains(said, "Deleted 2001:db8:244:") {
			t.Errorf("h%d: %s", i+1, said)
		}
	}
}

// follow runs a program on a host until end is called, which returns what it wrote.
func follow(t *testing.T, h *lab.Host, arg ...string) (end func() string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, arg[0], arg[1:]...)
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, h.Namespace().Start(cmd))
	end = sync.OnceValue(func() string {
		cancel()
		cmd.Wait()
		return out.String()
	})
	t.Cleanup(func() { end() })
	return end
}
