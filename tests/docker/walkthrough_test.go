package docker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// newCluster boots three machines with an etcd member and dockerd on each. No agent runs, and the store is empty.
func newCluster(t testing.TB) []*machine {
	t.Helper()
	testenv.NeedProgram(t, "etcd", "etcd-server")
	all := newMachines(t, lab.Config{Hosts: 3, Outside: true}, testenv.Bin(t, "caracal"))
	var initial []string
	for _, m := range all {
		initial = append(initial, fmt.Sprintf("%s=http://%s:2380", m.Name, m.Addr()))
	}
	for _, m := range all {
		client, peer := fmt.Sprintf("http://%s:2379", m.Addr()), fmt.Sprintf("http://%s:2380", m.Addr())
		// libkv, by which Docker 20.10 shares networks, speaks etcd's version 2.
		must(t, m.StartDaemon("etcd", "etcd", "--enable-v2", "--name", m.Name, "--data-dir", "/var/lib/etcd",
			"--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
			"--initial-advertise-peer-urls", peer, "--initial-cluster", strings.Join(initial, ",")))
		m.dock = append(m.dock, "--cluster-store=etcd://"+m.Addr().String()+":2379", "--cluster-advertise="+m.Addr().String()+":2376")
	}
	for _, m := range all {
		eventually(t, "etcd of "+m.Name+" answers", func() error {
			_, err := m.Sh(t.Context(), "ETCD_ENDPOINTS=http://"+m.Addr().String()+":2379 caracalctl get nodes")
			return err
		})
	}
	together(all, (*machine).startDocker)
	return all
}

// TestWalkthrough is the session that Calico's users know, on three hosts.
func TestWalkthrough(t *testing.T) {
	all := newCluster(t)
	c := make(map[string]page.Shell)
	for i, m := range all {
		c[fmt.Sprintf("etcd%d", i+1)] = m.Sh
	}
	page.Run(t, "testdata/walkthrough.md", c)
	ids := make(map[string]bool)
	for _, m := range all {
		ids[m.sh("docker network inspect -f '{{.Id}}' calnet1")] = true
	}
	if len(ids) != 1 || !ids[all[0].sh("cat /root/calnet1")] {
		t.Errorf("the network's ids on the hosts are %v; create printed %s", ids, all[0].sh("cat /root/calnet1"))
	}
	together(all, func(m *machine) { m.sh("docker rm -f $(docker ps -aq)") })
	all[2].sh("docker network rm calnet1") // it was made on another
	for _, m := range all {
		m.clean()
		eventually(t, "calnet1 is gone", func() error {
			_, err := m.Sh(t.Context(), "! docker network inspect calnet1 >/dev/null 2>&1 && ! caracalctl -c /etc/calico/calicoctl.cfg get profiles | grep docker")
			return err
		})
	}
}

// TestPage runs docs/docker.md: h1 is alone, h2 and h3 share a store.
func TestPage(t *testing.T) {
	t.Parallel()
	all := newMachines(t, lab.Config{Hosts: 3, Outside: true}, testenv.Bin(t, "caracal"))
	shared(t, all[1:], "10.244.0.0/16")
	together(all, (*machine).startDocker)
	page.Run(t, "../../docs/docker.md", map[string]page.Shell{"h1": all[0].Sh, "h2": all[1].Sh, "h3": all[2].Sh})
	for _, m := range all {
		m.clean()
	}
}

// shared starts etcd on the first of the machines and gives all its address, as their agents and caracalctl read it, and a pool.
func shared(t *testing.T, all []*machine, cidr string) {
	t.Helper()
	testenv.NeedProgram(t, "etcd", "etcd-server")
	url := fmt.Sprintf("http://%s:2379", all[0].Addr())
	must(t, all[0].StartDaemon("etcd", "etcd", "--data-dir", "/var/lib/etcd", "--listen-client-urls", url, "--advertise-client-urls", url))
	for _, m := range all {
		m.sh("mkdir /etc/calico")
		m.write("/etc/calico/calicoctl.cfg", "apiVersion: v1\nkind: calicoApiConfig\nmetadata:\nspec:\n  datastoreType: etcdv3\n  etcdEndpoints: "+url+"\n")
		m.agent = append(m.agent, "-c", "/etc/calico/calicoctl.cfg")
	}
	eventually(t, "etcd answers", func() error {
		_, err := all[0].Sh(t.Context(), "caracalctl get nodes")
		return err
	})
	all[0].apply(strings.Replace(pool, "192.168.0.0/16", cidr, 1))
}
