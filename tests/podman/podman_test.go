// Package podman runs containers with podman (CNI backend) on our configuration list.
package podman

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/image"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// Two containers of a real runtime on one simulated host:
//
//	  container "web"            container "client"
//	  httpd, says "web ..."      httpd, says "client ..."
//	     | eth0                     | eth0
//	     |                          |
//	+----+--------------------------+----+
//	|  what the plugin under test makes  |  <lab>-h1: podman, conmon and the plugin run in it
//	+------------------------------------+

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

const busybox = "localhost/caracal-busybox:test"

// deadline bounds the wait for one condition.
const deadline = 10 * time.Second

// plugin is what the containers' network is made of.
type plugin struct {
	config lab.Config
	// addresses lists those in use, as the plugin's own books say.
	addresses func(t *testing.T, h *lab.Host) []string
	// extra are checks with both containers running.
	extra func(t *testing.T, p *podman)
}

// Debian's bridge is the stand-in that proves the test itself: it must pass with a plugin known to be good.
func TestBridge(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedProgram(t, "bridge", "containernetworking-plugins")
	testRuntime(t, plugin{
		config: lab.Config{Conflist: `{"cniVersion":"1.0.0","name":"{{.Network}}","plugins":[{
			"type":"bridge","bridge":"cni0","isGateway":true,"capabilities":{"ips":true},
			"ipam":{"type":"host-local","dataDir":"{{.StateDir}}","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`},
		addresses: func(t *testing.T, h *lab.Host) []string {
			files, err := filepath.Glob(filepath.Join(h.StateDir(), h.Lab().Network(), "10.*"))
			if err != nil {
				t.Fatal(err)
			}
			var addrs []string
			for _, f := range files {
				addrs = append(addrs, filepath.Base(f))
			}
			return addrs
		},
	})
}

func TestCaracal(t *testing.T) {
	testenv.NeedRoot(t)
	caracal := testenv.Bin(t, "caracal")
	testRuntime(t, plugin{
		config: lab.Config{Caracal: caracal, CNIVersion: "1.0.0",
			Plugin: map[string]any{"capabilities": map[string]bool{"ips": true}}},
		addresses: func(t *testing.T, h *lab.Host) []string {
			var addrs []string
			for _, p := range caracalPods(t, h) {
				addrs = append(addrs, p.Addresses...)
			}
			return addrs
		},
		extra: func(t *testing.T, p *podman) {
			pods := caracalPods(t, p.host)
			for _, name := range []string{"web", "client"} {
				id, addr := p.inspect(name, "{{.Id}}"), p.address(name)
				i := slices.IndexFunc(pods, func(c caracalPod) bool { return c.ContainerID == id })
				if i < 0 {
					t.Errorf("caracalctl pods does not show %s (%s): %v", name, id, pods)
					continue
				}
				if !slices.ContainsFunc(pods[i].Addresses, func(a string) bool { return bare(a) == addr }) {
					t.Errorf("caracalctl pods: %s has addresses %v, podman says %s", name, pods[i].Addresses, addr)
				}
				if _, err := p.host.Exec(t.Context(), "ip", "link", "show", "dev", pods[i].HostInterface); err != nil {
					t.Errorf("caracalctl pods: %s has host interface %q: %v", name, pods[i].HostInterface, err)
				}
			}
			if len(pods) != 2 {
				t.Errorf("caracalctl pods shows %d pods, want 2: %v", len(pods), pods)
			}
		},
	})
}

type caracalPod struct {
	ContainerID   string   `json:"containerID"`
	Addresses     []string `json:"addresses"`
	HostInterface string   `json:"hostInterface"`
}

func caracalPods(t *testing.T, h *lab.Host) []caracalPod {
	t.Helper()
	out, err := h.Exec(t.Context(), "caracalctl", "pods", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var pods []caracalPod
	if err := json.Unmarshal([]byte(out), &pods); err != nil {
		t.Fatalf("caracalctl pods -o json: %v\n%s", err, out)
	}
	return pods
}

// bare cuts off a prefix length.
func bare(addr string) string {
	a, _, _ := strings.Cut(addr, "/")
	return a
}

func testRuntime(t *testing.T, under plugin) {
	p := newPodman(t, under.config)
	linksBefore := p.links()

	p.serve("web")
	p.serve("client")
	web, client := p.address("web"), p.address("client")
	if web == client {
		t.Fatalf("both containers have address %s", web)
	}
	p.reaches("client", "web")
	p.reaches("web", "client")
	if under.extra != nil {
		under.extra(t, p)
	}

	// A restart is DEL and ADD with a new namespace.
	sandbox := p.inspect("web", "{{.NetworkSettings.SandboxKey}}")
	p.run("restart", "-t", "0", "web")
	if now := p.inspect("web", "{{.NetworkSettings.SandboxKey}}"); now == sandbox {
		t.Errorf("restarted container is in the same namespace %s", now)
	}
	p.reaches("client", "web")
	p.reaches("web", "client")
	if n := len(p.inUse(under)); n != 2 {
		t.Errorf("%d IPv4 addresses in use by two containers after a restart: %v", n, p.inUse(under))
	}

	// The same requested address twice: the second time proves that it was given back.
	want := netip.MustParseAddr("10.244.0.50")
	for range 2 {
		out := p.run("run", "--rm", "--network", p.network, "--ip", want.String(), busybox, "ip", "-4", "-o", "addr", "show", "dev", "eth0")
		if !strings.Contains(out, " "+want.String()+"/") {
			t.Errorf("run --ip %s gives %q", want, out)
		}
	}
	// A container that ends by itself is cleaned up by conmon's call of podman, in an environment of its own.
	p.run("run", "-d", "--name", "brief", "--network", p.network, busybox, "true")
	p.waitFor("the address of an ended container to be given back", func() error {
		if used := p.inUse(under); len(used) != 2 {
			return fmt.Errorf("in use: %v", used)
		}
		return nil
	})

	// An address in use is refused, and its owner keeps working.
	if out, err := p.try("run", "--rm", "--network", p.network, "--ip", p.address("web"), busybox, "true"); err == nil {
		t.Errorf("run --ip with the address of a running container succeeded: %s", out)
	}
	p.reaches("client", "web")

	sandboxes := []string{p.inspect("web", "{{.NetworkSettings.SandboxKey}}"), p.inspect("client", "{{.NetworkSettings.SandboxKey}}")}
	p.run("rm", "-f", "-t", "0", "web", "client", "brief")
	if used := under.addresses(t, p.host); len(used) != 0 {
		t.Errorf("addresses not given back: %v", used)
	}
	for _, s := range sandboxes {
		if _, err := os.Lstat(s); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("namespace left: %s (%v)", s, err)
		}
	}
	if after := p.links(); !slices.Equal(linksBefore, after) {
		t.Errorf("links of the host, before: %v, after: %v", linksBefore, after)
	}
	if cached, _ := filepath.Glob("/var/lib/cni/results/" + p.network + "-*"); len(cached) != 0 {
		t.Errorf("left in libcni's cache: %v", cached)
	}
	p.waitFor("end of conmon", func() error {
		if procs := p.host.Namespace().Processes(); len(procs) != 0 {
			return fmt.Errorf("still there: %v", procs)
		}
		return nil
	})
}

// podman is one installation with a graph root of its own, running in a simulated host.
type podman struct {
	t       *testing.T
	host    *lab.Host
	network string
	program string
	env     []string
}

func newPodman(t *testing.T, cfg lab.Config) *podman {
	t.Helper()
	program := testenv.NeedProgram(t, "podman", "podman")
	runc := testenv.NeedProgram(t, "runc", "runc")
	testenv.NeedProgram(t, "conmon", "conmon")
	forgetBlobCache(t)

	l := lab.New(t, cfg)
	h := l.Host(1)
	dir := filepath.Join(h.Dir(), "podman")
	for _, d := range []string{dir, filepath.Join(dir, "tmp")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p := &podman{t: t, host: h, network: l.Network(), program: program, env: append(os.Environ(),
		"CONTAINERS_CONF="+filepath.Join(dir, "containers.conf"),
		"CONTAINERS_STORAGE_CONF="+filepath.Join(dir, "storage.conf"),
		"TMPDIR="+filepath.Join(dir, "tmp"))}
	files := map[string]string{
		"containers.conf": fmt.Sprintf(`
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"          # the default is one piece of shared memory for the whole machine
runtime = "runc"
static_dir = "%[1]s/graph/libpod"   # its default place: the clean-up after a container looks nowhere else
tmp_dir = "%[1]s/tmp"
volume_path = "%[1]s/volumes"
[engine.runtimes]
runc = ["%[4]s"]
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=4096:4096"]   # the defaults need CAP_SYS_RESOURCE
log_driver = "k8s-file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["%[2]s"]
network_config_dir = "%[5]s"
default_network = "%[3]s"
`, dir, strings.Join(h.CNIPath(), `", "`), p.network, runc, h.ConfDir()),
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = \"%[1]s/graph\"\nrunroot = \"%[1]s/run\"\n", dir),
		"policy.json":  `{"default":[{"type":"insecureAcceptAnything"}]}`,
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // before the lab goes down
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if out, err := p.command(ctx, "rm", "-fa", "-t", "0"); err != nil {
			t.Errorf("podman rm -fa: %v\n%s", err, out)
		}
	})
	p.run("load", "--signature-policy", filepath.Join(dir, "policy.json"), "-i", image.Busybox(t, dir, busybox))
	// A plugin whose VERSION fails makes podman use a bridge of its own invention under the same name.
	var networks []struct {
		Plugins []struct{ Network struct{ Type string } }
	}
	if out := p.run("network", "inspect", p.network); json.Unmarshal([]byte(out), &networks) != nil || len(networks) != 1 {
		t.Fatalf("podman does not know the network: %s", out)
	}
	return p
}

// forgetBlobCache removes, at the end of the test, the one file that podman keeps outside its graph root whatever its
// configuration, if it was not there before.
func forgetBlobCache(t *testing.T) {
	path := "/var/lib/containers/cache/blob-info-cache-v1.boltdb"
	if _, err := os.Lstat(path); err == nil {
		return
	}
	t.Cleanup(func() {
		for ; path != "/var/lib"; path = filepath.Dir(path) {
			if os.Remove(path) != nil { // not empty: someone else's
				return
			}
		}
	})
}

func (p *podman) command(ctx context.Context, arg ...string) (string, error) {
	cmd := exec.CommandContext(ctx, p.program, arg...)
	cmd.Env, cmd.WaitDelay = p.env, time.Second
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := p.host.Namespace().Run(cmd); err != nil {
		return out.String(), fmt.Errorf("podman %s: %w: %s", strings.Join(arg, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

func (p *podman) try(arg ...string) (string, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), 30*time.Second)
	defer cancel()
	return p.command(ctx, arg...)
}

func (p *podman) run(arg ...string) string {
	p.t.Helper()
	out, err := p.try(arg...)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

func (p *podman) inspect(container, format string) string {
	p.t.Helper()
	return strings.TrimSpace(p.run("inspect", "--format", format, container))
}

func (p *podman) address(container string) string {
	p.t.Helper()
	a := p.inspect(container, `{{(index .NetworkSettings.Networks "`+p.network+`").IPAddress}}`)
	if _, err := netip.ParseAddr(a); err != nil {
		p.t.Fatalf("address of %s: %v", container, err)
	}
	return a
}

// inUse are the IPv4 addresses in the plugin's books.
func (p *podman) inUse(under plugin) []string {
	var out []string
	for _, a := range under.addresses(p.t, p.host) {
		if !strings.Contains(a, ":") {
			out = append(out, a)
		}
	}
	return out
}

// serve runs a container with a web server that says who it is.
func (p *podman) serve(name string) {
	p.t.Helper()
	p.run("run", "-d", "--name", name, "--network", p.network, busybox, "sh", "-c",
		fmt.Sprintf("echo '%s' >/srv/index.html; exec httpd -f -p 80 -h /srv", p.payload(name)))
}

func (p *podman) payload(name string) string { return name + " of " + p.network }

// reaches waits until to answers from with its own payload.
func (p *podman) reaches(from, to string) {
	p.t.Helper()
	addr := p.address(to)
	p.waitFor(fmt.Sprintf("%s to reach %s (%s)", from, to, addr), func() error {
		// nc, as wget of some static busybox crashes.
		out, err := p.try("exec", from, "sh", "-c", "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 2 "+addr+" 80")
		if err == nil && !strings.HasSuffix(strings.TrimSpace(out), p.payload(to)) {
			return fmt.Errorf("answer %q", out)
		}
		return err
	})
}

// links are the names of the host's links but for the bridge, which the bridge plugin leaves.
func (p *podman) links() []string {
	p.t.Helper()
	out, err := p.host.Exec(p.t.Context(), "ip", "-o", "link")
	if err != nil {
		p.t.Fatal(err)
	}
	var names []string
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[1] != "cni0:" {
			names = append(names, f[1])
		}
	}
	sort.Strings(names)
	return names
}

// waitFor repeats check until it succeeds or the deadline has passed.
func (p *podman) waitFor(what string, check func() error) {
	p.t.Helper()
	end := time.Now().Add(deadline)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			p.t.Fatalf("waiting for %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
