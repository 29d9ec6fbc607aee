package docker

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// held waits until a machine's containers hold so many addresses, and nothing else does.
func (m *machine) held(want int) {
	m.t.Helper()
	eventually(m.t, fmt.Sprintf("%s: %d addresses are held", m.Name, want), func() error {
		out, err := m.Sh(m.t.Context(), "caracalctl ipam check -o json | grep -o '\"addresses\": *[0-9]*'; caracalctl pods | tail -n +2 | wc -l; ip -o link show group 202 | wc -l")
		got := strings.Fields(out)
		if err == nil && (len(got) != 4 || got[1] != fmt.Sprint(want) || got[2] != got[1] || got[3] != got[1]) {
			err = errors.New(out)
		}
		return err
	})
}

// TestCrashes ends the agent at every step of docker run, ends dockerd with its containers, and the machine.
func TestCrashes(t *testing.T) {
	t.Parallel()
	m := newMachines(t, lab.Config{Hosts: 1, Outside: true}, testenv.Faulty(t, "caracal"))[0]
	m.startAgent()
	m.apply(pool)
	m.startDocker()
	m.sh(create + "net1")
	m.sh(busy("--name keep --restart always --net net1"))

	// At each step the agent dies of what it is asked, and is started again; it replaces the sockets that the first one left.
	healthy := m.agent
	for i, step := range []string{"docker-requested", "docker-created", "veth", "attach", "policy", "answer"} {
		m.kill("caracald")
		m.agent = append([]string{"env", "CARACAL_FAULT=" + step + ":kill"}, healthy...)
		m.startAgent()
		name := fmt.Sprintf("step%d", i)
		started := make(chan error, 1)
		go func() {
			_, err := m.Sh(t.Context(), busy("--name "+name+" --net net1"))
			started <- err
		}()
		eventually(t, "the agent is dead", func() error {
			_, err := m.Sh(t.Context(), "! caracalctl node status")
			return err
		})
		m.agent = healthy
		m.startAgent()
		if err := <-started; err == nil {
			t.Errorf("the agent dies at %s, and docker run succeeds", step)
		}
		m.sh("docker rm -f " + name)
		m.sh(busy("--name " + name + " --net net1"))
		m.ping("docker exec "+name, "keep", true)
		m.sh("docker rm -f " + name)
	}

	// dockerd is killed, and its containers with it: nobody says that their addresses are free, until it is back.
	m.sh(busy("--name ann --restart always --net net1") + ";" + busy("--name bob --net net1"))
	m.kill("dockerd")
	m.sh("pkill -9 -x containerd-shim; pkill -9 -x containerd; pkill -9 -x sleep; true")
	m.startDocker()
	eventually(t, "ann is up again", func() error {
		_, err := m.Sh(t.Context(), "docker exec ann ping -c 1 -W 1 192.0.2.1")
		return err
	})
	m.held(2) // and what was requested and not used is free again

	// With --live-restore they live on.
	m.sh("docker rm -f ann bob keep")
	m.kill("dockerd")
	m.dock = append(m.dock, "--live-restore")
	m.startDocker()
	m.sh(busy("--name ann --net net1") + ";" + busy("--name bob --net net1"))
	before := m.address("ann")
	m.kill("dockerd")
	m.startDocker()
	if after := m.address("ann"); after != before {
		t.Errorf("a's address was %s and is %s", before, after)
	}
	m.ping("docker exec bob", "ann", true)
	m.held(2)
	m.sh("docker restart -t 0 bob")
	m.ping("docker exec bob", "ann", true)

	// The machine loses its power.
	m.sh("docker update --restart always ann")
	var err error
	m.Machine, err = m.Reboot(t.Context())
	must(t, err)
	m.startAgent()
	m.startDocker()
	eventually(t, "a is up again", func() error {
		_, err := m.Sh(t.Context(), "docker exec ann ping -c 1 -W 1 192.0.2.1")
		return err
	})
	m.sh("docker start bob")
	m.ping("docker exec bob", "ann", true)
	m.held(2)
	m.sh("docker rm -f ann bob")
	m.remove("net1")
	m.clean()
}

// TestSharedLocal: two daemons know nothing of each other, as Docker does since 23.0. Networks that name the same network are one.
func TestSharedLocal(t *testing.T) {
	t.Parallel()
	all := newMachines(t, lab.Config{Hosts: 2, Outside: true}, testenv.Bin(t, "caracal"))
	shared(t, all, "192.168.0.0/16")
	together(all, func(m *machine) {
		m.startAgent()
		m.startDocker()
		m.sh(create + "-o com.caracal.network=shop shop && " + create + "alone")
		m.sh(busy("--name in-"+m.Name+" --net shop") + ";" + busy("--name out-"+m.Name+" --net alone"))
	})
	shop, alone := all[1].address("in-h2"), all[1].address("out-h2")
	all[0].ping("docker exec in-h1", shop, true)
	all[0].ping("docker exec out-h1", shop, false)
	all[0].ping("docker exec in-h1", alone, false)
	all[0].ping("docker exec out-h1", alone, false) // of the same name, and not the same
	all[0].ping("", shop, false)
	all[1].has("caracalctl why 192.0.2.1 in-h2/icmp", "in-h2 is on the Docker network shop")
	together(all, func(m *machine) {
		m.sh("docker rm -f $(docker ps -aq)")
		m.remove("shop", "alone")
		m.clean()
	})
}
