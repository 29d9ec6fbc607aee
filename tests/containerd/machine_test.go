// Package containerd tests Debian's containerd on simulated machines: its CRI, driven as a kubelet does, and nerdctl. Paths are
// the default ones; all that a user would have to write is in docs/containerd.md and docs/nerdctl.md, which are run here too.
//
//	     h1                         h2
//	containerd, caracald       containerd, caracald
//	 web   client               web   client
//	   |     |                    |     |
//	   +-----+------ switch ------+-----+------ outside
package containerd

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/caracal-net/caracal/tests/containerd/cri"
	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const (
	busybox = "docker.io/library/busybox:test"
	pause   = "docker.io/library/pause:test"
	socket  = "/run/containerd/containerd.sock"

	// Root of a virtual machine may lack CAP_SYS_RESOURCE, and can't lower the pause container's oom_score_adj then.
	config = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pause + `"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
`
	confFile = "/etc/cni/net.d/10-caracal.conflist"
)

// machine is one with containerd on it.
type machine struct {
	*lab.Machine
	t    testing.TB
	cri  *cri.Client
	uids int
}

// newMachine is a machine with a network of its own.
func newMachine(t testing.TB) *machine {
	t.Helper()
	m := boot(t, lab.Config{Hosts: 1, Outside: true})[0]
	m.install()
	return m
}

// boot boots the hosts of a lab and puts there what comes with the real machine's packages; nothing runs yet.
func boot(t testing.TB, cfg lab.Config) []*machine {
	t.Helper()
	testenv.NeedRoot(t)
	for program, debian := range map[string]string{"containerd": "containerd", "runc": "runc", "loopback": "containernetworking-plugins", "iptables": "iptables"} {
		testenv.NeedProgram(t, program, debian)
	}
	cfg.Caracal = testenv.Bin(t, "caracal")
	l := lab.New(t, cfg)
	var all []*machine
	for _, h := range l.Hosts() {
		m := &machine{t: t}
		var err error
		m.Machine, err = h.Boot(t.Context())
		must(t, err)
		t.Cleanup(m.disconnect) // before the lab goes down
		m.sh(`mkdir -p /opt/cni/bin /etc/containerd
			ln -s /usr/lib/cni/* /opt/cni/bin/
			ln -s /root/caracal/caracald /root/caracal/caracalctl /usr/local/bin/`)
		m.write("/etc/containerd/config.toml", config)
		all = append(all, m)
	}
	return all
}

// install installs the network, starts containerd and loads the images.
func (m *machine) install() {
	m.t.Helper()
	m.sh("caracalctl install")
	m.start()
	dir := m.t.TempDir()
	for _, archive := range []string{image.Busybox(m.t, dir, busybox), image.Pause(m.t, dir, pause)} {
		m.copy(archive, "/root/image.tar")
		m.sh("ctr -n k8s.io images import /root/image.tar && rm /root/image.tar")
	}
}

// start starts containerd, again after its end, and waits until its CRI answers.
func (m *machine) start() {
	m.t.Helper()
	must(m.t, m.StartDaemon("containerd", "containerd"))
	m.connect()
}

func (m *machine) connect() {
	m.t.Helper()
	m.disconnect()
	var err error
	m.cri, err = cri.Dial(m.Path(socket))
	must(m.t, err)
	eventually(m.t, "containerd of "+m.Name+" answers", func() error {
		_, err := m.cri.Pods(m.t.Context())
		return err
	})
}

func (m *machine) disconnect() {
	if m.cri != nil {
		_ = m.cri.Close()
		m.cri = nil
	}
}

// reboot cuts the machine's power and starts it and containerd again.
func (m *machine) reboot() {
	m.t.Helper()
	m.disconnect()
	var err error
	m.Machine, err = m.Reboot(m.t.Context())
	must(m.t, err)
	m.start()
}

// kill ends containerd as a crash does.
func (m *machine) kill() {
	m.t.Helper()
	must(m.t, m.Signal(m.t.Context(), "containerd", unix.SIGKILL))
}

// sh runs a script on the machine and returns its output.
func (m *machine) sh(script string) string {
	m.t.Helper()
	out, err := m.Sh(m.t.Context(), script)
	must(m.t, err)
	return strings.TrimSpace(out)
}

// write writes a file in the place where it belongs: containerd does not see one that comes from another directory.
func (m *machine) write(path, text string) {
	m.t.Helper()
	must(m.t, os.WriteFile(m.Path(path), []byte(text), 0o644))
}

// copy puts a program of the real machine onto this one, also over one that runs.
func (m *machine) copy(from, to string) {
	m.t.Helper()
	data, err := os.ReadFile(from)
	must(m.t, err)
	m.write(to+".new", string(data))
	m.sh("chmod +x " + to + ".new && mv " + to + ".new " + to)
}

// pod is a pod with one container that serves its own name on port 80.
type pod struct {
	m         *machine
	config    *v1.PodSandboxConfig
	id        string
	container string
	addr      netip.Addr
}

// option changes a pod before it is run.
type option func(*v1.PodSandboxConfig)

func annotation(key, value string) option {
	return func(c *v1.PodSandboxConfig) { c.Annotations[key] = value }
}

func published(host, container int32) option {
	return func(c *v1.PodSandboxConfig) {
		c.PortMappings = append(c.PortMappings, &v1.PortMapping{HostPort: host, ContainerPort: container})
	}
}

// config makes a pod's configuration. Two of one name are two pods to the runtime, as when a kubelet makes one anew.
func (m *machine) config(name string, options ...option) *v1.PodSandboxConfig {
	m.uids++
	c := cri.Pod("default", name, fmt.Sprintf("uid-%d", m.uids))
	for _, o := range options {
		o(c)
	}
	return c
}

// tries runs a pod that may fail.
func (m *machine) tries(name string, options ...option) (*pod, error) {
	p := &pod{m: m, config: m.config(name, options...)}
	var err error
	if p.id, err = m.cri.Run(m.t.Context(), p.config); err != nil {
		return nil, err
	}
	addrs, err := m.cri.Addresses(m.t.Context(), p.id)
	if err != nil {
		return nil, err
	}
	p.addr, err = netip.ParseAddr(addrs[0])
	return p, err
}

func (m *machine) run(name string, options ...option) *pod {
	m.t.Helper()
	p, err := m.tries(name, options...)
	must(m.t, err)
	p.container, err = m.cri.Start(m.t.Context(), p.id, p.config, &v1.ContainerConfig{
		Metadata: &v1.ContainerMetadata{Name: "main"}, Image: &v1.ImageSpec{Image: busybox},
		Command: []string{"sh", "-c", "mkdir -p /srv; echo " + name + " of " + m.Name + " >/srv/index.html; exec httpd -f -p 80 -h /srv"},
		Linux:   &v1.LinuxContainerConfig{SecurityContext: &v1.LinuxContainerSecurityContext{Capabilities: &v1.Capability{AddCapabilities: []string{"NET_RAW"}}}},
	})
	must(m.t, err)
	return p
}

// name is what the pod answers.
func (p *pod) name() string { return p.config.Metadata.Name + " of " + p.m.Name }

func (p *pod) exec(script string) (string, error) {
	out, err := p.m.cri.Exec(p.m.t.Context(), p.container, "sh", "-c", script)
	return strings.TrimSpace(out), err
}

func (p *pod) stop() {
	p.m.t.Helper()
	must(p.m.t, p.m.cri.Stop(p.m.t.Context(), p.id))
}

// remove stops the pod and removes it.
func (p *pod) remove() {
	p.m.t.Helper()
	p.stop()
	must(p.m.t, p.m.cri.Remove(p.m.t.Context(), p.id))
}

// netns is the path of the pod's network namespace on the machine.
func (p *pod) netns() string {
	p.m.t.Helper()
	for _, r := range p.m.recorded() {
		if r.ContainerID == p.id {
			return strings.TrimPrefix(r.Netns, "/var") // /var/run is a link to /run, which Path would look for outside
		}
	}
	p.m.t.Fatalf("caracalctl pods does not know %s", p.name())
	return ""
}

// inside is a pod that is told to do something without its runtime, by the machine's programs in the pod's network.
type inside struct{ *pod }

func (p inside) exec(script string) (string, error) {
	return p.m.Sh(p.m.t.Context(), "nsenter --net="+p.netns()+" sh -c "+quote(script))
}

// quote makes one word of the shell's of s.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// fetch asks for a page. Debian's wget of busybox-static does not work.
func fetch(to string, port int) string {
	return fmt.Sprintf(`printf 'GET / HTTP/1.0\r\n\r\n' | busybox nc -w 3 %s %d | tail -n 1`, to, port)
}

// reached makes sure that the pod answers at an address, when it is asked from places.
func (p *pod) reached(to string, port int, from ...any) {
	p.m.t.Helper()
	reached(p.m.t, p.name(), to, port, from...)
}

// asker is a pod or container that can be told to do something.
type asker interface {
	name() string
	exec(script string) (string, error)
}

// reached makes sure that who answers at an address, when it is asked from places: askers, machines or the outside.
func reached(t testing.TB, who, to string, port int, from ...any) {
	t.Helper()
	for _, f := range from {
		eventually(t, fmt.Sprintf("%s answers at %s port %d", who, to, port), func() error {
			var where, out string
			var err error
			switch f := f.(type) {
			case asker:
				where = f.name()
				out, err = f.exec(fetch(to, port))
			case *machine:
				where = f.Name
				out, err = f.Sh(t.Context(), fetch(to, port))
			case lab.Namespace:
				where = "outside"
				out, err = f.Exec(t.Context(), "sh", "-c", fetch(to, port))
			default:
				t.Fatalf("nothing asks from a %T", f)
			}
			if out = strings.TrimSpace(out); err == nil && out != who {
				err = fmt.Errorf("%q answers", out)
			}
			if err != nil {
				err = fmt.Errorf("from %s: %w", where, err)
			}
			return err
		})
	}
}

// plugin replaces the plugin by a script around it, which records the calls and has this done before and after the plugin itself
// is run by $PLUGIN.
func (m *machine) plugin(before, after string) {
	m.t.Helper()
	m.sh("rm -f /opt/cni/bin/caracal")
	m.write("/opt/cni/bin/caracal", `#!/bin/sh
in=$(cat)
printf '%s\t%s\t%s\t%s\t%s\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_NETNS" "$CNI_ARGS" "$in" >>/var/log/calls
`+before+`
printf %s "$in" | ${PLUGIN:-/root/caracal/caracal} >/run/answer.$$
rc=$?
`+after+`
cat /run/answer.$$
rm /run/answer.$$
exit $rc
`)
	m.sh("chmod +x /opt/cni/bin/caracal; rm -f /var/log/calls")
}

// unwrap puts the plugin back.
func (m *machine) unwrap() {
	m.t.Helper()
	m.sh("rm -f /opt/cni/bin/caracal && caracalctl install")
}

// call is one that the plugin got.
type call struct{ command, container, netns, args, stdin string }

// calls are those since plugin.
func (m *machine) calls() []call {
	m.t.Helper()
	var all []call
	for line := range strings.Lines(m.sh("cat /var/log/calls")) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 5)
		if len(f) != 5 {
			m.t.Fatalf("recorded call %q", line)
		}
		all = append(all, call{f[0], f[1], f[2], f[3], f[4]})
	}
	return all
}

// recorded is what caracalctl says of a pod.
type recorded struct {
	ContainerID   string   `json:"containerID"`
	PodName       string   `json:"podName"`
	Addresses     []string `json:"addresses"`
	MAC           string   `json:"mac"`
	HostInterface string   `json:"hostInterface"`
	State         string   `json:"state"`
	Shaped        bool     `json:"shaped"`
	Netns         string   `json:"netns"`
}

func (m *machine) recorded() []recorded {
	m.t.Helper()
	var all []recorded
	out := m.sh("caracalctl pods -o json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		m.t.Fatalf("caracalctl pods: %v\n%s", err, out)
	}
	return all
}

// traces are where a pod can be seen, and how; a script that prints nothing has seen none.
var traces = map[string]string{
	"records":    "caracalctl pods -o json | grep containerID || true",
	"addresses":  "caracalctl ipam show -o json | grep '\"used\": [1-9]' || true",
	"problems":   "caracalctl ipam check >/tmp/check 2>&1 || cat /tmp/check",
	"interfaces": "ip -o link | grep -o 'cali[0-9a-f]*' || true",
	"routes":     "ip route | grep cali || true",
	"dataplane":  "caracalctl routes -o json | grep local-pod || true",
	"pins":       "ls /sys/fs/bpf/caracal/links 2>/dev/null | grep cali || true",
	"namespaces": "ls /run/netns",
	"cache":      "ls /var/lib/cni/results 2>/dev/null || true",
	"ports":      "iptables -t nat -S | grep -- '-A CNI-DN' || true",
	"shaping":    "ip -o link show type ifb",
}

// left says what there is of pods on the machine, by the name of the trace.
func (m *machine) left() (map[string]string, error) {
	seen := make(map[string]string)
	for what, script := range traces {
		out, err := m.Sh(m.t.Context(), script)
		if err != nil {
			return nil, err
		}
		if out = strings.TrimSpace(out); out != "" {
			seen[what] = out
		}
	}
	return seen, nil
}

// clean makes sure that nothing of any pod is left, also not in containerd.
func (m *machine) clean() {
	m.t.Helper()
	eventually(m.t, "nothing is left on "+m.Name, func() error {
		pods, err := m.cri.Pods(m.t.Context())
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("pods %v", pods)
		}
		if err != nil {
			return err
		}
		seen, err := m.left()
		if err == nil && len(seen) > 0 {
			err = fmt.Errorf("%v", seen)
		}
		return err
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits for what may not hold yet.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, 30*time.Second, what, fn)
}
