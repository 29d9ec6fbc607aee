package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// ptp is a configuration list of Debian's plugins that routes, as ours does: pods of two hosts reach each other over the
// kernel's routes.
const ptp = `{"cniVersion":"1.0.0","name":"{{.Network}}","plugins":[{"type":"ptp","ipam":{
	"type":"host-local","dataDir":"{{.StateDir}}",
	"ranges":[[{"subnet":"{{index .IPv4Pools 0}}"}],[{"subnet":"{{index .IPv6Pools 0}}"}]],
	"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}]}`

func needPlugins(t *testing.T) {
	t.Helper()
	if !isFile("/usr/lib/cni/ptp") {
		Skip(t, "needs the standard CNI plugins (apt-get install containernetworking-plugins)")
	}
}

// outside 198.51.100.1
//
//	|
//
// ---+-----------+----------- switch
//
//	 | eth0      | eth0
//	h1          h2
//	 | ptp       | ptp
//	web          db             both serve their own name on port 80
func TestPodsOfTwoHosts(t *testing.T) {
	needPlugins(t)
	l := New(t, Config{Hosts: 2, Outside: true, StaticRoutes: true, Conflist: ptp})
	web := l.Host(1).TestPod(t, "web", PodOptions{})
	db := l.Host(2).TestPod(t, "db", PodOptions{})
	for _, p := range []*Pod{web, db} {
		serveName(t, p.Namespace(), p.Name)
	}
	serveName(t, l.Outside(), "outside")
	for _, c := range []struct {
		from Namespace
		to   netip.Addr
		want string
	}{
		{web.Namespace(), db.Addr(), "db"},
		{db.Namespace(), web.Addr(), "web"},
		{web.Namespace(), db.Addr6(), "db"},
		{db.Namespace(), web.Addr6(), "web"},
		{l.Host(1).Namespace(), db.Addr(), "db"},
		{l.Host(2).Namespace(), Outside4, "outside"},
		{l.Host(2).Namespace(), Outside6, "outside"},
	} {
		if got, err := askPatiently(c.from, c.to); err != nil || got != c.want {
			t.Errorf("%s asks %s: %q, %v; want %q", c.from.Netns, c.to, got, err, c.want)
		}
	}
	for i, p := range []*Pod{web, db} {
		for j, pool := range l.Host(i + 1).Pools() {
			if !pool.Contains(p.Addrs()[j]) {
				t.Errorf("%s has %v, not from its host's %v", p.Name, p.Addrs(), l.Host(i+1).Pools())
			}
		}
	}
	if err := l.Host(1).DelPod(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	if _, err := ask(db.Namespace(), web.Addr()); err == nil {
		t.Error("a deleted pod still answers")
	}
}

// serveName answers every connection to port 80 with name until the test ends.
func serveName(t *testing.T, n Namespace, name string) {
	t.Helper()
	var ln net.Listener
	err := n.Do(func() (err error) {
		ln, err = net.Listen("tcp", ":80")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, name)
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
}

// askPatiently asks until there is an answer or ten seconds have passed: ptp's IPv6 gateway is not usable before its
// duplicate address detection is over.
func askPatiently(n Namespace, to netip.Addr) (answer string, err error) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if answer, err = ask(n, to); err == nil {
			break
		}
	}
	return answer, err
}

// ask connects to port 80 and returns what it hears. It waits for half a second.
func ask(n Namespace, to netip.Addr) (string, error) {
	var answer []byte
	err := n.Do(func() error {
		fd, err := unix.Socket(family(to), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) // net.Dial would leave this thread
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		wait := unix.Timeval{Usec: 500_000}
		if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		buf := make([]byte, 100)
		k, err := unix.Read(fd, buf)
		answer = buf[:max(k, 0)]
		return err
	})
	return string(answer), err
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Port: 80, Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: 80, Addr: a.As16()}
}

// fakePlugin writes a plugin called caracal that records how it is called, one directory per call, and answers like a
// plugin without addresses. A file "fail-ADD" next to it makes ADD fail, "hang-ADD" makes it hang.
func fakePlugin(t *testing.T) (path string, calls func() []call) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "caracal")
	script := `#!/bin/sh
d=$(mktemp -d ` + dir + `/call.$(date +%s%N).XXXXXX)
cat >$d/stdin; env >$d/env; stat -L -c %i /proc/self/ns/net >$d/netns
[ -e ` + dir + `/hang-$CNI_COMMAND ] && exec sleep 1000
if [ -e ` + dir + `/fail-$CNI_COMMAND ]; then
	echo '{"cniVersion":"1.1.0","code":77,"msg":"told to fail"}'; exit 1
fi
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"1.1.0","interfaces":[{"name":"cali0123456789a"},{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.244.0.1/32"},{"address":"2001:db8:244::1/128"}]}' ;;
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
esac
`
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path, func() []call {
		dirs, _ := filepath.Glob(dir + "/call.*")
		var out []call
		for _, d := range dirs {
			c := call{env: map[string]string{}}
			data, _ := os.ReadFile(d + "/stdin")
			if err := json.Unmarshal(data, &c.conf); err != nil {
				t.Errorf("stdin of a call: %v: %s", err, data)
			}
			env, _ := os.ReadFile(d + "/env")
			for _, line := range strings.Split(string(env), "\n") {
				k, v, _ := strings.Cut(line, "=")
				c.env[k] = v
			}
			ino, _ := os.ReadFile(d + "/netns")
			c.netns = strings.TrimSpace(string(ino))
			out = append(out, c)
		}
		return out
	}
}

type call struct {
	conf  map[string]any
	env   map[string]string
	netns string // inode of the namespace that the plugin ran in
}

func (c call) command() string { return c.env["CNI_COMMAND"] }

// dig follows keys through decoded JSON.
func dig(v any, keys ...string) any {
	for _, k := range keys {
		m, _ := v.(map[string]any)
		v = m[k]
	}
	return v
}

func TestPluginIsCalledAsByARuntime(t *testing.T) {
	caracal, calls := fakePlugin(t)
	l := New(t, Config{Caracal: caracal, Plugin: map[string]any{"mtu": 1400}})
	h := l.Host(1)
	want := netip.MustParseAddr("10.244.0.1")
	p := h.TestPod(t, "web", PodOptions{IPs: []netip.Addr{want}, Labels: map[string]string{"b": "2", "a": "1"},
		Namespace: "prod", Args: [][2]string{{"MAC", "02:00:00:00:00:09"}}, Env: []string{"CARACAL_TEST=yes"}})
	if p.Addr() != want || p.Addr6() != netip.MustParseAddr("2001:db8:244::1") || p.State() != PodReady {
		t.Errorf("pod: %v %v %v", p.Addr(), p.Addr6(), p.State())
	}
	if p.HostIfName() != "cali0123456789a" {
		t.Errorf("host interface %q", p.HostIfName())
	}
	if err := h.CheckPod(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	if err := h.GC(t.Context()); err != nil {
		t.Error(err)
	}
	if err := h.Status(t.Context()); err != nil {
		t.Error(err)
	}
	if err := h.DelPod(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	if cached, err := h.Cached(); err != nil || len(cached) != 0 {
		t.Errorf("libcni's cache after DEL: %v, %v", cached, err)
	}

	seen := calls()
	var commands []string
	for _, c := range seen {
		commands = append(commands, c.command())
	}
	if want := []string{"ADD", "CHECK", "GC", "STATUS", "DEL"}; !slices.Equal(commands, want) {
		t.Fatalf("calls: %v, want %v", commands, want)
	}
	ino, err := inodeOf(h.Netns())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range seen {
		if c.netns != ino {
			t.Errorf("%s ran in namespace %s, its host's is %s", c.command(), c.netns, ino)
		}
		for key, want := range map[string]any{
			"type": "caracal", "name": l.Network(), "cniVersion": "1.1.0", "mtu": 1400.0, "nodename": "h1",
			"state_dir": h.StateDir(), "bpffs_dir": h.BPFDir(), "boot_id_file": h.BootIDFile(), "agent_socket": h.Socket(),
		} {
			if got := c.conf[key]; got != want {
				t.Errorf("%s: %s is %v, want %v", c.command(), key, got, want)
			}
		}
		if got := fmt.Sprint(c.conf["ipam"]); got != "map[ipv4_pools:[10.244.0.0/16] ipv6_pools:[2001:db8:244::/64] type:caracal-ipam]" {
			t.Errorf("%s: ipam is %s", c.command(), got)
		}
	}
	for _, c := range []call{seen[0], seen[1], seen[4]} {
		wantArgs := "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=" + p.ContainerID() +
			";K8S_POD_UID=" + p.file.UID + ";MAC=02:00:00:00:00:09"
		for key, want := range map[string]string{"CNI_ARGS": wantArgs, "CNI_CONTAINERID": p.ContainerID(), "CNI_IFNAME": "eth0",
			"CNI_NETNS": p.Netns(), "CARACAL_TEST": "yes", "CARACAL_LAB": l.Name} {
			if c.env[key] != want {
				t.Errorf("%s: %s is %q, want %q", c.command(), key, c.env[key], want)
			}
		}
		if got := fmt.Sprint(dig(c.conf, "args", "cni")); got != "map[ips:[10.244.0.1] labels:[map[key:a value:1] map[key:b value:2]]]" {
			t.Errorf("%s: args.cni is %s", c.command(), got)
		}
	}
	if got := fmt.Sprint(seen[2].conf["cni.dev/valid-attachments"]); got != fmt.Sprintf("[map[containerID:%s ifname:eth0]]", p.ContainerID()) {
		t.Errorf("GC: valid attachments %s", got)
	}
}

func inodeOf(path string) (string, error) {
	ns, err := netns.Open(path)
	if err != nil {
		return "", err
	}
	defer ns.Close()
	ino, err := ns.Inode()
	return fmt.Sprint(ino), err
}

func TestFailedAddLeavesNoPod(t *testing.T) {
	caracal, calls := fakePlugin(t)
	l := New(t, Config{Caracal: caracal})
	h := l.Host(1)
	fail := filepath.Join(filepath.Dir(caracal), "fail-ADD")
	if err := os.WriteFile(fail, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := h.AddPod(t.Context(), "web", PodOptions{})
	var cniErr *types.Error
	if !errors.As(err, &cniErr) || cniErr.Code != 77 {
		t.Errorf("AddPod: %v, want CNI error 77 in its chain", err)
	}
	if _, err := h.Pod("web"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after a failed ADD: %v", err)
	}
	if _, err := os.Stat(netns.Path(l.Name + "-h1-web")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace of a failed pod: %v", err)
	}
	if c := calls(); len(c) != 2 || c[1].command() != "DEL" {
		t.Errorf("a failed ADD must be followed by one DEL: %d calls", len(c))
	}

	// The steps apart: the pod stays, and the next try may succeed.
	p, err := h.NewPod(t.Context(), "web", PodOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Add(t.Context()); err == nil {
		t.Fatal("ADD succeeded")
	}
	if p, err = h.Pod("web"); err != nil || p.State() != PodAdding || p.Addrs() != nil {
		t.Errorf("pod after a failed ADD: %v, %v", p, err)
	}
	if err := os.Remove(fail); err != nil {
		t.Fatal(err)
	}
	if err := p.Add(t.Context()); err != nil {
		t.Error(err)
	}
	// DEL fails: the pod stays, to be deleted again.
	if err := os.WriteFile(strings.Replace(fail, "ADD", "DEL", 1), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := h.DelPod(t.Context(), "web"); err == nil {
		t.Error("DelPod succeeded though DEL failed")
	}
	if _, err := h.Pod("web"); err != nil {
		t.Error(err)
	}
}

func TestHungPluginEndsWithItsContext(t *testing.T) {
	caracal, _ := fakePlugin(t)
	l := New(t, Config{Caracal: caracal})
	if err := os.WriteFile(filepath.Join(filepath.Dir(caracal), "hang-ADD"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for ctx.Err() == nil {
			if called, _ := filepath.Glob(filepath.Join(filepath.Dir(caracal), "call.*/netns")); len(called) > 0 {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if _, err := l.Host(1).AddPod(ctx, "web", PodOptions{}); err == nil {
		t.Error("AddPod of a hung plugin succeeded")
	}
	if procs := l.Host(1).Namespace().Processes(); len(procs) != 0 {
		t.Errorf("plugin still runs: %v", procs)
	}
}

func TestUpRefuses(t *testing.T) {
	caracal, _ := fakePlugin(t)
	taken := TestName()
	l := New(t, Config{Caracal: caracal})
	if err := netns.Create(taken + "-h2"); err != nil { // another's namespace
		t.Fatal(err)
	}
	defer netns.Delete(taken + "-h2")
	for _, c := range []struct {
		name string
		cfg  Config
		want error
		text string
	}{
		{"lab of that name", Config{Name: l.Name}, ErrExists, "lab down --name"},
		{"namespace of that name", Config{Name: taken, Hosts: 2}, ErrExists, taken + "-h2"},
		{"name with a dash", Config{Name: "a-b"}, nil, "lab name"},
		{"name that is a path", Config{Name: "../x"}, nil, "lab name"},
		{"too many hosts", Config{Name: taken, Hosts: MaxHosts + 1}, nil, "hosts"},
		{"negative hosts", Config{Name: taken, Hosts: -1}, nil, "hosts"},
		{"small pool", Config{Name: taken, Hosts: 2, IPv4Pools: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/26")}}, nil, "no /26 for host h2"},
		{"missing plugin", Config{Name: taken, Caracal: "/nonexistent/caracal"}, os.ErrNotExist, "caracal"},
		{"template that does not parse", Config{Name: taken, Conflist: "{{"}, nil, "template"},
		{"template of something else", Config{Name: taken, Conflist: "{}"}, nil, "configuration list"},
		{"template with an unknown field", Config{Name: taken, Conflist: "{{.Nothing}}"}, nil, "template"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.cfg.Caracal == "" {
				c.cfg.Caracal = caracal
			}
			_, err := Up(t.Context(), c.cfg)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("Up: %v; want %v, with %q", err, c.want, c.text)
			}
			if _, err := os.Stat(netns.Path(taken + "-h2")); err != nil {
				t.Errorf("another's namespace: %v", err)
			}
			if left := Leftovers(taken); !slices.Equal(left, []string{"network namespace " + taken + "-h2"}) {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if _, err := l.Host(1).NewPod(t.Context(), "../x", PodOptions{}); err == nil {
		t.Error("pod with a path as its name")
	}
	if _, err := l.Host(1).NewPod(t.Context(), "a", PodOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := l.Host(1).NewPod(t.Context(), "a", PodOptions{}); !errors.Is(err, ErrExists) {
		t.Errorf("second pod of a name: %v", err)
	}
}

func TestDownEndsProcesses(t *testing.T) {
	caracal, _ := fakePlugin(t)
	l := New(t, Config{Caracal: caracal})
	p := l.Host(1).TestPod(t, "web", PodOptions{})
	bystander := exec.Command("sleep", "1000")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { bystander.Process.Kill(); bystander.Wait() }()
	var cmds []*exec.Cmd
	for _, c := range []struct {
		ns     Namespace
		script string
	}{
		{l.Host(1).Namespace(), "echo; exec sleep 1000"},
		{p.Namespace(), "trap '' TERM; echo; while :; do sleep 1000; done"},            // deaf to SIGTERM
		{l.Host(1).Namespace(), "echo; exec unshare --net sleep 1000"},                 // left the lab's namespaces
		{p.Namespace(), "env -i PATH=$PATH setsid sleep 1000 >/dev/null & echo; wait"}, // and one without its marker
	} {
		cmd := exec.Command("sh", "-c", c.script)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.ns.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it is so far
			t.Fatal(err)
		}
		cmds = append(cmds, cmd)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range cmds {
		c.Wait()
	}
	if err := bystander.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("a process outside the lab: %v", err)
	}
	if err := l.Down(t.Context()); !errors.Is(err, ErrNotFound) {
		t.Errorf("second Down: %v, want ErrNotFound", err)
	}
	if _, err := l.Host(1).AddPod(t.Context(), "late", PodOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("AddPod after Down: %v, want ErrNotFound", err)
	}
	// For New's cleanup, which wants a lab to take down.
	if _, err := Up(t.Context(), Config{Name: l.Name, Caracal: caracal}); err != nil {
		t.Error(err)
	}
}

func TestReboot(t *testing.T) {
	caracal, calls := fakePlugin(t)
	l := New(t, Config{Caracal: caracal, Hosts: 2})
	h := l.Host(1)
	h.TestPod(t, "web", PodOptions{})
	before, err := os.ReadFile(h.BootIDFile())
	if err != nil {
		t.Fatal(err)
	}
	pin, unfinished, others := filepath.Join(h.BPFDir(), "sub"), h.BPFDir()+"~123", l.Host(2).BPFDir()
	for _, d := range []string{pin, unfinished, others} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(h.BootIDFile()); err != nil || string(after) == string(before) || len(after) != 37 {
		t.Errorf("boot id %q after %q, %v", after, before, err)
	}
	for _, d := range []string{pin, unfinished} {
		if _, err := os.Stat(d); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what was in the bpffs: %v", err)
		}
	}
	if _, err := os.Stat(others); err != nil {
		t.Errorf("the other host's pins: %v", err)
	}
	serveName(t, l.Host(2).Namespace(), "h2")
	if got, err := askPatiently(h.Namespace(), l.Host(2).Addr()); err != nil || got != "h2" {
		t.Errorf("uplink after the reboot: %q, %v", got, err)
	}
	p, err := h.Pod("web")
	if err != nil || p.State() != PodDead {
		t.Fatalf("pod after the reboot: %v, %v", p, err)
	}
	if err := h.DelPod(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	c := calls()
	if last := c[len(c)-1]; last.command() != "DEL" || last.env["CNI_NETNS"] != "" {
		t.Errorf("late DEL: %s with namespace %q, want none", last.command(), last.env["CNI_NETNS"])
	}
}

// A foreign plugin whose DEL fails is told of, and nothing of the lab stays for it.
func TestDownThoughDelFails(t *testing.T) {
	caracal, calls := fakePlugin(t)
	name := TestName()
	l, err := Up(t.Context(), Config{Name: name, Caracal: caracal, Conflist: `{"cniVersion":"1.1.0","name":"x","plugins":[{"type":"caracal"}]}`})
	if err != nil {
		t.Fatal(err)
	}
	l.Host(1).TestPod(t, "web", PodOptions{})
	if _, err := l.Host(1).NewPod(t.Context(), "half", PodOptions{}); err != nil { // gets no DEL: it had no ADD
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(caracal), "fail-DEL"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Down(t.Context()); err == nil || !strings.Contains(err.Error(), "told to fail") {
		t.Errorf("Down: %v, want what the plugin said", err)
	}
	if left := Leftovers(name); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if c := calls(); len(c) != 3 || c[1].command() != "DEL" || c[2].command() != "DEL" {
		t.Errorf("%d calls, want ADD, DEL, and DEL again", len(c))
	}
}

func TestPodsInParallel(t *testing.T) {
	needPlugins(t)
	l := New(t, Config{Conflist: ptp})
	h := l.Host(1)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			name := fmt.Sprintf("p%d", i)
			if _, err := h.AddPod(t.Context(), name, PodOptions{}); err != nil {
				t.Error(err)
				return
			}
			if i%2 == 0 {
				if err := h.DelPod(t.Context(), name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	pods, err := h.Pods()
	if err != nil || len(pods) != 6 {
		t.Errorf("%d pods, %v; want 6", len(pods), err)
	}
	seen := map[netip.Addr]string{}
	for _, p := range pods {
		if other := seen[p.Addr()]; other != "" || !p.Addr().IsValid() {
			t.Errorf("%s and %s have address %v", p.Name, other, p.Addr())
		}
		seen[p.Addr()] = p.Name
	}
}

// What the leak check is for: things that keep a namespace alive after its name is gone.
func TestHeldNamespacesAreSeen(t *testing.T) {
	caracal, _ := fakePlugin(t)
	l := New(t, Config{Caracal: caracal})
	_, inodes := l.trace()
	if held := heldNamespaces(inodes); len(held) != 0 {
		t.Errorf("held before anything is: %v", held)
	}
	ns, err := netns.Open(l.Host(1).Netns())
	if err != nil {
		t.Fatal(err)
	}
	if held := heldNamespaces(inodes); len(held) != 1 || !strings.Contains(held[0], "descriptor") {
		t.Errorf("with a descriptor open: %v", held)
	}
	err = ns.Do(func() error {
		if held := heldNamespaces(inodes); len(held) != 2 || !strings.Contains(held[1], "thread") {
			t.Errorf("with a thread inside as well: %v", held)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	ns.Close()
}

func TestShare(t *testing.T) {
	for _, c := range []struct {
		pool string
		bits int
		host int
		want string // "" is an error
	}{
		{"10.244.0.0/16", 26, 1, "10.244.0.0/26"},
		{"10.244.0.0/16", 26, 6, "10.244.1.64/26"},
		{"10.244.0.0/24", 26, 4, "10.244.0.192/26"},
		{"10.244.0.0/24", 26, 5, ""},
		{"10.244.0.0/27", 26, 1, ""},
		{"2001:db8::/64", 122, 3, "2001:db8::80/122"},
		{"2001:db8::/122", 122, 2, ""},
	} {
		got, err := share([]netip.Prefix{netip.MustParsePrefix(c.pool)}, c.bits, c.host)
		if (err != nil) != (c.want == "") || err == nil && got[0].String() != c.want {
			t.Errorf("share(%s, %d, %d) = %v, %v; want %s", c.pool, c.bits, c.host, got, err, c.want)
		}
	}
}

func TestOwnsNetns(t *testing.T) {
	for name, want := range map[string]bool{
		"lab-switch": true, "lab-outside": true, "lab-h1": true, "lab-h12-web": true, "lab-h1-a.b-c": true,
		"lab": false, "lab-": false, "lab-h": false, "lab-host": false, "lab-hx": false, "lab2-h1": false, "lab-h1web": false,
	} {
		if got := ownsNetns("lab", name); got != want {
			t.Errorf("ownsNetns(lab, %s) = %v", name, got)
		}
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{`/a\040b`: "/a b", `/a\134b`: `/a\b`, `/a\0`: `/a\0`, `/a\999`: `/a\999`, "": ""} {
		if got := unescapeMount(in); got != want {
			t.Errorf("unescapeMount(%q) = %q, want %q", in, got, want)
		}
	}
}
