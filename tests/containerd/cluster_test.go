package containerd

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// bootCluster boots two machines that share etcd.
func bootCluster(t testing.TB) []*machine {
	t.Helper()
	testenv.NeedProgram(t, "etcd", "etcd-server")
	all := boot(t, lab.Config{Hosts: 2, Outside: true, Cluster: true})
	l := all[0].Lab()
	must(t, l.StartEtcd(t.Context()))
	for _, m := range all {
		m.sh("mkdir -p /etc/caracal")
		m.write("/etc/caracal/caracalctl.cfg", "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec: {datastoreType: etcdv3, etcdEndpoints: '"+l.EtcdEndpoints()+"'}\n")
	}
	return all
}

// newCluster boots two machines, and installs the network and the agent on them.
func newCluster(t testing.TB) []*machine {
	t.Helper()
	all := bootCluster(t)
	for _, m := range all {
		m.install()
		must(t, m.agent())
	}
	for _, m := range all {
		m.ready()
	}
	return all
}

func (m *machine) agent() error { return m.StartDaemon("caracald", "caracald") }

// ready waits until the machine's agent has nothing to complain of, and knows the way to the other's pods.
func (m *machine) ready() {
	m.t.Helper()
	eventually(m.t, "the agent of "+m.Name+" is ready", func() error {
		out, err := m.Sh(m.t.Context(), "caracalctl node status -o json")
		if err != nil {
			return err
		}
		var s agent.Status
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return err
		}
		if !s.Ready || len(s.Problems) > 0 || len(s.Blocks) == 0 || s.Written == 0 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// TestTwoMachines: pods of two machines reach each other, and published ports from the other machine and its pods; containerd and
// the agent of one end and come back; one loses its power.
func TestTwoMachines(t *testing.T) {
	all := newCluster(t)
	h1, h2 := all[0], all[1]
	web := []*pod{h1.run("web", published(8080, 80)), h2.run("web", published(8080, 80))}
	client := []*pod{h1.run("client"), h2.run("client")}
	check := func() {
		t.Helper()
		for i, w := range web {
			w.reached(w.addr.String(), 80, client[0], client[1], h1, h2)
			w.reached(w.m.Addr().String(), 8080, client[0], client[1], h1, h2, h1.Lab().Outside(), web[1-i])
		}
	}
	check()
	h1.kill()
	h1.start()
	check()

	// The address may be asked for where its block is.
	fixed := web[0].addr.Next().Next().Next().Next()
	p := h1.run("fixed", annotation(wantIPs, fmt.Sprintf("[%q]", fixed)))
	p.reached(fixed.String(), 80, client[0], client[1])
	p.remove()
	if _, err := h2.tries("fixed", annotation(wantIPs, fmt.Sprintf("[%q]", fixed))); err == nil {
		t.Errorf("%s, of a block of h1, is given out on h2", fixed)
	} else {
		t.Log(err)
	}

	h1.reboot()
	must(t, h1.StartEtcdMember())
	must(t, h1.agent())
	h1.ready()
	web[0].remove()
	client[0].remove()
	web[0], client[0] = h1.run("web", published(8080, 80)), h1.run("client")
	check()
	for _, p := range append(web, client...) {
		p.remove()
	}
	h1.clean()
	h2.clean()
}
