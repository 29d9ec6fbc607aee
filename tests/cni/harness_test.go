package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	caracal "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

var serial atomic.Int64

// host is a simulated node: a network namespace, a bpffs and a state directory.
type host struct {
	t     testing.TB
	name  string
	dir   string // holds bpf/ and state/
	bin   string
	path  string // CNI_PATH
	conf  map[string]any
	count atomic.Int64
}

type object = map[string]any

func newHost(t testing.TB) *host {
	t.Helper()
	testenv.NeedRoot(t)
	h := &host{t: t, name: fmt.Sprintf("cnit-%d-%d", os.Getpid(), serial.Add(1)), dir: t.TempDir(), bin: testenv.Bin(t, "caracal")}
	h.path = filepath.Dir(h.bin) + ":/usr/lib/cni"
	namespace(t, h.name)
	must(t, os.Mkdir(filepath.Join(h.dir, "bpf"), 0o700))
	must(t, unix.Mount("bpf", filepath.Join(h.dir, "bpf"), "bpf", 0, ""))
	t.Cleanup(func() {
		eventually(t, "the processes beside the runtime end", func() error { return h.busy() })
		eventually(t, "nobody has a file of the bpf file system open", func() error { return unix.Unmount(filepath.Join(h.dir, "bpf"), 0) })
	})
	h.conf = object{
		"cniVersion": "1.1.0", "name": "pods", "type": "caracal", "state_dir": h.state(), "bpffs_dir": h.pins(),
		"max_flows": 4096, "nodename": "node-1", "log_level": "warning", "mtu": 1500,
		"ipam": object{"type": "caracal-ipam", "ipv4_pools": []string{"10.244.0.0/16"}, "ipv6_pools": []string{"fd00:10::/64"}},
	}
	h.run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	h.run("ip", "addr", "add", "2001:db8::1/128", "dev", "lo")
	return h
}

func (h *host) state() string { return filepath.Join(h.dir, "state") }
func (h *host) pins() string  { return filepath.Join(h.dir, "bpf", "node") }

// busy tells whether a settler or reaper of this host runs.
func (h *host) busy() error {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range all {
		b, _ := os.ReadFile(f)
		arg := strings.Split(string(b), "\x00")
		if len(arg) > 1 && (arg[1] == "settle" && slices.Contains(arg, h.state()) || arg[1] == "reap" && h.holds(filepath.Dir(f))) {
			return fmt.Errorf("%s: %q", f, arg)
		}
	}
	return nil
}

func (h *host) holds(proc string) bool {
	var a, b unix.Stat_t
	return unix.Stat(proc+"/ns/net", &a) == nil && unix.Stat(netns.Path(h.name), &b) == nil && a.Ino == b.Ino
}

// namespace makes a network namespace for the time of the test.
func namespace(t testing.TB, name string) string {
	t.Helper()
	must(t, netns.Create(name))
	t.Cleanup(func() { must(t, netns.Delete(name)) })
	run(t, name, "ip", "link", "set", "lo", "up")
	return netns.Path(name)
}

// pod is a container as its runtime sees it.
type pod struct {
	h      *host
	ns     string // of the namespace; its path is Netns unless a test says otherwise
	id     string
	ifname string
	netns  string
	args   string
	conf   object // over the host's
	result result
	raw    json.RawMessage
}

type result struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details"`
	Interfaces []struct {
		Name, Mac, Sandbox string
		Mtu                int
	} `json:"interfaces"`
	IPs []struct {
		Address, Gateway string
		Interface        *int
	} `json:"ips"`
}

func (h *host) pod() *pod {
	h.t.Helper()
	n := h.count.Add(1)
	p := &pod{h: h, ns: fmt.Sprintf("%s-p%d", h.name, n), id: fmt.Sprintf("%012x%04d", n, n), ifname: "eth0"}
	p.netns = namespace(h.t, p.ns)
	return p
}

func (p *pod) config() object {
	c := maps.Clone(p.h.conf)
	maps.Copy(c, p.conf)
	return c
}

func (p *pod) env(command string) []string {
	return []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.id, "CNI_NETNS=" + p.netns, "CNI_IFNAME=" + p.ifname,
		"CNI_ARGS=" + p.args, "CNI_PATH=" + p.h.path}
}

// call runs the plugin and returns what it printed and its exit status.
func (h *host) call(bin string, stdin []byte, env ...string) ([]byte, int) {
	cmd := exec.Command(bin)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	cmd.Stdin = bytes.NewReader(stdin)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	// Started inside: the child inherits the thread's namespace.
	if err := netns.Do(netns.Path(h.name), cmd.Start); err != nil {
		h.t.Error(err)
		return nil, -1
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Error(err)
	}
	if strings.Contains(stderr.String(), "panic") || strings.Contains(stderr.String(), "goroutine ") {
		h.t.Errorf("stderr: %s", stderr.String())
	}
	if testing.Verbose() && stderr.Len() > 0 {
		h.t.Log(strings.TrimSpace(stderr.String()))
	}
	return out.Bytes(), cmd.ProcessState.ExitCode()
}

// do runs a command for the pod: its answer as an error, or the decoded result.
func (p *pod) do(command string, extra ...string) error {
	stdin, err := json.Marshal(p.config())
	if err != nil {
		return err
	}
	return p.with(stdin, command, extra...)
}

func (p *pod) with(stdin []byte, command string, extra ...string) error {
	out, code := p.h.call(p.h.bin, stdin, append(p.env(command), extra...)...)
	p.raw, p.result = out, result{}
	if len(out) > 0 {
		if err := json.Unmarshal(out, &p.result); err != nil {
			return fmt.Errorf("%s printed %q: %w", command, out, err)
		}
	}
	if code != 0 {
		return fmt.Errorf("%s: exit %d: code %d: %s %s", command, code, p.result.Code, p.result.Msg, p.result.Details)
	}
	if command != "ADD" && command != "VERSION" && len(out) > 0 {
		return fmt.Errorf("%s printed %q", command, out)
	}
	return nil
}

func (p *pod) add() *pod {
	p.h.t.Helper()
	must(p.h.t, p.do("ADD"))
	return p
}

func (p *pod) del() {
	p.h.t.Helper()
	must(p.h.t, p.do("DEL"))
}

// fails makes sure that a command answers with an error of this code, in the question's version, that has words.
func (p *pod) fails(code int, words, command string, extra ...string) {
	p.h.t.Helper()
	err := p.do(command, extra...)
	p.answered(err, code, words)
}

func (p *pod) answered(err error, code int, words string) {
	p.h.t.Helper()
	switch {
	case err == nil:
		p.h.t.Errorf("no error, want code %d, %s", code, words)
	case p.result.Code != code || !strings.Contains(p.result.Msg+p.result.Details, words):
		p.h.t.Errorf("%v; want code %d and %q", err, code, words)
	case p.result.CNIVersion == "":
		p.h.t.Errorf("error without cniVersion: %s", p.raw)
	}
}

func (p *pod) addr(v6 bool) netip.Addr {
	for _, ip := range p.result.IPs {
		if a := netip.MustParsePrefix(ip.Address).Addr(); a.Is6() == v6 {
			return a
		}
	}
	p.h.t.Fatalf("no address (v6 %t) in %s", v6, p.raw)
	return netip.Addr{}
}

func (p *pod) hostIf() string {
	for _, i := range p.result.Interfaces {
		if strings.HasPrefix(i.Name, "cali") {
			return i.Name
		}
	}
	return ""
}

func (p *pod) ip(arg ...string) string {
	p.h.t.Helper()
	return run(p.h.t, p.ns, append([]string{"ip"}, arg...)...)
}
func (h *host) run(arg ...string) string { h.t.Helper(); return run(h.t, h.name, arg...) }

func run(t testing.TB, ns string, arg ...string) string {
	t.Helper()
	out, err := try(ns, arg...)
	if err != nil {
		t.Fatalf("%s: %s: %v\n%s", ns, strings.Join(arg, " "), err, out)
	}
	return out
}

func try(ns string, arg ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, arg[0], arg[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := netns.Do(netns.Path(ns), cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return strings.TrimSpace(out.String()), err
}

// pings: the first pod reaches the second, or any address.
func (p *pod) ping(to netip.Addr) {
	p.h.t.Helper()
	run(p.h.t, p.ns, "ping", "-n", "-c", "1", "-W", "3", to.String())
}

// clean makes sure that nothing of any pod is left.
func (h *host) clean() {
	h.t.Helper()
	eventually(h.t, "nothing is left", h.leftovers)
}

// leftovers tells what is left of pods, as an error.
func (h *host) leftovers() error {
	var left []string
	add := func(format string, args ...any) { left = append(left, fmt.Sprintf(format, args...)) }
	err := netns.Do(netns.Path(h.name), func() error {
		links, err := nl.Dump(netlink.LinkList)
		for _, l := range links {
			if l.Attrs().Name != "lo" && l.Attrs().Name != "uplink" {
				add("link %s", l.Attrs().Name)
			}
		}
		for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, rerr := nl.Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, f) })
			for _, r := range routes {
				if r.Protocol == cni.RouteProtocol && r.Type != unix.RTN_BLACKHOLE {
					add("route %s", r)
				}
			}
			neighbours, nerr := nl.Dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, f) })
			for _, n := range neighbours {
				if n.State == netlink.NUD_PERMANENT {
					add("neighbour %s", n.IP)
				}
			}
			err = errors.Join(err, rerr, nerr)
		}
		return err
	})
	err = errors.Join(err, h.mapped(add), h.recorded(add))
	if len(left) > 0 {
		err = errors.Join(err, errors.New("left: "+strings.Join(left, "; ")))
	}
	return err
}

func (h *host) mapped(add func(string, ...any)) error {
	names, err := loader.Links(h.pins())
	for _, n := range names {
		add("link pin of %s", n)
	}
	m, merr := caracal.Open(h.pins())
	if errors.Is(merr, caracal.ErrNotLoaded) {
		return err
	}
	if merr != nil {
		return merr
	}
	defer m.Close()
	pods, perr := m.Pods()
	for _, p := range pods {
		add("pod %d %v in the maps", p.IfIndex, p.Addresses)
	}
	routes, rerr := m.Routes()
	for _, r := range routes {
		if r.Kind == caracal.RouteLocalPod {
			add("route %s in the maps", r.Prefix)
		}
	}
	peers, ierr := m.Peers()
	for _, p := range peers {
		if p.Prefix.IsSingleIP() {
			add("identity of %s", p.Prefix)
		}
	}
	flows, ferr := m.Flows()
	for _, f := range flows {
		add("flow %s %s %s", f.Protocol, f.Opener, f.Responder)
	}
	quota, qerr := ebpf.LoadPinnedMap(bpf.MapPath(h.pins(), bpf.DataplaneMapCaracalQuota), nil)
	if qerr == nil {
		defer quota.Close()
		var key uint32
		var value bpf.DataplaneQuota
		for all := quota.Iterate(); all.Next(&key, &value); {
			add("quota of %d", key)
		}
	}
	return errors.Join(err, perr, rerr, ierr, ferr, qerr)
}

func (h *host) recorded(add func(string, ...any)) error {
	return h.db(func(tx *node.Tx) error {
		report, err := ipam.Check(tx, nil)
		for _, p := range report.Problems {
			add("%s %s: %s", p.Kind, p.Addr, p.Detail)
		}
		if report.Addresses > 0 {
			add("%d addresses held", report.Addresses)
		}
		return errors.Join(err, tx.Endpoints(func(e node.Endpoint) error {
			add("endpoint %s", e.Key)
			return nil
		}))
	})
}

// db reads the host's database; none is as good as an empty one.
func (h *host) db(fn func(*node.Tx) error) error {
	opts := node.Options{}
	if f, ok := h.conf["boot_id_file"].(string); ok {
		opts.BootIDFile = f
	}
	db, err := node.OpenReadOnly(context.Background(), h.state(), opts)
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(db.View(fn), db.Close())
}

// eventually waits for a condition, with a deadline far beyond what it takes.
func eventually(t testing.TB, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Errorf("waiting until %s: %v", what, err)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
