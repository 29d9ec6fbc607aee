package migrate

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// export is what `calicoctl datastore migrate export` says of the hosts.
func export(hosts []*host) string {
	var nodes, affinities, blocks []string
	for i, h := range hosts {
		n := i + 1
		nodes = append(nodes, fmt.Sprintf(`- apiVersion: projectcalico.org/v3
  kind: Node
  metadata:
    creationTimestamp: null
    name: %[1]s
  spec:
    bgp:
      ipv4Address: %[2]s/24
    orchRefs:
    - nodeName: %[1]s
      orchestrator: k8s
`, h.Name, h.Addr()))
		attributes, allocations := []any{}, make([]*int, 64)
		for k, p := range h.pods {
			allocations[p.addr.As4()[3]] = &k
			attributes = append(attributes, map[string]any{"handle_id": "k8s-pod-network." + p.id, "secondary": map[string]any{"namespace": "default", "node": h.Name, "pod": p.name}})
		}
		block, _ := json.Marshal(map[string]any{"Key": fmt.Sprintf("/calico/ipam/v2/assignment/ipv4/block/10-244-%d-0-26", n), "Value": map[string]any{
			"cidr": fmt.Sprintf("10.244.%d.0/26", n), "affinity": "host:" + h.Name, "allocations": allocations, "attributes": attributes}})
		blocks = append(blocks, string(block))
		affinities = append(affinities, fmt.Sprintf(`{"Key": "/calico/ipam/v2/host/%s/ipv4/block/10-244-%d-0-26", "Value": {"state": "confirmed"}, "TTL": 0}`, h.Name, n))
	}
	return `apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: IPPool
  metadata:
    creationTimestamp: null
    name: default-ipv4-ippool
  spec:
    allowedUses:
    - Workload
    - Tunnel
    blockSize: 26
    cidr: 10.244.0.0/16
    ipipMode: Never
    natOutgoing: true
    nodeSelector: all()
    vxlanMode: Never
kind: IPPoolList
metadata: {}
---
apiVersion: projectcalico.org/v3
items:
` + strings.Join(nodes, "") + `kind: NodeList
metadata: {}
---
===
{"kind": "ClusterInformation", "apiVersion": "projectcalico.org/v3", "metadata": {"name": "default"}, "spec": {"datastoreReady": false}}
===
{"block_affinities": [` + strings.Join(affinities, ",\n") + `],
"blocks": [` + strings.Join(blocks, ",\n") + `],
"handles": []}
`
}

// store starts etcd on the first host and says on all where it is.
func store(hosts []*host) {
	first := hosts[0]
	url := fmt.Sprintf("http://%s:2379", first.Addr())
	must(first.t, first.StartDaemon("etcd", "etcd", "--data-dir", "/var/lib/etcd", "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", "http://127.0.0.1:2380"))
	for _, h := range hosts {
		h.write("/etc/caracal/caracalctl.cfg", "apiVersion: projectcalico.org/v3\nkind: CalicoAPIConfig\nmetadata: {}\nspec:\n  datastoreType: etcdv3\n  etcdEndpoints: "+url+"\n")
	}
	eventually(first.t, "etcd answers", func() error {
		_, err := first.Sh(first.t.Context(), "/root/caracal/caracalctl get nodes")
		return err
	})
}

func (h *host) startAgent() {
	h.t.Helper()
	must(h.t, h.StartDaemon("caracald", "/root/caracal/caracald"))
}

// installPlugins puts Caracal's plugins in the place of Calico's.
func (h *host) installPlugins() {
	h.t.Helper()
	h.sh("cp /root/caracal/caracal /opt/cni/bin/calico.new && mv /opt/cni/bin/calico.new /opt/cni/bin/calico && ln -sf calico /opt/cni/bin/calico-ipam")
}

// TestConvert converts two hosts, one after the other. Between the two a host of Calico's with BIRD speaks to one of Caracal's.
// Connections between all pods go on from the beginning to the end.
func TestConvert(t *testing.T) {
	hosts := newHosts(t, 2, testenv.Bin(t, "caracal"))
	h1, h2 := hosts[0], hosts[1]
	a, b := h1.pod(1, 5, "a", "0.4.0", false), h1.pod(1, 6, "b", "0.3.1", false)
	c := h2.pod(2, 7, "c", "1.0.0", false)
	eventually(t, "Calico's hosts route to each other", func() error { return a.ping(c.addr) })
	talks := []*talk{a.connect(b, b.addr), a.connect(c, c.addr), c.connect(a, a.addr), c.connect(b, b.addr)}
	all := func(when string) {
		t.Helper()
		for _, k := range talks {
			k.goesOn(when)
		}
	}
	outside := a.connectTo("outside", h1.Lab().Outside().Netns, lab.Outside4)
	talks = append(talks, outside)
	all("with Calico")
	store(hosts)
	h1.write("/root/export.yaml", export(hosts))
	out := h1.ctl("import -f /root/export.yaml")
	if !strings.Contains(out, "IPAMBlock 10.244.1.0/26") || !strings.Contains(out, "IPAMBlock 10.244.2.0/26") {
		t.Errorf("import said:\n%s", out)
	}

	// Calico's agent still runs: nothing is changed.
	before := h1.sh("ip route; ip link; ls -A /var/lib/caracal 2>/dev/null || true")
	if out, err := h1.Sh(t.Context(), "/root/caracal/caracalctl adopt"); err == nil || !strings.Contains(out, "bird (process") || !strings.Contains(out, "nothing was changed") {
		t.Errorf("with BIRD running: %v\n%s", err, out)
	}
	h1.stopBIRD()
	all("without Calico's agent")
	out = h1.ctl("adopt --dry-run")
	if !strings.Contains(out, "default/a  "+a.ifname+"  10.244.1.5  Calico's") || !strings.Contains(out, "chains of iptables-legacy") || !strings.Contains(out, "Routes to blocks: 10.244.1.0/26,10.244.2.0/26") {
		t.Errorf("dry run said:\n%s", out)
	}
	if now := h1.sh("ip route; ip link; ls -A /var/lib/caracal 2>/dev/null | grep -v adopt.lock || true"); now != before {
		t.Errorf("dry run changed\n%s\nto\n%s", before, now)
	}

	// Caracal's agent is not for hosts with pods of Calico's.
	if out, err := h1.Sh(t.Context(), "timeout 20 /root/caracal/caracald"); err == nil || !strings.Contains(out, a.ifname) || !strings.Contains(out, "run caracalctl adopt first") {
		t.Errorf("caracald before adopt: %v\n%s", err, out)
	}
	all("after caracald was tried")

	out = h1.ctl("adopt")
	if strings.Count(out, "Caracal's  -") != 2 {
		t.Errorf("adopt said:\n%s", out)
	}
	all("after adopt")
	routes := h1.sh("ip route")
	for _, want := range []string{"10.244.1.5 dev " + a.ifname + " proto 202 scope link", "blackhole 10.244.1.0/26 proto 202", "10.244.2.0/26 via " + h2.Addr().String() + " dev eth0 proto 202"} {
		if !strings.Contains(routes, want) {
			t.Errorf("no route %q:\n%s", want, routes)
		}
	}
	h1.startAgent()
	h1.established(1)
	all("with caracald")
	if again := h1.ctl("adopt"); strings.Count(again, "Caracal's  -") != 2 || strings.Contains(again, "Routes to blocks") {
		t.Errorf("repeated, adopt said:\n%s", again)
	}
	h1.clean()
	all("without Calico's firewall")
	h1.installPlugins()
	h1.works(a, b)

	// A new pod, under Calico's network, reaches those of both hosts.
	must(t, h1.plugin("ADD", "new", h1.namespace("new"), "default", "new", json.RawMessage(fmt.Sprintf(network, "0.3.1", h1.Name)), nil))
	n := &pod{host: h1, name: "new"}
	eventually(t, "a new pod reaches one of Calico's", func() error { return n.ping(c.addr) })
	must(t, n.ping(a.addr))

	// The other host.
	h2.stopBIRD()
	h2.ctl("adopt")
	all("after adopt on the other host")
	h2.startAgent()
	h1.established(1)
	h2.established(1)
	h2.clean()
	h2.installPlugins()
	h2.works(c)
	all("with Caracal on both")
	eventually(t, "a new pod reaches the other host's", func() error { return n.ping(c.addr) })
	for _, h := range hosts {
		if out := h.ctl("ipam check"); !strings.Contains(out, "0 problems") && !strings.Contains(out, "no problem") {
			t.Logf("ipam check: %s", out)
		}
	}

	// And the pods go as they came.
	for _, k := range talks {
		k.cancel()
		<-k.done
	}
	for _, p := range []*pod{a, b, c} {
		must(t, p.plugin("DEL"))
		must(t, p.plugin("DEL"))
	}
	if out := h2.ctl("pods -o json"); strings.Contains(out, c.ifname) {
		t.Errorf("after DEL:\n%s", out)
	}
	if out := h2.sh("ip link; ip route"); strings.Contains(out, c.ifname) {
		t.Errorf("after DEL:\n%s", out)
	}
}

// TestPolicy: policy that Calico had is in force for adopted pods before an agent runs, by the labels that Calico knew them by; and
// pods of hosts that are Calico's still are known by theirs.
func TestPolicy(t *testing.T) {
	hosts := newHosts(t, 2, testenv.Bin(t, "caracal"))
	h1, h2 := hosts[0], hosts[1]
	web, client, other := h1.pod(1, 5, "web", "0.4.0", false), h1.pod(1, 6, "client", "0.3.1", false), h1.pod(1, 8, "other", "0.3.1", false)
	far, stranger := h2.pod(2, 7, "far", "1.0.0", false), h2.pod(2, 8, "stranger", "1.0.0", false)
	eventually(t, "Calico's hosts route to each other", func() error { return web.ping(far.addr) })
	store(hosts)
	h1.write("/root/export.yaml", export(hosts))
	h1.ctl("import -f /root/export.yaml")
	endpoints := `apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: default.web}
spec:
  selector: app == "web"
  types: [Ingress]
  ingress:
  - {action: Allow, source: {selector: role == "client"}}
`
	for _, p := range []*pod{web, client, other, far, stranger} {
		labels := map[*pod]string{web: "app: web", client: "role: client", far: "role: client"}[p]
		endpoints += fmt.Sprintf(`---
apiVersion: projectcalico.org/v3
kind: WorkloadEndpoint
metadata:
  name: %[1]s-k8s-%[2]s-eth0
  namespace: default
  labels: {%[3]s, projectcalico.org/namespace: default, projectcalico.org/orchestrator: k8s}
spec:
  containerID: "%[4]s"
  endpoint: eth0
  interfaceName: %[5]s
  ipNetworks: [%[6]s/32]
  node: %[1]s
  orchestrator: k8s
  pod: %[2]s
  profiles: [kns.default, ksa.default.default]
  serviceAccountName: default
`, p.host.Name, p.name, map[bool]string{true: "x: z", false: labels}[labels == ""], p.id, p.ifname, p.addr)
	}
	h1.write("/root/endpoints.yaml", endpoints)
	if out := h1.ctl("import -f /root/endpoints.yaml"); strings.Contains(out, "can't be") {
		t.Error(out)
	}
	k := client.connect(web, web.addr)
	h1.stopBIRD()
	h1.ctl("adopt")
	judged := func(when string) {
		t.Helper()
		for _, p := range []*pod{client, far} {
			eventually(t, p.name+" reaches web "+when, func() error { return p.ping(web.addr) })
		}
		for _, p := range []*pod{other, stranger} {
			if p.ping(web.addr) == nil {
				t.Errorf("%s reaches web %s", p.name, when)
			}
		}
		must(t, web.ping(other.addr)) // which is not web
	}
	judged("after adopt")
	k.goesOn("under policy")
	h1.startAgent()
	h1.established(1)
	judged("with caracald")
	h1.clean()
	judged("without Calico's firewall")
	weps := h1.ctl("get workloadendpoints -A -o yaml")
	if strings.Count(weps, "interfaceName: "+web.ifname) != 1 || !strings.Contains(weps, "serviceAccountName: default") || strings.Contains(weps, "name: h1-k8s-web-eth0") {
		t.Errorf("endpoints in the store:\n%s", weps)
	}
	h2.stopBIRD()
	h2.ctl("adopt")
	h2.startAgent()
	h2.established(1)
	judged("with both hosts converted")
	k.goesOn("at the end")
}

// namespace makes one for a new pod.
func (h *host) namespace(name string) string {
	h.t.Helper()
	h.sh("ip netns add cni-%[1]s && ip -n cni-%[1]s link set lo up", name)
	return "/run/netns/cni-" + name
}

// works makes sure that adopted pods are as Caracal's own: CHECK with what the runtime remembers, by the command line, by doctor.
func (h *host) works(pods ...*pod) {
	h.t.Helper()
	for _, p := range pods {
		if p.version == "0.3.1" {
			continue // which knows no CHECK
		}
		if err := p.plugin("CHECK"); err != nil {
			h.t.Errorf("%s: %v", p.name, err)
		}
	}
	out := h.ctl("pods")
	for _, p := range pods {
		if !strings.Contains(out, p.ifname) || !strings.Contains(out, p.addr.String()) {
			h.t.Errorf("pods lacks %s:\n%s", p.name, out)
		}
	}
}

// clean removes what is left of Calico, and looks that it is gone.
func (h *host) clean() {
	h.t.Helper()
	out := h.ctl("adopt --clean")
	if strings.Count(out, "removed") < 3 {
		h.t.Errorf("clean said:\n%s", out)
	}
	left := h.sh("iptables-legacy-save; ipset list -n; ip route; ls -d /var/lib/calico 2>/dev/null || true")
	for _, word := range []string{"cali-", "cali40", "proto bird", "/var/lib/calico"} {
		if strings.Contains(left, word) {
			h.t.Errorf("%s is left:\n%s", word, left)
		}
	}
	h.sh("test -e /etc/cni/net.d/10-calico.conflist")
}

// established waits until the agent has so many sessions, or more, and no problem.
func (h *host) established(sessions int) {
	h.t.Helper()
	eventually(h.t, h.Name+" has its sessions", func() error {
		out, err := h.Sh(h.t.Context(), "/root/caracal/caracalctl node status")
		if err != nil {
			return err
		}
		if strings.Count(out, "Established") < sessions || strings.Contains(out, "Problem") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// state is all that adopt may double or lose.
func (h *host) state() string {
	h.t.Helper()
	return h.sh("ip -o link show group 202 | awk '{print $2}' | sort; ip route show proto 202 | sort; /root/caracal/caracalctl pods -o json | jq -S 'map({hostInterface, addresses, ifindex})' 2>/dev/null || true; /root/caracal/caracalctl ipam show -o json")
}

// TestKilled ends adopt at each of its steps. The pods have their network at any time, and repeated it ends as if never interrupted.
func TestKilled(t *testing.T) {
	hosts := newHosts(t, 1, testenv.Faulty(t, "caracal"))
	h := hosts[0]
	a, b := h.pod(1, 5, "a", "0.4.0", false), h.pod(1, 6, "b", "0.4.0", false)
	h.write("/root/export.yaml", export(hosts))
	h.ctl("import -f /root/export.yaml")
	h.stopBIRD()
	k := a.connect(b, b.addr)
	k.goesOn("at first")
	h.ctl("adopt")
	want := h.state()
	h.ctl("adopt --undo")
	if left := h.sh("ip -o link show group 202"); left != "" {
		t.Errorf("undo left\n%s", left)
	}
	k.goesOn("after undo")
	steps := []string{"adopt-load", "adopt-record", "adopt-sysctl", "adopt-lead", "adopt-commit", "adopt-policy", "adopt-attach", "adopt-pod", "adopt-host", "adopt-done"}
	for at, step := range steps {
		if out, err := h.Sh(t.Context(), "CARACAL_FAULT="+step+":kill /root/caracal/caracalctl adopt"); err == nil {
			t.Errorf("killed at %s it ended well: %s", step, out)
		}
		k.goesOn("when killed at " + step)
		must(t, a.ping(b.addr))
		must(t, b.ping(a.addr))
		// Two at once: one of them does it, the other says that it does not, and nothing is doubled.
		repeat := "/root/caracal/caracalctl adopt"
		if step == "adopt-record" || step == "adopt-attach" {
			repeat = "for i in 1 2; do (/root/caracal/caracalctl adopt >/tmp/out$i 2>&1; echo $? >/tmp/rc$i) & done; wait; cat /tmp/out1 /tmp/out2; cat /tmp/rc1 /tmp/rc2 | sort | head -1 | grep -qx 0"
		}
		h.sh("%s", repeat)
		if got := h.state(); got != want {
			t.Errorf("killed at %s and repeated it left\n%s\nnot\n%s", step, got, want)
		}
		k.goesOn("when repeated after " + step)
		if at == 0 {
			for _, step := range []string{"return-detach", "return-unmap", "return-forget"} {
				h.Sh(t.Context(), "CARACAL_FAULT="+step+":kill /root/caracal/caracalctl adopt --undo")
				must(t, a.ping(b.addr))
			}
		}
		h.ctl("adopt --undo")
		k.goesOn("when given back after " + step)
	}
	if routes := h.sh("ip route show proto 202"); routes != "" {
		t.Errorf("after undo: %s", routes)
	}
	h.startBIRD()
	k.goesOn("with Calico's agent again")
}

// TestRefuses: what stands in the way is said, and nothing is changed.
func TestRefuses(t *testing.T) {
	hosts := newHosts(t, 1, testenv.Bin(t, "caracal"))
	h := hosts[0]
	a := h.pod(1, 5, "a", "0.4.0", false)
	h.stopBIRD()
	refused := func(want string) {
		t.Helper()
		before := h.sh("ip route; ip link")
		out, err := h.Sh(t.Context(), "/root/caracal/caracalctl adopt")
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("%v, and not %q:\n%s", err, want, out)
		}
		if now := h.sh("ip route; ip link"); now != before {
			t.Errorf("it changed\n%s\nto\n%s", before, now)
		}
	}
	borrowed := strings.ReplaceAll(export(hosts), "host:h1", "host:h9")
	borrowed = strings.ReplaceAll(borrowed, "/host/h1/", "/host/h9/")
	h.write("/root/export.yaml", borrowed)
	h.ctl("import -f /root/export.yaml --skip")
	refused("is of a block of node h9, not of h1")
	h.sh("rm -rf /var/lib/caracal")
	h.write("/root/export.yaml", strings.NewReplacer("10.244.", "10.99.", "10-244-", "10-99-").Replace(export(hosts)))
	h.ctl("import -f /root/export.yaml")
	refused("in no pool: import Calico's pools first")
	h.sh("rm -rf /var/lib/caracal")
	h.sh("ip link add cali0123456789a type veth peer name x")
	refused("interface cali0123456789a looks like Calico's")
	h.sh("ip link del x; ip route del " + a.addr.String())
	refused("the host does not route 10.244.1.5")
	h.sh("ip route add %s dev %s scope link; ip -n cni-a addr del %s/32 dev eth0", a.addr, a.ifname, a.addr)
	refused("the pod does not have address 10.244.1.5")
	h.sh("ip -n cni-a addr add %s/32 dev eth0; ip -n cni-a route add default via 169.254.1.1 dev eth0 2>/dev/null || true; ip link set %s down", a.addr, a.ifname)
	refused("is down")
	h.sh("ip link set %s up; ip route add %s dev %s scope link", a.ifname, a.addr, a.ifname)

	// A pod of Caracal's has the address by now: the wrong order.
	h.installPlugins()
	h.sh("mkdir -p /var/lib/caracal")
	err := h.plugin("ADD", "new", h.namespace("new"), "default", "new", json.RawMessage(strings.Replace(fmt.Sprintf(network, "0.3.1", h.Name), `"type": "calico-ipam"`, `"type": "calico-ipam", "ipv4_pools": ["10.244.1.4/30"], "ipv4_block_size": 30`, 1)), nil)
	must(t, err) // .4
	err = h.plugin("ADD", "next", h.namespace("next"), "default", "next", json.RawMessage(strings.Replace(fmt.Sprintf(network, "0.3.1", h.Name), `"type": "calico-ipam"`, `"type": "calico-ipam", "ipv4_pools": ["10.244.1.4/30"], "ipv4_block_size": 30`, 1)), nil)
	if err == nil || !strings.Contains(err.Error(), "caracalctl adopt") {
		t.Errorf("ADD with an address that Calico's pod has: %v", err)
	}
}

// TestIPv6 adopts a pod of both families: its gateway becomes another one.
func TestIPv6(t *testing.T) {
	hosts := newHosts(t, 1, testenv.Bin(t, "caracal"))
	h := hosts[0]
	a, b := h.pod(1, 5, "a", "1.0.0", true), h.pod(1, 6, "b", "0.4.0", true)
	h.write("/root/export.yaml", export(hosts)+"===\n"+`{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "six"}, "spec": {"cidr": "fd00:10:244::/64"}}`)
	h.ctl("import -f /root/export.yaml")
	h.stopBIRD()
	h.sh("ip link add vxlan.calico type vxlan id 4096 dstport 4789 dev eth0; ip addr add 10.244.1.0/32 dev vxlan.calico; ip link set vxlan.calico up")
	eventually(t, "IPv6 works with Calico", func() error { return a.ping(b.addr6) })
	talks := []*talk{a.connect(b, b.addr), a.connect(b, b.addr6), b.connect(a, a.addr6)}
	h.ctl("adopt")
	h.sh("ip -n cni-a neigh flush dev eth0; ip -n cni-b neigh flush dev eth0; ip -n cni-a -6 neigh flush dev eth0")
	for _, k := range talks {
		k.goesOn("after adopt")
	}
	h.sh("ip -n cni-a neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee nud permanent dev eth0")
	h.installPlugins()
	must(t, a.ping(b.addr6))
	// The address of Calico's tunnel is nobody's until the tunnel is removed.
	conf := json.RawMessage(strings.Replace(fmt.Sprintf(network, "0.3.1", h.Name), `"type": "calico-ipam"`, `"type": "calico-ipam", "ipv4_pools": ["10.244.0.0/16"]`, 1))
	must(t, h.plugin("ADD", "new", h.namespace("new"), "default", "new", conf, nil))
	if addrs := h.sh("ip -n cni-new -4 addr show eth0; ip -n cni-new -4 -o addr show eth0 | awk '{print $4}'"); !strings.Contains(addrs, "10.244.1.1/32") {
		t.Errorf("the new pod has %s", addrs)
	}
	h.ctl("ipam check")
	if out := h.ctl("adopt --clean"); !strings.Contains(out, "vxlan.calico") {
		t.Errorf("clean said\n%s", out)
	}
	h.sh("! ip link show vxlan.calico")
	h.ctl("ipam check")
	pods := h.ctl("pods -o json")
	for _, want := range []netip.Addr{a.addr, a.addr6, b.addr6} {
		if !strings.Contains(pods, want.String()) {
			t.Errorf("pods lacks %s:\n%s", want, pods)
		}
	}
	if gw := h.sh("ip -n cni-a -6 route show default"); !strings.Contains(gw, "fe80::1 ") || slices.Max([]int{strings.Count(gw, "default")}) != 1 {
		t.Errorf("default route: %s", gw)
	}
}
