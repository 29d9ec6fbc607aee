package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/loader"
	caracal "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// insideHost runs plugins in the host's namespace.
type insideHost struct {
	*invoke.DefaultExec
	h *host
}

func (e insideHost) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) (out []byte, err error) {
	if nerr := netns.Do(netns.Path(e.h.name), func() error {
		out, err = e.DefaultExec.ExecPlugin(ctx, path, stdin, environ)
		return nil
	}); nerr != nil {
		return nil, nerr
	}
	return out, err
}

// runtime is a container runtime: libcni with a list of plugins.
type runtime struct {
	h     *host
	cni   *libcni.CNIConfig
	list  *libcni.NetworkConfigList
	cache string
}

func (h *host) runtime(version string, plugins ...object) *runtime {
	h.t.Helper()
	for _, name := range []string{"portmap", "bandwidth", "tuning", "bridge", "host-local", "static"} {
		for _, p := range plugins {
			if p["type"] == name {
				testenv.NeedProgram(h.t, name, "containernetworking-plugins")
			}
		}
	}
	b, err := json.Marshal(object{"cniVersion": version, "name": h.conf["name"], "plugins": plugins})
	must(h.t, err)
	list, err := libcni.NetworkConfFromBytes(b)
	must(h.t, err)
	cache := h.t.TempDir()
	return &runtime{h, libcni.NewCNIConfigWithCacheDir(filepath.SplitList(h.path), cache, h.exec()), list, cache}
}

func (h *host) exec() invoke.Exec {
	return insideHost{&invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: io.Discard}, PluginDecoder: version.PluginDecoder{}}, h}
}

func (r *runtime) conf(p *pod, capabilities object) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: p.id, NetNS: p.netns, IfName: p.ifname, CapabilityArgs: capabilities}
}

// add adds a pod by the whole chain.
func (r *runtime) add(capabilities object) *pod {
	r.h.t.Helper()
	p := r.h.pod()
	raw, err := r.cni.AddNetworkList(r.h.t.Context(), r.list, r.conf(p, capabilities))
	must(r.h.t, err)
	must(r.h.t, p.read(raw))
	// CHECK of Debian's portmap (1.1.1) fails with two families, and its bandwidth falls over a pod without limits.
	if len(r.list.Plugins) == 1 {
		must(r.h.t, r.cni.CheckNetworkList(r.h.t.Context(), r.list, r.conf(p, capabilities)))
	}
	return p
}

func (p *pod) read(raw types.Result) error {
	result, err := types100.NewResultFromResult(raw)
	if err != nil {
		return err
	}
	if p.raw, err = json.Marshal(result); err != nil {
		return err
	}
	return json.Unmarshal(p.raw, &p.result)
}

func (r *runtime) del(p *pod, capabilities object) {
	r.h.t.Helper()
	must(r.h.t, r.cni.DelNetworkList(context.WithoutCancel(r.h.t.Context()), r.list, r.conf(p, capabilities)))
}

// caracalPlugin is the host's configuration as one of a list.
func (h *host) plugin(over object) object {
	c := object{"capabilities": object{"bandwidth": true, "mac": true, "ips": true}}
	for k, v := range h.conf {
		if k != "cniVersion" && k != "name" {
			c[k] = v
		}
	}
	for k, v := range over {
		c[k] = v
	}
	return c
}

// TestLibCNI: as runtimes do it, in several versions, with the cache lost and with one of an older version.
func TestLibCNI(t *testing.T) {
	h := newHost(t)
	for _, v := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		r := h.runtime(v, h.plugin(nil))
		p, q := r.add(nil), r.add(object{"mac": "02:00:00:00:00:07", "ips": []string{"10.244.3.3"}})
		p.ping(q.addr(false))
		if q.addr(false).String() != "10.244.3.3" || !strings.Contains(q.ip("link"), "02:00:00:00:00:07") {
			t.Errorf("capabilities: %s", q.raw)
		}
		if v == "1.1.0" {
			must(t, r.cni.GetStatusNetworkList(t.Context(), r.list))
			valid := []types.GCAttachment{{ContainerID: q.id, IfName: "eth0"}}
			must(t, r.cni.GCNetworkList(t.Context(), r.list, &libcni.GCArgs{ValidAttachments: valid}))
			if links := splitLines(p.ip("-o", "link")); len(links) != 1 {
				t.Errorf("GC left %v", links)
			}
		}
		must(t, os.RemoveAll(filepath.Join(r.cache, "results")))
		r.del(p, nil)
		r.del(q, nil)
		h.clean()
	}
	old := h.runtime("0.3.1", h.plugin(nil))
	p := h.pod()
	_, err := old.cni.AddNetworkList(t.Context(), old.list, old.conf(p, nil))
	must(t, err)
	now := h.runtime("1.1.0", h.plugin(nil))
	now.cni = old.cni // and so its cache
	now.del(p, nil)
	h.clean()
}

// outside joins a namespace to the host: 198.51.100.1 is the host's, 198.51.100.2 the outside's.
func (h *host) outside() string {
	h.t.Helper()
	name := h.name + "-out"
	namespace(h.t, name)
	h.run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", "eth0", "netns", name)
	h.run("ip", "addr", "add", "198.51.100.1/24", "dev", "uplink")
	h.run("ip", "link", "set", "uplink", "up")
	run(h.t, name, "ip", "addr", "add", "198.51.100.2/24", "dev", "eth0")
	run(h.t, name, "ip", "link", "set", "eth0", "up")
	return name
}

// serve answers every connection in a namespace with its name.
func serve(t testing.TB, ns string, port int) {
	t.Helper()
	var l net.Listener
	must(t, netns.Do(netns.Path(ns), func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, ns)
			c.Close()
		}
	}()
}

// ask says who answers at an address, as seen from a namespace.
func ask(ns, address string) (string, error) {
	fd, err := -1, error(nil)
	// Socket and connect by hand: a dialer would start goroutines outside of the namespace.
	err = netns.Do(netns.Path(ns), func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(3 * time.Second))
		for _, o := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &tv); err != nil {
				return err
			}
		}
		a := netip.MustParseAddrPort(address)
		for err = unix.EINTR; errors.Is(err, unix.EINTR); { // with a timeout the kernel does not begin again by itself
			err = unix.Connect(fd, &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())})
		}
		return err
	})
	if fd >= 0 {
		defer unix.Close(fd)
	}
	if err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, err := unix.Read(fd, b)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(fd, b)
	}
	return string(b[:max(n, 0)]), err
}

// TestPortmap: a published port is reached from outside, from another pod and from the host itself.
//
//	outside --- uplink [host: iptables DNAT] --- web
//	                                         `-- other
func TestPortmap(t *testing.T) {
	h := newHost(t)
	testenv.NeedProgram(t, "iptables", "iptables")
	if out, err := try(h.name, "iptables", "-t", "nat", "-L"); err != nil {
		lab.Skip(t, "iptables has no nat table here: "+out)
	}
	outside := h.outside()
	told := object{"capabilities": object{"portMappings": true}}
	r := h.runtime("1.0.0", h.plugin(told), object{"type": "portmap", "snat": true, "capabilities": object{"portMappings": true}})
	ports := object{"portMappings": []object{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	web, other := r.add(ports), r.add(nil)
	serve(t, web.ns, 80)
	for _, round := range []string{"quick", "settled"} {
		if round == "settled" {
			web.settled()
			other.settled()
		}
		for _, from := range []string{outside, other.ns, h.name} {
			if who, err := ask(from, "198.51.100.1:8080"); who != web.ns {
				t.Errorf("%s, from %s: %q, %v", round, from, who, err)
			}
		}
		if who, err := ask(other.ns, web.addr(false).String()+":80"); who != web.ns {
			t.Errorf("%s, directly: %q, %v", round, who, err)
		}
	}
	for _, taken := range []object{
		{"hostPort": 8080, "containerPort": 81, "protocol": "tcp"}, {"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": "198.51.100.1"},
	} {
		p := h.pod()
		p.conf = object{"runtimeConfig": object{"portMappings": []object{taken}}}
		p.fails(103, "of this host is published by pods/"+web.id+"/eth0 already", "ADD")
	}
	for _, free := range []object{
		{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}, {"hostPort": 8080, "containerPort": 80, "protocol": "udp"}, {"hostPort": 0, "containerPort": 80},
	} {
		p := h.pod()
		p.conf = object{"runtimeConfig": object{"portMappings": []object{free}}}
		p.add().del()
	}
	for words, wrong := range map[string]object{
		"70000 is no port": {"hostPort": 70000}, `protocol "ip" is none of`: {"hostPort": 1, "protocol": "ip"}, `hostIP "here" is not`: {"hostPort": 1, "hostIP": "here"},
	} {
		p := h.pod()
		p.conf = object{"runtimeConfig": object{"portMappings": []object{wrong}}}
		p.fails(7, words, "ADD")
	}
	r.del(web, ports)
	if who, err := ask(outside, "198.51.100.1:8080"); err == nil {
		t.Errorf("after DEL %q answers", who)
	}
	r.del(other, nil)
	eventually(t, "nothing is left", h.leftovers)
}

func (p *pod) mapped() caracal.Pod {
	p.h.t.Helper()
	m, err := caracal.Open(p.h.pins())
	must(p.h.t, err)
	defer m.Close()
	var index int
	must(p.h.t, netns.Do(netns.Path(p.h.name), func() error {
		l, err := netlink.LinkByName(p.hostIf())
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	}))
	pod, err := m.Pod(uint32(index))
	must(p.h.t, err)
	return pod
}

// TestBandwidth: the shaped rate is kept both ways, and others are as fast as before.
func TestBandwidth(t *testing.T) {
	h := newHost(t)
	if !loader.HasTCX() {
		t.Skip("no TCX here")
	}
	if out, err := try(h.name, "ip", "link", "add", "probe", "type", "ifb"); err != nil {
		lab.Skip(t, "this kernel has no ifb, which the bandwidth plugin needs: "+out)
	}
	h.run("ip", "link", "del", "probe")
	const (
		rate  = 32e6    // bits per second
		bytes = 3 << 20 // 25 Mbit: 0.8 s
	)
	r := h.runtime("1.0.0", h.plugin(nil), object{"type": "bandwidth", "capabilities": object{"bandwidth": true}})
	limits := object{"bandwidth": object{"ingressRate": int(rate), "ingressBurst": 1000000, "egressRate": int(rate), "egressBurst": 1000000}}
	shaped, a, b := r.add(limits), r.add(nil), r.add(nil)
	if !shaped.mapped().Shaped || a.mapped().Shaped {
		t.Errorf("shaped %t, other %t", shaped.mapped().Shaped, a.mapped().Shaped)
	}
	stream := func(from, to *pod) time.Duration {
		return testenv.Stream(t, from.netns, to.netns, to.addr(false), bytes)
	}
	// A lower bound of the time: what noise can only make longer.
	least := time.Duration(float64(bytes*8-1000000-64*8*1024) / rate * 0.9 * float64(time.Second))
	for _, c := range []struct {
		from, to *pod
		name     string
	}{{shaped, a, "out of the pod"}, {a, shaped, "into the pod"}} {
		took := stream(c.from, c.to)
		t.Logf("%s: %.1f Mbit/s", c.name, bytes*8/took.Seconds()/1e6)
		if took < least {
			t.Errorf("%s: %s, shaped it takes %s at least", c.name, took, least)
		}
	}
	t.Logf("unshaped: %.0f Mbit/s", bytes*8/stream(a, b).Seconds()/1e6)
	if a.mapped().Shaped || !shaped.mapped().Shaped {
		t.Error("shaping changed")
	}
	r.del(shaped, limits)
	r.del(a, nil)
	r.del(b, nil)
	h.clean()
	p := h.pod()
	p.conf = object{"shaped": true} // by key, for runtimes without the capability
	p.add()
	if !p.mapped().Shaped {
		t.Error("key shaped has no effect")
	}
	p.del()
	h.clean()
}

// TestTuning: a MAC address that a later plugin changes is followed.
func TestTuning(t *testing.T) {
	h := newHost(t)
	const mac = "02:00:5e:00:53:77"
	r := h.runtime("1.0.0", h.plugin(nil), object{"type": "tuning", "mac": mac})
	p := r.add(nil)
	eventually(t, "the MAC address is followed", func() error {
		if got := p.mapped().MAC.String(); got != mac {
			return fmt.Errorf("maps have %s", got)
		}
		if out := h.run("ip", "neigh", "show", p.addr(false).String()); !strings.Contains(out, mac) {
			return errors.New(out)
		}
		return nil
	})
	run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", p.addr(false).String())
	run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", p.addr(true).String())
	must(t, r.cni.CheckNetworkList(t.Context(), r.list, r.conf(p, nil)))
	r.del(p, nil)
	h.clean()
}

// TestForeignIPAM: addresses from Debian's plugins. (CHECK of static, told a gateway, wants that one in the result: ours is
// the one that every pod has.)
func TestForeignIPAM(t *testing.T) {
	h := newHost(t)
	for _, foreign := range []object{
		{"type": "host-local", "dataDir": t.TempDir(), "ranges": [][]object{{{"subnet": "10.9.0.0/24"}}, {{"subnet": "fd00:9::/64"}}}},
		{"type": "static", "addresses": []object{{"address": "10.9.1.7/24"}, {"address": "fd00:9::7/64"}}},
	} {
		testenv.NeedProgram(t, foreign["type"].(string), "containernetworking-plugins")
		h.conf["cniVersion"], h.conf["ipam"] = "1.0.0", foreign
		r := h.runtime("1.0.0", h.plugin(nil))
		p := r.add(nil)
		run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", p.addr(false).String())
		run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", p.addr(true).String())
		if p.result.IPs[0].Gateway != "169.254.1.1" || !strings.HasSuffix(p.result.IPs[0].Address, "/32") {
			t.Errorf("%s", p.raw)
		}
		if foreign["type"] == "host-local" {
			q := r.add(nil)
			p.ping(q.addr(false))
			r.del(q, nil)
		}
		r.del(p, nil)
		h.clean()
		if dir, ok := foreign["dataDir"].(string); ok {
			left, _ := filepath.Glob(dir + "/*/[0-9f]*")
			if len(left) > 0 {
				t.Errorf("host-local still has %v", left)
			}
		}
	}
	p := h.pod()
	p.conf = object{"ipam": object{"type": "no-such-plugin"}}
	p.fails(100, "no-such-plugin", "ADD")
	h.clean()
}

// TestBridge: caracal-ipam as IPAM of the bridge plugin.
func TestBridge(t *testing.T) {
	h := newHost(t)
	r := h.runtime("1.0.0", object{
		"type": "bridge", "bridge": "br0", "isGateway": true, "state_dir": h.state(), "bpffs_dir": h.pins(),
		"ipam": object{"type": "caracal-ipam", "ipv4_pools": []string{"10.244.0.0/24"}, "routes": []object{{"dst": "0.0.0.0/0"}}},
	})
	p, q := r.add(nil), r.add(nil)
	p.ping(q.addr(false))
	p.ping(netip.MustParseAddr("10.244.0.1"))
	for range 2 {
		r.del(p, nil)
		r.del(q, nil)
	}
	h.run("ip", "link", "del", "br0")
	h.clean()
	// By itself: no interfaces in the answer.
	x := h.pod()
	x.h.bin = filepath.Join(filepath.Dir(h.bin), "caracal-ipam")
	x.add()
	if len(x.result.Interfaces) > 0 || x.result.IPs[0].Interface != nil {
		t.Errorf("%s", x.raw)
	}
	check := *x
	check.conf = object{"prevResult": x.raw}
	must(t, check.do("CHECK"))
	x.del()
	check.fails(104, "holds no address", "CHECK")
	h.clean()
}
