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

	// At each step the agent dies of what it is asked. The socket that it leaves is replaced.
	healthy := m.agent
	for _, step := range []string{"docker-requested", "docker-created", "veth", "attach", "policy", "answer"} {
		m.kill("caracald")
		m.agent = append([]string{"env", "CARACAL_FAULT=" + step + ":kill"}, healthy...)
		m.startAgent()
		m.fails(busy("--name xx --net net1"), "docker: Error response from daemon")
		m.agent = healthy
		m.startAgent()
		m.sh("docker rm -f xx")
		m.ping("docker exec keep", "192.0.2.1", true)
	}
	m.sh(busy("--name bob --net net1"))
	m.ping("docker exec bob", "keep", true)
	m.sh("docker rm -f bob")
	m.held(1)

	// Without an agent containers run on, and Docker says what is wrong.
	m.kill("caracald")
	m.ping("docker exec keep", "192.0.2.1", true)
	m.fails(busy("--name bob --net net1"), "caracal")
	m.sh("docker rm -f b; docker rm -f keep || true") // nobody takes its address back
	m.startAgent()
	m.held(0)

	// dockerd is killed, and its containers with it.
	m.sh(busy("--name ann --restart always --net net1") + ";" + busy("--name bob --net net1"))
	m.kill("dockerd")
	m.sh("pkill -9 -x containerd-shim || pkill -9 -f containerd-shim-runc; pkill -9 -x containerd; pkill -9 -x sleep; true")
	m.startDocker()
	eventually(t, "a is up again", func() error {
		_, err := m.Sh(t.Context(), "docker exec ann ping -c 1 -W 1 192.0.2.1")
		return err
	})
	m.held(1)

	// With --live-restore they live on.
	m.sh("docker rm -f ann bob")
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
	testenv.NeedProgram(t, "etcd", "etcd-server")
	all := newMachines(t, lab.Config{Hosts: 2, Outside: true}, testenv.Bin(t, "caracal"))
	must(t, all[0].StartDaemon("etcd", "etcd", "--data-dir", "/var/lib/etcd", "--listen-client-urls", "http://192.0.2.1:2379", "--advertise-client-urls", "http://192.0.2.1:2379"))
	for _, m := range all {
		m.write("/etc/environment.caracal", "")
		m.sh("mkdir -p /etc/calico; printf 'apiVersion: v1\\nkind: calicoApiConfig\\nmetadata:\\nspec:\\n  datastoreType: etcdv3\\n  etcdEndpoints: http://192.0.2.1:2379\\n' >/etc/calico/calicoctl.cfg")
		m.agent = append(m.agent, "-c", "/etc/calico/calicoctl.cfg")
	}
	eventually(t, "etcd answers", func() error {
		_, err := all[0].Sh(t.Context(), "caracalctl get nodes")
		return err
	})
	all[0].apply(pool)
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
