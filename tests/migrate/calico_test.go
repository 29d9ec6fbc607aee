// Package migrate converts hosts of Calico's to Caracal, with pods that run meanwhile.
//
//	   h1                      h2
//	pods a, b               pod c
//	Calico's, then          Calico's, then
//	Caracal's               Caracal's
//	etcd, BIRD -> caracald  BIRD -> caracald
//	    |                       |
//	    +------- switch --------+
//
// What Calico makes on a host is made here as its CNI plugin, its agent and its image make it (veth pairs, sysctls, routes,
// result cache, firewall, files; dataplane_linux.go and the manifests), so that it can be made in many ways. BIRD is the real one, and so
// is all that converts. tests/kubernetes has Calico's own plugin.
package migrate

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// host is a machine that Calico runs on, or has run on.
type host struct {
	t testing.TB
	*lab.Machine
	pods []*pod
}

// pod is one that Calico's plugin has attached.
type pod struct {
	host             *host
	name, id, ifname string // of the host's end
	addr, addr6      netip.Addr
	prevResult, conf json.RawMessage
	version          string
}

// network is the file that Calico's manifest installs for Kubernetes, its placeholders filled in as Calico's image does.
const network = `{
  "name": "k8s-pod-network",
  "cniVersion": "%s",
  "plugins": [
    {
      "type": "calico",
      "log_level": "info",
      "log_file_path": "/var/log/calico/cni/cni.log",
      "datastore_type": "kubernetes",
      "nodename": "%s",
      "mtu": 0,
      "ipam": {
          "type": "calico-ipam"
      },
      "policy": {
          "type": "k8s"
      },
      "kubernetes": {
          "kubeconfig": "/etc/cni/net.d/calico-kubeconfig"
      }
    },
    {
      "type": "portmap",
      "snat": true,
      "capabilities": {"portMappings": true}
    },
    {
      "type": "bandwidth",
      "capabilities": {"bandwidth": true}
    }
  ]
}
`

// newHosts boots machines and makes Calico hosts of them; host i has block 10.244.i.0/26.
func newHosts(t testing.TB, n int, caracal string) []*host {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedProgram(t, "etcd", "etcd-server")
	testenv.NeedProgram(t, "bird", "bird2")
	testenv.NeedProgram(t, "ipset", "ipset")
	hosts := newMachines(t, n, caracal)
	for i, h := range hosts {
		h.becomeCalico(i+1, hosts)
	}
	return hosts
}

// newMachines boots machines without anything of Calico's.
func newMachines(t testing.TB, n int, caracal string) []*host {
	t.Helper()
	l := lab.New(t, lab.Config{Hosts: n, Outside: true, Cluster: true, Caracal: caracal})
	var hosts []*host
	for _, lh := range l.Hosts() {
		m, err := lh.Boot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, &host{t: t, Machine: m})
	}
	return hosts
}

// sh runs a script on the machine, and fails the test if that fails.
func (h *host) sh(script string, args ...any) string {
	h.t.Helper()
	if len(args) > 0 {
		script = fmt.Sprintf(script, args...)
	}
	out, err := h.Sh(h.t.Context(), script)
	if err != nil {
		h.t.Fatalf("%s# %s\n%v", h.Name, script, err)
	}
	return out
}

// ctl runs caracalctl there.
func (h *host) ctl(args string) string {
	h.t.Helper()
	return h.sh("/root/caracal/caracalctl " + args)
}

func (h *host) write(path, text string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.Path(path)), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(h.Path(path), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

const birdConf = `router id %s;
protocol device {}
protocol kernel { learn; persist; graceful restart; metric 0; ipv4 { import all; export all; }; }
protocol static { ipv4; route 10.244.%d.0/26 blackhole; }
filter calico_export_to_bgp_peers {
  if (net ~ 10.244.0.0/16 && net.len = 26) then accept;
  reject;
}
template bgp bgp_template {
  local as 64512;
  multihop;
  hold time 90; connect delay time 2; connect retry time 5; error wait time 2, 5;
  ipv4 { import all; export filter calico_export_to_bgp_peers; next hop self; gateway direct; };
  graceful restart;
  enforce first as off;
}
`

// becomeCalico makes what Calico's image and agent make.
func (h *host) becomeCalico(i int, all []*host) {
	h.t.Helper()
	h.write("/etc/cni/net.d/10-calico.conflist", fmt.Sprintf(network, "0.3.1", h.Name))
	h.write("/etc/cni/net.d/calico-kubeconfig", "# Kubeconfig file for Calico CNI plugin.\n")
	h.write("/var/lib/calico/nodename", h.Name)
	h.write("/var/lib/calico/mtu", "1500")
	h.write("/opt/cni/bin/calico", "#!/bin/sh\necho Calico >&2; exit 1\n")
	h.sh("ln -s /usr/lib/cni/portmap /usr/lib/cni/bandwidth /opt/cni/bin/") // which Calico's network names
	conf := fmt.Sprintf(birdConf, h.Addr(), i)
	for j, other := range all {
		if j+1 == i {
			continue
		}
		passive := ""
		if j+1 > i { // the mesh is unidirectional: the other one calls
			passive = "passive on; "
		}
		conf += fmt.Sprintf("protocol bgp Mesh_%s from bgp_template { neighbor %s as 64512; source address %s; direct; %s}\n",
			strings.ReplaceAll(other.Addr().String(), ".", "_"), other.Addr(), h.Addr(), passive)
	}
	h.write("/etc/bird.conf", strings.Replace(conf, "  multihop;\n", "", 1))
	h.sh("sysctl -q -w net.ipv4.ip_forward=1")
	h.sh("sysctl -q -w net.ipv6.conf.all.forwarding=1")
	h.startBIRD()
	h.sh("ipset create cali40all-ipam-pools hash:net && ipset add cali40all-ipam-pools 10.244.0.0/16")
	h.firewall()
}

func (h *host) startBIRD() {
	h.t.Helper()
	if err := h.StartDaemon("bird", "bird", "-f", "-c", "/etc/bird.conf", "-s", "/run/bird.ctl", "-P", "/run/bird.pid"); err != nil {
		h.t.Fatal(err)
	}
}

// stopBIRD ends Calico's agent as `docker kill` does: its routes stay, and as it did not say goodbye its peers keep theirs for the
// time of a graceful restart.
func (h *host) stopBIRD() {
	h.t.Helper()
	if err := h.Signal(h.t.Context(), "bird", unix.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
}

// firewall writes chains as Felix does: what goes to or comes from a cali interface goes by that interface's own chains, and what has
// none is dropped.
func (h *host) firewall() {
	h.t.Helper()
	var from, to, own strings.Builder
	for _, p := range h.pods {
		tail := strings.TrimPrefix(p.ifname, "cali")
		fmt.Fprintf(&own, ":cali-fw-%s - [0:0]\n:cali-tw-%s - [0:0]\n", p.ifname, p.ifname)
		fmt.Fprintf(&from, "-A cali-from-wl-dispatch -i %s -m comment --comment \"cali:%s\" -g cali-fw-%s\n", p.ifname, tail, p.ifname)
		fmt.Fprintf(&to, "-A cali-to-wl-dispatch -o %s -m comment --comment \"cali:%s\" -g cali-tw-%s\n", p.ifname, tail, p.ifname)
		for _, c := range []string{"cali-fw-" + p.ifname, "cali-tw-" + p.ifname} {
			fmt.Fprintf(&to, "-A %s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A %s -m conntrack --ctstate INVALID -j DROP\n-A %s -j MARK --set-xmark 0x10000/0x10000\n", c, c, c)
		}
	}
	h.write("/run/calico.rules", `*filter
:cali-FORWARD - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-to-wl-dispatch - [0:0]
`+own.String()+`-D FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-D FORWARD -m comment --comment "cali:S93hcgKJrXEqnTfs" -m mark --mark 0x10000/0x10000 -j ACCEPT
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-A FORWARD -m comment --comment "cali:S93hcgKJrXEqnTfs" -m comment --comment "Policy explicitly accepted packet." -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-FORWARD -i cali+ -j cali-from-wl-dispatch
-A cali-FORWARD -o cali+ -j cali-to-wl-dispatch
`+from.String()+`-A cali-from-wl-dispatch -m comment --comment "Unknown interface" -j DROP
`+to.String()+`-A cali-to-wl-dispatch -m comment --comment "Unknown interface" -j DROP
COMMIT
*nat
:cali-POSTROUTING - [0:0]
:cali-nat-outgoing - [0:0]
-A POSTROUTING -m comment --comment "cali:O3lYWMrLQYEMJtB5" -j cali-POSTROUTING
-A cali-POSTROUTING -j cali-nat-outgoing
-A cali-nat-outgoing -s 10.244.0.0/16 -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE
COMMIT
`)
	h.sh(`grep -v -e '^-D' /run/calico.rules > /run/calico.new
iptables-legacy -F; iptables-legacy -t nat -F
iptables-legacy-restore --noflush < /run/calico.new
iptables-legacy -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE # Docker's`)
}

// pod attaches a pod as Calico's plugin does. number is its place in the host's block.
func (h *host) pod(block, number int, name, version string, six bool) *pod {
	h.t.Helper()
	sum := sha1.Sum([]byte("default." + name))
	p := &pod{host: h, name: name, id: fmt.Sprintf("%064x", block<<8|number), ifname: "cali" + hex.EncodeToString(sum[:])[:11], version: version,
		addr: netip.AddrFrom4([4]byte{10, 244, byte(block), byte(number)})}
	ips := []any{calicoIP(version, p.addr)}
	h.sh(`set -e; ns=cni-%[1]s; if=%[2]s; ip=%[3]s
ip netns add $ns
ip -n $ns link set lo up
ip -n $ns link add eth0 mtu 1500 type veth peer name $if
ip -n $ns link set $if address ee:ee:ee:ee:ee:ee
ip -n $ns link set $if up
ip -n $ns link set eth0 up
ip -n $ns route add 169.254.1.1 dev eth0 scope link
ip -n $ns route add default via 169.254.1.1 dev eth0
ip -n $ns addr add $ip/32 dev eth0`, p.name, p.ifname, p.addr)
	if six {
		p.addr6 = netip.MustParseAddr(fmt.Sprintf("fd00:10:244::%x:%x", block, number))
		ips = append(ips, calicoIP(version, p.addr6))
		h.sh(`set -e; ns=cni-%[1]s; if=%[2]s; ip=%[3]s
ip -n $ns addr add $ip/128 dev eth0 nodad
for i in 1 2 3 4 5 6 7 8 9 10; do
  gw=$(ip -n $ns -6 -o addr show dev $if scope link -tentative | awk '{print $4}')
  [ -n "$gw" ] && break
  sleep 0.3
done
ip -n $ns -6 route add default via ${gw%%/64} dev eth0`, p.name, p.ifname, p.addr6)
	}
	h.sh(`set -e; ns=cni-%[1]s; if=%[2]s; ip=%[3]s
ip -n $ns link set $if netns 1
echo 1 > /proc/sys/net/ipv4/conf/$if/route_localnet
echo 0 > /proc/sys/net/ipv4/neigh/$if/proxy_delay
echo 1 > /proc/sys/net/ipv4/conf/$if/proxy_arp
echo 1 > /proc/sys/net/ipv4/conf/$if/forwarding
ip link set $if up
ip route add $ip dev $if scope link`, p.name, p.ifname, p.addr)
	if six {
		h.sh(`set -e; if=%[1]s
echo 1 > /proc/sys/net/ipv6/conf/$if/proxy_ndp
echo 1 > /proc/sys/net/ipv6/conf/$if/forwarding
ip -6 route add %[2]s dev $if`, p.ifname, p.addr6)
	}
	p.conf = json.RawMessage(fmt.Sprintf(network, version, h.Name))
	result := map[string]any{"cniVersion": version, "interfaces": []any{map[string]any{"name": p.ifname}}, "ips": ips, "dns": map[string]any{}}
	p.prevResult, _ = json.Marshal(result)
	entry, _ := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": p.id, "config": []byte(p.conf), "ifName": "eth0", "networkName": "k8s-pod-network",
		"cniArgs": [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", name}, {"K8S_POD_INFRA_CONTAINER_ID", p.id}},
		"result":  p.prevResult,
	})
	h.write("/var/lib/cni/results/k8s-pod-network-"+p.id+"-eth0", string(entry))
	h.pods = append(h.pods, p)
	h.firewall()
	return p
}

// calicoIP is an address as Calico's plugin answers it: no interface.
func calicoIP(version string, a netip.Addr) any {
	ip := map[string]any{"address": netip.PrefixFrom(a, a.BitLen()).String()}
	if strings.HasPrefix(version, "0.") {
		ip["version"] = "4"
		if a.Is6() {
			ip["version"] = "6"
		}
	}
	return ip
}

// netns is the pod's namespace, seen from here.
func (p *pod) netns() string { return p.host.Path("/run/netns/cni-" + p.name) }

// plugin calls Caracal's plugin for the pod, as a runtime does with what its cache has.
func (p *pod) plugin(command string) error {
	return p.host.plugin(command, p.id, "/run/netns/cni-"+p.name, "default", p.name, p.conf, p.prevResult)
}

// plugin calls the first plugin of a network as libcni does.
func (h *host) plugin(command, id, netns, namespace, name string, conf, prev json.RawMessage) error {
	var list struct {
		CNIVersion string                       `json:"cniVersion"`
		Name       string                       `json:"name"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(conf, &list); err != nil {
		return err
	}
	first := list.Plugins[0]
	first["name"], _ = json.Marshal(list.Name)
	first["cniVersion"], _ = json.Marshal(list.CNIVersion)
	if prev != nil {
		first["prevResult"] = prev
	}
	stdin, err := json.Marshal(first)
	if err != nil {
		return err
	}
	cmd := h.Command(h.t.Context(), "/opt/cni/bin/"+strings.Trim(string(first["type"]), `"`))
	cmd.Env = append(cmd.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+id, "CNI_NETNS="+netns, "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+namespace+";K8S_POD_NAME="+name)
	cmd.Stdin = strings.NewReader(string(stdin))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

// talk is a TCP connection between two pods on which one line after the other goes to and fro.
type talk struct {
	t      testing.TB
	name   string
	count  atomic.Int64
	broken atomic.Pointer[error]
	cancel context.CancelFunc
	done   chan struct{}
}

// connect opens a connection from p to q and keeps it busy until the test ends.
func (p *pod) connect(q *pod, to netip.Addr) *talk {
	p.host.t.Helper()
	return p.connectTo(q.name, q.netns(), to)
}

// connectTo is connect for what is not a pod.
func (p *pod) connectTo(name, space string, to netip.Addr) *talk {
	t := p.host.t
	t.Helper()
	listen := net.ListenConfig{}
	var l net.Listener
	must(t, netns.Do(space, func() (err error) {
		l, err = listen.Listen(t.Context(), "tcp", netip.AddrPortFrom(to, 0).String())
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go testenv.Echo(l)
	var c net.Conn
	must(t, netns.Do(p.netns(), func() (err error) {
		c, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", l.Addr().String())
		return err
	}))
	ctx, cancel := context.WithCancel(context.Background())
	k := &talk{t: t, name: p.name + " to " + name, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(k.done)
		defer c.Close()
		buf := make([]byte, 64)
		for ctx.Err() == nil {
			if _, err := c.Write([]byte("hello")); err != nil {
				k.broken.Store(&err)
				return
			}
			c.SetReadDeadline(time.Now().Add(30 * time.Second))
			if _, err := c.Read(buf); err != nil {
				k.broken.Store(&err)
				return
			}
			k.count.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-k.done })
	return k
}

// goesOn makes sure that the connection lives: lines come and go from now on.
func (k *talk) goesOn(when string) {
	k.t.Helper()
	before := k.count.Load()
	eventually(k.t, "the connection from "+k.name+" goes on "+when, func() error {
		if err := k.broken.Load(); err != nil {
			k.t.Fatalf("the connection from %s broke, %s: %v", k.name, when, *err)
		}
		if k.count.Load() < before+3 {
			return errors.New("nothing came back")
		}
		return nil
	})
}

func (p *pod) ping(to netip.Addr) error {
	out, err := p.host.Sh(p.host.t.Context(), fmt.Sprintf("nsenter --net=/run/netns/cni-%s ping -n -c 1 -W 1 %s", p.name, to))
	if err != nil {
		return fmt.Errorf("%w %s", err, out)
	}
	return nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until fn says nil.
func eventually(t testing.TB, what string, fn func() error) {
	t.Helper()
	testenv.Eventually(t, 40*time.Second, what, fn)
}
