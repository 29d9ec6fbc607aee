package podman

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// The image of all containers here, and that of a pod's own: busybox.tar and pause.tar of root's home.
const busybox, pause = "localhost/busybox:1", "localhost/pause:1"

// deadline bounds the wait for one condition.
const deadline = 20 * time.Second

// machine is a simulated machine with podman in its default places.
type machine struct {
	*lab.Machine
	t testing.TB
}

// vendorConf takes the place of the distribution's containers.conf, so that /etc/containers/containers.conf is what a user writes.
// A simulated machine has no systemd, and nobody here may raise a limit (CAP_SYS_RESOURCE), as podman's defaults do.
const vendorConf = `[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
`

// userConf is what docs/podman.md has a user write.
const userConf = `[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
default_network = "caracal"
`

// newMachines starts machines with podman and its image. Nothing of the network is configured.
func newMachines(t *testing.T, n int) []*machine {
	t.Helper()
	testenv.NeedRoot(t)
	for program, pkg := range map[string]string{"podman": "podman", "runc": "runc", "conmon": "conmon", "curl": "curl", "portmap": "containernetworking-plugins"} {
		testenv.NeedProgram(t, program, pkg)
	}
	l := lab.New(t, lab.Config{Hosts: n, Outside: true, Caracal: testenv.Bin(t, "caracal")})
	var all []*machine
	for _, h := range l.Hosts() {
		booted, err := h.Boot(t.Context())
		must(t, err)
		m := &machine{booted, t}
		must(t, os.WriteFile(m.Path("/root/vendor.conf"), []byte(vendorConf), 0o644))
		must(t, os.Rename(image.Busybox(t, m.Path("/root"), busybox), m.Path("/root/busybox.tar")))
		must(t, os.Rename(image.Pause(t, m.Path("/root"), pause), m.Path("/root/pause.tar")))
		m.started()
		all = append(all, m)
	}
	return all
}

// started does what must be done after every start of the machine.
func (m *machine) started() {
	m.t.Helper()
	m.sh("mount --bind /root/vendor.conf /usr/share/containers/containers.conf")
}

// reboot cuts the power and starts the machine again.
func (m *machine) reboot() {
	m.t.Helper()
	booted, err := m.Reboot(m.t.Context())
	must(m.t, err)
	m.Machine = booted
	m.started()
}

// shell is Sh of the machine, also after it was started anew, and "reboot" starts it anew.
func (m *machine) shell(ctx context.Context, script string) (string, error) {
	if script == "reboot" {
		m.reboot()
		return "", nil
	}
	return m.Sh(ctx, script)
}

// startStore starts etcd for all machines on this one.
func (m *machine) startStore() {
	m.t.Helper()
	url := fmt.Sprintf("http://%s:2379", m.Addr())
	must(m.t, m.StartDaemon("etcd", "etcd", "--data-dir", "/var/lib/etcd", "--listen-client-urls", url, "--advertise-client-urls", url, "--log-level", "warn"))
	m.until("etcd answers", "curl -sSf -m 1 "+url+"/health")
}

// newCluster starts machines that share etcd, on each of which everything is installed as docs/podman.md says, and an agent runs.
func newCluster(t *testing.T, n int) []*machine {
	t.Helper()
	all := newMachines(t, n)
	all[0].startStore()
	for _, m := range all {
		m.write("/etc/containers/containers.conf", userConf)
		m.sh("mkdir -p /opt/cni/bin && cp /usr/lib/cni/portmap /usr/lib/cni/bandwidth /opt/cni/bin")
		m.write("/etc/caracal/caracalctl.cfg", fmt.Sprintf("apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nspec: {datastoreType: etcdv3, etcdEndpoints: 'http://%s:2379'}\n", all[0].Addr()))
		m.sh("caracal/caracalctl install --agent && caracalctl node run")
		m.sh("podman load -q -i busybox.tar; podman load -q -i pause.tar")
	}
	return all
}

func (m *machine) write(path, text string) {
	m.t.Helper()
	must(m.t, os.MkdirAll(m.Path(filepath.Dir(path)), 0o755))
	must(m.t, os.WriteFile(m.Path(path), []byte(text), 0o644))
}

// try runs a script on the machine.
func (m *machine) try(script string) (string, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	out, err := m.Sh(ctx, script)
	return strings.TrimSpace(out), err
}

// sh is try for what must succeed.
func (m *machine) sh(script string) string {
	m.t.Helper()
	out, err := m.try(script)
	must(m.t, err)
	return out
}

// fails runs a script that must not succeed and say all of words.
func (m *machine) fails(script string, words ...string) {
	m.t.Helper()
	out, err := m.try(script)
	if err == nil {
		m.t.Errorf("%s# %s: succeeded: %s", m.Name, script, out)
	}
	for _, w := range words {
		if !strings.Contains(out, w) {
			m.t.Errorf("%s# %s: %s\nsays nothing of %q", m.Name, script, out, w)
		}
	}
}

// until repeats a script until it succeeds.
func (m *machine) until(what, script string) {
	m.t.Helper()
	eventually(m.t, what, func() error {
		_, err := m.try(script)
		return err
	})
}

// serve starts a container with a web server that says who it is. flags are of podman run.
func (m *machine) serve(name, flags string) {
	m.t.Helper()
	m.sh(fmt.Sprintf("podman run -d --name %s --stop-timeout 0 %s %s sh -c 'echo %s >/srv/index.html; exec httpd -f -p 80 -h /srv'", name, flags, busybox, m.says(name)))
}

// says is what the web server of a container says.
func (m *machine) says(name string) string { return name + " on " + m.Name }

// address is a container's.
func (m *machine) address(name string) string {
	m.t.Helper()
	return m.sh("podman inspect " + name + " --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}'")
}

// server is a web server at ADDRESS:PORT and what it says.
type server struct{ at, says string }

// gets waits until web servers give their answers to the machine, or to a container of it if one is named.
func (m *machine) gets(container string, from ...server) {
	m.t.Helper()
	var at, want []string
	for _, s := range from {
		at, want = append(at, s.at), append(want, s.says)
	}
	ask := "for at in " + strings.Join(at, " ") + "; do curl -sS -m 2 http://$at/; done"
	if container != "" { // not wget: that of some static busybox crashes
		ask = "for at in " + strings.Join(at, " ") + `; do printf "GET / HTTP/1.0\r\n\r\n" | nc -w 2 ${at%:*} ${at#*:} | tail -n 1; done`
		ask = "podman exec " + container + " sh -c '" + ask + "'"
	}
	eventually(m.t, fmt.Sprintf("%s %s gets %s", m.Name, container, at), func() error {
		out, err := m.try(ask)
		if err == nil && out != strings.Join(want, "\n") {
			err = fmt.Errorf("answers %q, want %q", out, want)
		}
		return err
	})
}

type pod struct {
	Name          string   `json:"podName"`
	Namespace     string   `json:"podNamespace"`
	ContainerID   string   `json:"containerID"`
	Network       string   `json:"network"`
	Interface     string   `json:"interface"`
	Addresses     []string `json:"addresses"`
	HostInterface string   `json:"hostInterface"`
}

// pods are those of the machine by their names, as caracalctl tells.
func (m *machine) pods() map[string]pod {
	m.t.Helper()
	out := m.sh("caracalctl pods -o json 2>/dev/null") // a pod that comes or goes is warned of
	var list []pod
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		m.t.Fatalf("caracalctl pods -o json: %v\n%s", err, out)
	}
	all := make(map[string]pod)
	for _, p := range list {
		all[p.Name] = p
	}
	return all
}

// leftovers prints what is left of containers: in Caracal's books, in those of other plugins, in libcni's cache, of podman, and on
// the machine. cni0 is what the bridge plugin leaves.
const leftovers = `
if command -v caracalctl >/dev/null; then
	caracalctl pods -o json | grep podName
	caracalctl ipam check | grep -v "nothing wrong"
	caracalctl get wep -A -o json 2>/dev/null | grep "\"node\": \"$(hostname)\""
fi
ls -d /var/lib/cni/networks/*/10.* /var/lib/cni/results/* /run/netns/netns-* 2>/dev/null
ip -br link | grep -v -e '^lo ' -e '^eth0@' -e '^cni0 '
iptables-save | grep CNI-DN
podman ps -aq
pgrep -l conmon
true`

// clean removes all containers and makes sure that nothing of them is left.
func (m *machine) clean() {
	m.t.Helper()
	m.sh("podman pod rm -fa -t 0; podman rm -fa -t 0")
	eventually(m.t, "nothing is left on "+m.Name, func() error {
		if left := m.sh(leftovers); left != "" {
			return errors.New(left)
		}
		return nil
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually repeats check until it succeeds or the deadline has passed.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, deadline, what, fn)
}
