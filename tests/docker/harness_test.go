// Package docker tests Docker's networks: Debian's dockerd on simulated machines, with real etcd where several share a store.
// Paths are the default ones; all that a user would have to write is in docs/docker.md, which is run here too.
//
//	      etcd1                  etcd2                  etcd3
//	etcd dockerd caracald  etcd dockerd caracald  etcd dockerd caracald
//	       c1                     c2                     c3
//	        |                      |                      |
//	        +------------------- switch ------------------+------ outside
package docker

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const pool = `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: containers}
spec: {cidr: 192.168.0.0/16, natOutgoing: true}
`

// machine is one with Docker on it.
type machine struct {
	*lab.Machine
	t     testing.TB
	agent []string // caracald and its flags
	dock  []string // dockerd's flags
}

// newMachine is one that shares nothing with others: its store is a file.
func newMachine(t testing.TB, agent ...string) *machine {
	t.Helper()
	m := newMachines(t, lab.Config{Hosts: 1, Outside: true}, testenv.Bin(t, "caracal"))[0]
	m.agent = append(m.agent, agent...)
	m.startAgent()
	m.apply(pool)
	m.startDocker()
	return m
}

// newMachines boots the hosts of a lab. They have busybox as an image archive at /root/busybox.tar.
func newMachines(t testing.TB, cfg lab.Config, caracal string) []*machine {
	t.Helper()
	testenv.NeedRoot(t)
	for program, debian := range map[string]string{"dockerd": "docker.io", "containerd": "containerd", "runc": "runc", "iptables": "iptables"} {
		testenv.NeedProgram(t, program, debian)
	}
	cfg.Caracal = caracal
	archive, err := os.ReadFile(image.Busybox(t, t.TempDir(), "busybox:latest"))
	must(t, err)
	l := lab.New(t, cfg)
	var all []*machine
	for _, h := range l.Hosts() {
		m := &machine{t: t, agent: []string{"caracald", "--docker", "caracal,calico"}, dock: []string{"dockerd"}}
		m.Machine, err = h.Boot(t.Context())
		must(t, err)
		m.sh("ln -s /root/caracal/caracald /root/caracal/caracalctl /usr/local/bin/")
		m.write("/root/busybox.tar", string(archive))
		all = append(all, m)
	}
	t.Cleanup(func() {
		for _, m := range all {
			if t.Failed() {
				m.dump()
			}
			m.endContainers()
		}
	})
	return all
}

// endContainers removes what Docker runs: control groups of containers that a power cut ends take a while to go.
func (m *machine) endContainers() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, _ = m.Sh(ctx, "docker rm -f $(docker ps -aq)") // none there, or no daemon
}

func (m *machine) dump() {
	for _, name := range []string{"caracald", "dockerd"} {
		text, err := os.ReadFile(m.Path("/var/log/" + name + ".log"))
		if err == nil {
			lines := slices.DeleteFunc(strings.Split(string(text), "\n"), func(l string) bool { return name == "dockerd" && strings.Contains(l, "level=info") })
			m.t.Logf("%s: the end of %s's log:\n%s", m.Name, name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
		}
	}
}

func (m *machine) startAgent() {
	m.t.Helper()
	must(m.t, m.StartDaemon("caracald", m.agent...))
	eventually(m.t, "caracald of "+m.Name+" answers", func() error {
		_, err := m.Sh(m.t.Context(), "caracalctl node status && test -S /run/docker/plugins/caracal.sock")
		return err
	})
}

func (m *machine) startDocker() {
	m.t.Helper()
	must(m.t, m.StartDaemon("dockerd", m.dock...))
	eventually(m.t, "dockerd of "+m.Name+" answers", func() error {
		_, err := m.Sh(m.t.Context(), "docker version")
		return err
	})
	m.sh("docker image inspect busybox >/dev/null 2>&1 || docker load -qi /root/busybox.tar")
}

// kill ends a daemon as a crash does.
func (m *machine) kill(name string) {
	m.t.Helper()
	must(m.t, m.Signal(m.t.Context(), name, unix.SIGKILL))
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	must(m.t, os.WriteFile(m.Path(path), []byte(text), 0o644))
}

func (m *machine) apply(manifest string) {
	m.t.Helper()
	m.write("/tmp/manifest.yaml", manifest)
	m.sh("caracalctl apply -f /tmp/manifest.yaml")
}

// sh runs a script that must succeed, and returns what it wrote.
func (m *machine) sh(script string) string {
	m.t.Helper()
	out, err := m.Sh(m.t.Context(), script)
	if err != nil {
		m.t.Fatal(err)
	}
	return strings.TrimRight(out, "\n")
}

// fails runs a script that must fail, and whose output must have all of these.
func (m *machine) fails(script string, want ...string) {
	m.t.Helper()
	out, err := m.Sh(m.t.Context(), script)
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		m.t.Errorf("%s: %s: %v; it is to fail; it wrote %s", m.Name, script, err, out)
		return
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			m.t.Errorf("%s: %s: no %q in %s", m.Name, script, w, out)
		}
	}
}

// has makes sure that a script succeeds and that its output has all of these.
func (m *machine) has(script string, want ...string) string {
	m.t.Helper()
	out := m.sh(script)
	for _, w := range want {
		if !strings.Contains(out, w) {
			m.t.Errorf("%s: %s: no %q in\n%s", m.Name, script, w, out)
		}
	}
	return out
}

// ping makes sure that something answers, or does not.
func (m *machine) ping(prefix, to string, answers bool) {
	m.t.Helper()
	script := strings.TrimSpace(prefix + " ping -c 1 -W 1 " + to)
	var last error
	for range 3 { // one packet may be lost on a busy machine; a dropped one never comes
		if _, last = m.Sh(m.t.Context(), script); answers == (last == nil) {
			return
		}
	}
	m.t.Errorf("%s: %s: %v; an answer: %v", m.Name, script, last, answers)
}

// address is that of a container on a network.
func (m *machine) address(container string) string {
	m.t.Helper()
	a := m.sh("docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}' " + container)
	return strings.Fields(a)[0]
}

// clean makes sure that nothing is left of containers.
func (m *machine) clean() {
	m.t.Helper()
	eventually(m.t, m.Name+" is clean", func() error {
		out, err := m.Sh(m.t.Context(), "ip -o link show group 202; caracalctl ipam check | grep -v '^nothing wrong: 0 endpoints, 0 addresses'; caracalctl pods | tail -n +2; docker ps -aq")
		if err == nil && out != "" {
			err = errors.New("left behind: " + out)
		}
		return err
	})
}

// remove removes networks. Docker may not have let go yet of containers that it has removed.
func (m *machine) remove(networks ...string) {
	m.t.Helper()
	for _, n := range networks {
		eventually(m.t, "network "+n+" is removed", func() error {
			_, err := m.Sh(m.t.Context(), "docker network rm "+n)
			return err
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is how long anything may take that is waited for: a slow dockerd on a busy machine is normal.
const patience = 90 * time.Second

// eventually waits until do succeeds.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, patience, what, fn)
}

// together does something on all machines at once.
func together(all []*machine, do func(m *machine)) {
	var wg sync.WaitGroup
	for _, m := range all {
		wg.Go(func() { do(m) })
	}
	wg.Wait()
}
