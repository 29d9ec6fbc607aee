package containerd

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caracal-net/caracal/tests/testenv"
)

// TestBadInput: what can't be is said in the runtime's own error, leaves nothing behind, and the next try works.
func TestBadInput(t *testing.T) {
	m := newMachine(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"asked", testAskedTooMuch}, {"ports", testPortTaken}, {"plugins", testPluginMissing}, {"network", testNetworkMissing},
		{"two", testTwoNetworks}, {"answer", testKilledBeforeAnswer}, {"middle", testKilledInTheMiddle}, {"plugin", testPluginKilled},
	} {
		if !m.subtest(c.name, c.test) {
			return
		}
	}
}

// refused makes sure that a pod is not run, and that the runtime's error says why.
func (m *machine) refused(why, name string, options ...option) {
	m.t.Helper()
	if p, err := m.tries(name, options...); err == nil {
		p.remove()
		m.t.Errorf("%s is run; want: %s", name, why)
	} else if !strings.Contains(err.Error(), why) {
		m.t.Errorf("%v; want: %s", err, why)
	}
}

// removeAll removes all pods that the runtime knows, dead ones too, as a kubelet would.
func (m *machine) removeAll() {
	m.t.Helper()
	pods, err := m.cri.Pods(m.t.Context())
	must(m.t, err)
	for _, p := range pods {
		must(m.t, m.cri.Stop(m.t.Context(), p.Id))
		must(m.t, m.cri.Remove(m.t.Context(), p.Id))
	}
}

func (m *machine) works() {
	m.t.Helper()
	p := m.run("works")
	p.reached(p.addr.String(), 80, m)
	p.remove()
}

func testAskedTooMuch(t *testing.T, m *machine) {
	m.network(func(plugins []map[string]any) {
		plugins[0]["ipam"].(map[string]any)["reservations"] = []string{"10.244.9.0/24"}
	})
	holder := m.run("holder", annotation(wantIPs, `["10.244.7.7"]`))
	for ips, why := range map[string]string{
		`["10.244.7.7"]`:   "10.244.7.7: address is taken by caracal/" + holder.id + "/eth0",
		`["192.0.2.77"]`:   "192.0.2.77: address is in no pool; the pools are 10.244.0.0/16",
		`["10.244.9.77"]`:  "10.244.9.77: address is reserved",
		`10.244.7.8`:       `annotation cni.projectcalico.org/ipAddrs: "10.244.7.8" is not a JSON list of addresses`,
		`["10.244.7.8.9"]`: `annotation cni.projectcalico.org/ipAddrs: "10.244.7.8.9" is not an address`,
	} {
		m.refused(why, "asks", annotation(wantIPs, ips))
	}
	m.refused(`annotation cni.projectcalico.org/hwAddr: "01:00:5e:00:00:01" is not a unicast Ethernet address`, "asks", annotation(wantMAC, "01:00:5e:00:00:01"))
	if n := len(m.recorded()); n != 1 {
		t.Errorf("%d pods are recorded, want one: %+v", n, m.recorded())
	}
	holder.reached("10.244.7.7", 80, m)
	holder.remove()
	m.sh("caracalctl install")
	m.works()
}

// network changes the network in its place.
func (m *machine) network(change func(plugins []map[string]any)) {
	m.t.Helper()
	var list struct {
		CNIVersion string           `json:"cniVersion"`
		Name       string           `json:"name"`
		Plugins    []map[string]any `json:"plugins"`
	}
	text, err := os.ReadFile(m.Path(confFile))
	must(m.t, err)
	must(m.t, json.Unmarshal(text, &list))
	change(list.Plugins)
	text, err = json.Marshal(list)
	must(m.t, err)
	m.write(confFile, string(text))
	m.loaded(string(text))
}

// loaded waits until containerd has read a network of this text.
func (m *machine) loaded(text string) {
	m.t.Helper()
	var want, got any
	must(m.t, json.Unmarshal([]byte(text), &want))
	eventually(m.t, "containerd has read the network", func() error {
		r, err := m.cri.Status(m.t.Context(), &v1.StatusRequest{Verbose: true})
		if err != nil {
			return err
		}
		var info struct {
			Networks []struct{ Config struct{ Source string } }
		}
		if err := json.Unmarshal([]byte(r.Info["cniconfig"]), &info); err != nil {
			return err
		}
		source := info.Networks[len(info.Networks)-1].Config.Source
		if err := json.Unmarshal([]byte(source), &got); err == nil && fmt.Sprint(got) == fmt.Sprint(want) {
			return nil
		}
		return fmt.Errorf("it has %s", source)
	})
}

func testPortTaken(t *testing.T, m *machine) {
	first := m.run("first", published(8080, 80))
	m.refused("port 8080/tcp of this host is published by default/first already", "second", published(8080, 80))
	first.reached(m.Addr().String(), 8080, m.Lab().Outside())
	first.remove()
	second := m.run("second", published(8080, 80))
	second.reached(m.Addr().String(), 8080, m.Lab().Outside())
	second.remove()
}

// testPluginMissing: containerd keeps a pod that it could not set up wholly, and tears it down when it is told to and can.
func testPluginMissing(t *testing.T, m *machine) {
	for _, name := range []string{"loopback", "portmap", "bandwidth", "caracal"} {
		m.sh("mv /opt/cni/bin/" + name + " /opt/cni/" + name)
		m.refused(`failed to find plugin "`+name+`" in path [/opt/cni/bin]`, "web", published(8080, 80))
		m.sh("mv /opt/cni/" + name + " /opt/cni/bin/" + name)
		m.removeAll() // only now are the port's rules gone that portmap may have made
		p := m.run("web", published(8080, 80))
		p.reached(m.Addr().String(), 8080, m.Lab().Outside())
		p.remove()
		m.sh("rm -f /var/lib/cni/results/*") // libcni forgets an attachment only when it could remove all of it
		m.clean()
	}
}

func testNetworkMissing(t *testing.T, m *machine) {
	text, err := os.ReadFile(m.Path(confFile))
	must(t, err)
	for _, bad := range []string{"", `{"cniVersion": "1.0.0", "name": "caracal", "plugins": [`} {
		m.sh("rm -f " + confFile)
		if bad != "" {
			m.write(confFile, bad)
		}
		eventually(t, "containerd has noticed", func() error {
			if err := m.cri.NetworkReady(t.Context()); err == nil || !strings.Contains(err.Error(), "cni plugin not initialized") {
				return fmt.Errorf("it says %v", err)
			}
			return nil
		})
		m.refused("cni plugin not initialized", "web")
		m.sh("caracalctl install --force")
		m.loaded(string(text))
		m.removeAll()
		m.works()
	}
}

// testTwoNetworks: containerd uses the first by its file's name, for the DEL of pods that are in the other too.
func testTwoNetworks(t *testing.T, m *machine) {
	const other = `{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge", "bridge": "other0", "ipam":
		{"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24"}]]}}]}`
	before := m.run("before")
	m.write("/etc/cni/net.d/20-other.conflist", other)
	after := m.run("after") // the later file changes nothing
	after.reached(after.addr.String(), 80, before)
	m.sh("mv /etc/cni/net.d/20-other.conflist /etc/cni/net.d/05-other.conflist")
	m.loaded(other)
	if out := m.sh("caracalctl install"); !strings.Contains(out, `/etc/cni/net.d/05-other.conflist (network "other") is sorted before 10-caracal.conflist`) {
		t.Errorf("caracalctl install says nothing of the network before it: %s", out)
	}
	stray := m.run("stray")
	if !strings.HasPrefix(stray.addr.String(), "10.9.0.") {
		t.Errorf("a pod of the first network has %s", stray.addr)
	}
	stray.remove()
	before.remove() // its DEL goes to the other network; its namespace goes all the same
	m.sh("rm /etc/cni/net.d/05-other.conflist; ip link del other0")
	text, err := os.ReadFile(m.Path(confFile))
	must(t, err)
	m.loaded(string(text))
	after.remove()
	m.works() // with the next pod the one that vanished is forgotten
	m.sh("rm -f /var/lib/cni/results/caracal-" + before.id + "-eth0")
}

// hold has the plugin stop where it is until it is released; meanwhile runs a pod, waits until the plugin is there, and kills
// containerd.
const hold = `[ $CNI_COMMAND = ADD ] && { touch /run/held; while [ ! -e /run/go ]; do sleep 0.02; done; }`

func (m *machine) killedMeanwhile(name string, options ...option) {
	m.t.Helper()
	m.sh("rm -f /run/held /run/go")
	answered := make(chan error, 1)
	go func() {
		_, err := m.tries(name, options...)
		answered <- err
	}()
	eventually(m.t, "the plugin is at work", func() error {
		_, err := os.Stat(m.Path("/run/held"))
		return err
	})
	must(m.t, m.Signal(m.t.Context(), "containerd", unix.SIGKILL))
	if err := <-answered; err == nil {
		m.t.Error("a pod is run by a dead containerd")
	}
	m.sh("touch /run/go")
	eventually(m.t, "the plugin has ended", func() error {
		if out, err := m.Sh(m.t.Context(), "pgrep -f '[/]opt/cni/bin/caracal'"); err == nil {
			return fmt.Errorf("process %s", out)
		}
		return nil
	})
	m.start()
}

// testKilledBeforeAnswer: the pod is attached, and containerd, which knows nothing of it any more, is asked for it again.
func testKilledBeforeAnswer(t *testing.T, m *machine) {
	m.plugin("", hold)
	m.killedMeanwhile("web", published(8080, 80), annotation(wantIPs, `["10.244.7.7"]`))
	m.again(t)
}

// testKilledInTheMiddle: the plugin does its work when nobody wants it any more.
func testKilledInTheMiddle(t *testing.T, m *machine) {
	m.plugin(hold, "")
	m.killedMeanwhile("web", published(8080, 80), annotation(wantIPs, `["10.244.7.7"]`))
	m.again(t)
}

// again runs the pod that an earlier try has left half done.
func (m *machine) again(t *testing.T) {
	t.Helper()
	m.unwrap()
	half := m.recorded()
	if len(half) != 1 { // the plugin has done its work all the same
		t.Errorf("recorded: %+v", half)
	}
	p := m.run("web", published(8080, 80), annotation(wantIPs, `["10.244.7.7"]`))
	p.reached("10.244.7.7", 80, m)
	p.reached(m.Addr().String(), 8080, m.Lab().Outside())
	if now := m.recorded(); len(now) != 1 || now[0].ContainerID != p.id {
		t.Errorf("recorded: %+v", now)
	}
	m.removeAll()
	// What containerd 1.6 itself forgets when it is killed: the namespace of a pod that it had not begun to record.
	m.sh("for n in $(ls /run/netns); do ip netns del $n; done; rm -f /var/lib/cni/results/*")
}

// testPluginKilled: the plugin dies at a step; containerd calls DEL and says so.
func testPluginKilled(t *testing.T, m *machine) {
	m.copy(testenv.Faulty(t, "caracal"), "/root/faulty")
	for fault, why := range map[string]string{ // tests/cni has them all
		"veth:kill": `plugin type="caracal" failed (add)`, "answer:kill": `plugin type="caracal" failed (add)`, "commit:error": "fault injected at commit",
	} {
		m.plugin(`[ $CNI_COMMAND = ADD ] && { export CARACAL_FAULT=`+fault+`; PLUGIN=/root/faulty; }`, "")
		m.refused(why, "web", published(8080, 80))
		m.clean()
	}
	m.unwrap()
	m.works()
}
