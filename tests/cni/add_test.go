package cni

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestVersions adds, checks and removes a pod in every version of the specification, and compares results with golden files.
func TestVersions(t *testing.T) {
	h := newHost(t)
	for _, v := range []string{"", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		p := h.pod()
		p.conf = object{
			"cniVersion": v, "dns": object{"nameservers": []string{"192.0.2.53"}, "search": []string{"example.org"}},
			"args": object{"cni": object{"mac": "02:00:5e:00:53:01", "ips": []string{"10.244.7.7", "fd00:10::77"}}},
		}
		p.add()
		name := "result-" + v + ".json"
		got := []byte(strings.ReplaceAll(string(p.raw), p.netns, "/run/netns/pod"))
		got = regexp.MustCompile(`cali[0-9a-f]{11}`).ReplaceAll(got, []byte("caliXXXXXXXXXXX"))
		golden(t, name, got)
		check := *p
		check.conf = object{"cniVersion": v, "prevResult": p.raw}
		if v >= "0.4.0" {
			must(t, check.do("CHECK"))
		} else {
			check.fails(1, "0.4.0", "CHECK")
		}
		for _, command := range []string{"GC", "STATUS"} {
			all := *p
			all.conf = object{"cniVersion": v, "cni.dev/valid-attachments": []object{{"containerID": p.id, "ifname": "eth0"}}}
			if v == "1.1.0" {
				must(t, all.do(command))
			} else {
				all.fails(1, "1.1.0", command)
			}
		}
		p.del()
	}
	h.clean()
	p := h.pod()
	for _, v := range []string{"1.2.0", "x", "0.0.1", "1.1"} {
		p.conf = object{"cniVersion": v}
		p.fails(1, "", "ADD")
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if string(got) != string(want) {
		t.Errorf("%s differs (go test -update rewrites it):\n%s", name, got)
	}
}

// TestVersionCommand: VERSION answers in the version of the question.
func TestVersionCommand(t *testing.T) {
	h := newHost(t)
	for _, v := range []string{"0.1.0", "0.4.0", "1.0.0", "1.1.0", "9.9.9"} {
		out, code := h.call(h.bin, fmt.Appendf(nil, `{"cniVersion":%q}`, v), "CNI_COMMAND=VERSION")
		var answer struct {
			CNIVersion        string
			SupportedVersions []string
		}
		if err := json.Unmarshal(out, &answer); code != 0 || err != nil || answer.CNIVersion != v || !slices.Contains(answer.SupportedVersions, "1.1.0") {
			t.Errorf("VERSION of %s: exit %d, %s", v, code, out)
		}
	}
	// Some runtimes ask with dummies.
	if out, code := h.call(h.bin, nil, "CNI_COMMAND=VERSION", "CNI_NETNS=dummy", "CNI_IFNAME=dummy", "CNI_PATH=dummy"); code != 0 {
		t.Errorf("VERSION with nothing on stdin: exit %d, %s", code, out)
	}
}

// TestLooks: `ip a` and `ip route` on both ends are as on a Calico node.
func TestLooks(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	p.ip("link", "set", "lo", "up")
	run(t, p.ns, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1") // as Docker and containerd have it
	p.add()
	v4, v6, host := p.addr(false), p.addr(true), p.hostIf()
	for _, c := range []struct {
		where, got string
		want       []string
	}{
		{"pod", p.ip("-4", "-o", "addr", "show", "eth0"), []string{"inet " + v4.String() + "/32 scope global eth0"}},
		{"pod", p.ip("-6", "-o", "addr", "show", "eth0", "scope", "global"), []string{"inet6 " + v6.String() + "/128 scope global nodad"}},
		{"pod", p.ip("route"), []string{"default via 169.254.1.1 dev eth0", "169.254.1.1 dev eth0 scope link"}},
		{"pod", p.ip("-6", "route"), []string{"default via fe80::1 dev eth0", "fe80::1 dev eth0", v6.String() + " dev eth0"}},
		{"pod", p.ip("neigh"), []string{"169.254.1.1 dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT", "fe80::1 dev eth0 lladdr ee:ee:ee:ee:ee:ee PERMANENT"}},
		{"host", h.run("ip", "route"), []string{v4.String() + " dev " + host + " proto 202 scope link", "blackhole 10.244.0.0/26 proto 202"}},
		{"host", h.run("ip", "-6", "route"), []string{v6.String() + " dev " + host + " proto 202", "blackhole fd00:10::/122 dev lo proto 202"}},
		{"host", h.run("ip", "neigh"), []string{v4.String() + " dev " + host + " lladdr " + p.result.Interfaces[1].Mac + " PERMANENT"}},
		{"host", h.run("ip", "link", "show", host), []string{"mtu 1500", "UP", "link/ether ee:ee:ee:ee:ee:ee"}},
	} {
		for _, want := range c.want {
			if !strings.Contains(strings.ReplaceAll(c.got, "  ", " "), want) {
				t.Errorf("%s lacks %q:\n%s", c.where, want, c.got)
			}
		}
	}
	if p.result.Interfaces[0].Sandbox != "" || p.result.Interfaces[1].Sandbox != p.netns || *p.result.IPs[0].Interface != 1 {
		t.Errorf("result: %s", p.raw)
	}
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if got := h.run("cat", "/proc/sys/net/"+f); got != "1" {
			t.Errorf("%s is %s", f, got)
		}
	}
	p.del()
	h.clean()
}

// TestTTL: two pods of one host are one hop apart, on the first packet and on the hundredth, and before and after the pod
// settles.
func TestTTL(t *testing.T) {
	h := newHost(t)
	a, b := h.pod().add(), h.pod().add()
	for _, round := range []string{"quick", "settled"} {
		if round == "settled" {
			a.settled()
			b.settled()
		}
		for _, v6 := range []bool{false, true} {
			out := run(t, a.ns, "ping", "-n", "-i", "0.002", "-c", "100", "-W", "3", b.addr(v6).String())
			if n := strings.Count(out, "ttl=63"); n != 100 {
				t.Errorf("%s, v6 %t: %d of 100 answers with TTL 63:\n%s", round, v6, n, out)
			}
		}
		run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", a.addr(false).String())
		a.ping(netip.MustParseAddr("192.0.2.1"))
	}
	a.del()
	b.del()
	h.clean()
}

// TestPrevResult: what came before us in the chain is passed on as it is.
func TestPrevResult(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	p.conf = object{"cniVersion": "1.0.0", "prevResult": object{
		"cniVersion": "1.0.0", "interfaces": []object{{"name": "net0", "mac": "02:00:00:00:00:42", "sandbox": p.netns}},
		"ips": []object{{"address": "192.0.2.9/24", "gateway": "192.0.2.1", "interface": 0}},
		"dns": object{"nameservers": []string{"192.0.2.53"}},
	}}
	p.add()
	r := p.result
	if len(r.Interfaces) != 3 || r.Interfaces[0].Name != "net0" || r.Interfaces[0].Mac != "02:00:00:00:00:42" ||
		len(r.IPs) != 3 || r.IPs[0].Address != "192.0.2.9/24" || *r.IPs[0].Interface != 0 || *r.IPs[1].Interface != 2 ||
		!strings.Contains(string(p.raw), "192.0.2.53") {
		t.Errorf("%s", p.raw)
	}
	check := *p
	check.conf = object{"cniVersion": "1.0.0", "prevResult": p.raw}
	must(t, check.do("CHECK"))
	p.del()
	h.clean()
}

// TestRequested: addresses and MAC from all that can ask for them, and who wins.
func TestRequested(t *testing.T) {
	h := newHost(t)
	for _, c := range []struct {
		args    string
		conf    object
		v4, mac string
	}{
		{"IP=10.244.1.1;MAC=02:00:00:00:00:01", nil, "10.244.1.1", "02:00:00:00:00:01"},
		{"IgnoreUnknown=1;IP=10.244.1.1/16;X=y;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web", nil, "10.244.1.1", ""},
		{"IP=10.244.1.1;MAC=02:00:00:00:00:01", object{"args": object{"cni": object{"ips": []string{"10.244.1.2"}, "mac": "02:00:00:00:00:02"}}}, "10.244.1.2", "02:00:00:00:00:02"},
		{"IP=10.244.1.1;MAC=02:00:00:00:00:01", object{
			"args":          object{"cni": object{"ips": []string{"10.244.1.2"}, "mac": "02:00:00:00:00:02"}},
			"runtimeConfig": object{"ips": []string{"10.244.1.3/32"}, "mac": "02:00:00:00:00:03"},
		}, "10.244.1.3", "02:00:00:00:00:03"},
		{"IP=10.244.1.1", annotated(`["10.244.1.4"]`, "02:00:00:00:00:04"), "10.244.1.4", "02:00:00:00:00:04"},
		{"IP=10.244.1.1;MAC=02:00:00:00:00:01", annotated(`[]`, ""), "10.244.1.1", "02:00:00:00:00:01"},
	} {
		p := h.pod()
		p.args, p.conf = c.args, c.conf
		p.add()
		if got := p.addr(false).String(); got != c.v4 || c.mac != "" && p.result.Interfaces[1].Mac != c.mac {
			t.Errorf("%s %v: %s", c.args, c.conf, p.raw)
		}
		if out := p.ip("link", "show", "eth0"); !strings.Contains(out, p.result.Interfaces[1].Mac) {
			t.Errorf("the interface is not as the result says: %s", out)
		}
		if p.addr(true).Is6() == false {
			t.Error("no IPv6 address beside the requested one")
		}
		p.del()
	}
	both := h.pod() // as nerdctl says --ip and --ip6
	both.args, both.conf = "IP=10.244.1.5", object{"runtimeConfig": object{"ips": []string{"fd00:10::5"}}}
	if both.add(); both.addr(false).String() != "10.244.1.5" || both.addr(true).String() != "fd00:10::5" {
		t.Errorf("one family by each way: %s", both.raw)
	}
	both.del()
	for _, c := range []struct {
		conf  object
		code  int
		words string
	}{
		{object{"runtimeConfig": object{"ips": []string{"192.0.2.7"}}}, 102, "in no pool"},
		{object{"runtimeConfig": object{"ips": []string{"bogus"}}}, 7, "bogus"},
		{object{"runtimeConfig": object{"mac": "01:00:5e:00:00:01"}}, 7, "unicast"},
		{object{"runtimeConfig": object{"mac": "zz"}}, 7, "zz"},
		{object{"runtimeConfig": object{"mac": "00:00:00:00:00:00"}}, 7, "unicast"},
		{annotated(`["192.0.2.7"]`, ""), 102, "in no pool"},
		{annotated(`10.244.1.4`, ""), 7, `annotation cni.projectcalico.org/ipAddrs: "10.244.1.4" is not a JSON list of addresses such as`},
		{annotated(`{"a":"10.244.1.4"}`, ""), 7, "is not a JSON list of addresses"},
		{annotated(`["10.244.1"]`, ""), 7, `annotation cni.projectcalico.org/ipAddrs: "10.244.1" is not an address`},
		{annotated(`[]`, "ff:ff:ff:ff:ff:ff"), 7, `annotation cni.projectcalico.org/hwAddr: "ff:ff:ff:ff:ff:ff" is not a unicast`},
		{object{"runtimeConfig": object{"io.kubernetes.cri.pod-annotations": []string{"a"}}}, 7, "pod-annotations"},
		{object{"mtu": 1279}, 7, "1280"},
	} {
		p := h.pod()
		p.conf = c.conf
		p.fails(c.code, c.words, "ADD")
	}
	a, b := h.pod(), h.pod()
	a.args, b.args = "IP=10.244.1.9", "IP=10.244.1.9"
	a.add()
	b.fails(102, "taken", "ADD")
	a.del()
	h.clean()
}

// annotated is a pod's annotations as a CRI hands them on.
func annotated(ips, mac string) object {
	return object{"runtimeConfig": object{"io.kubernetes.cri.pod-annotations": object{
		"cni.projectcalico.org/ipAddrs": ips, "cni.projectcalico.org/hwAddr": mac, "other": "x"}}}
}

// TestNetns: what CNI_NETNS and CNI_IFNAME may not be.
func TestNetns(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	for _, c := range []struct {
		netns, words string
		code         int
	}{
		{"/run/netns/" + h.name + "-none", "does not exist", 3},
		{file, "not a network namespace", 4},
		{"/dev/null", "not a network namespace", 4},
		{t.TempDir(), "not a network namespace", 4},
		{"/proc/self/ns/mnt", "not a network namespace", 4},
		{netns.Path(h.name), "the host's own", 4},
		{"", "CNI_NETNS", 4},
		{fifo, "not a network namespace", 4},
	} {
		p := h.pod()
		p.netns = c.netns
		p.fails(c.code, c.words, "ADD")
		must(t, p.do("DEL"))
	}
	p := h.pod()
	p.ip("link", "add", "eth0", "type", "veth", "peer", "name", "other")
	p.fails(103, "exists", "ADD")
	p.ip("link", "show", "eth0")
	must(t, p.do("DEL"))
	p.ip("link", "show", "eth0") // not ours
	p.ifname = "eth1"
	p.add()
	p.fails(103, "exists", "ADD")
	p.del()
	h.clean()
}

// TestStranger: an interface of somebody else under the name that an attachment would have is neither taken nor removed.
func TestStranger(t *testing.T) {
	h := newHost(t)
	p := h.pod().add()
	name := p.hostIf()
	p.del()
	h.clean()
	h.run("ip", "link", "add", name, "type", "veth", "peer", "name", "other")
	p.fails(103, "not Caracal's", "ADD")
	must(t, p.do("DEL"))
	h.run("ip", "link", "show", name)
	h.run("ip", "link", "del", name)
	p.add()
	p.del()
	h.clean()
}

// TestNested: a host that is a container of Caracal's itself has a way out whose name begins as those of pods' interfaces do.
func TestNested(t *testing.T) {
	h := newHost(t)
	h.run("ip", "link", "add", "cali0", "type", "veth", "peer", "name", "outer")
	h.run("ip", "link", "set", "outer", "up")
	h.run("ip", "link", "set", "cali0", "up")
	h.run("ip", "route", "replace", "169.254.1.1", "dev", "cali0")
	h.run("ip", "route", "replace", "default", "via", "169.254.1.1", "dev", "cali0", "onlink")
	p := h.pod().add()
	p.del()
	h.run("ip", "link", "del", "cali0")
	h.clean()
}

// TestAddressTaken: a pod that the database knows nothing of, because it was lost, keeps its address, its routes and its flows
// from the ADD that is given the address anew.
func TestAddressTaken(t *testing.T) {
	testenv.NeedProgram(t, "nft", "nftables")
	testenv.NeedProgram(t, "conntrack", "conntrack")
	h := newHost(t)
	old, other := h.pod().add(), h.pod().add()
	other.ping(old.addr(false))
	h.run("nft", "add table t; add chain t c { type filter hook input priority 0; }; add rule t c ct state new counter") // has the host track
	h.run("sysctl", "-qw", "net.netfilter.nf_conntrack_icmp_timeout=600")
	h.run("ping", "-c1", "-W1", old.addr(false).String())
	at := old.addr(false).String()
	tracked := func() bool {
		t.Helper()
		return strings.Contains(h.run("conntrack", "-L", "-d", at), " dst="+at)
	}
	if !tracked() {
		t.Error("the host does not track what goes to the pod")
	}
	db := filepath.Join(h.state(), "node.db")
	must(t, os.Rename(db, db+".lost"))
	p := h.pod()
	p.args = "IP=" + old.addr(false).String()
	p.fails(102, "held by another pod", "ADD")
	eventually(t, "what the ADD has begun ends", h.busy)
	if !tracked() {
		t.Error("the ADD that was refused had the host forget the pod's connections")
	}
	other.ping(old.addr(false))
	h.run("ping", "-c1", "-W1", old.addr(false).String())
	must(t, p.do("DEL"))
	other.ping(old.addr(false))
	must(t, os.Rename(db+".lost", db))
	check := *old
	check.conf = object{"prevResult": old.raw}
	must(t, check.do("CHECK"))
	old.del()
	eventually(t, "what DEL has begun ends", h.busy)
	if tracked() {
		t.Error("the host still knows the connections of a pod that is gone")
	}
	other.del()
	h.clean()
}

// TestSuccessor: DEL of an old sandbox that comes after its successor of the same workload name is up does not touch it.
func TestSuccessor(t *testing.T) {
	h := newHost(t)
	const args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0"
	for _, shaped := range []bool{false, true} {
		old, next, other := h.pod(), h.pod(), h.pod()
		old.args, next.args = args, args
		old.conf, next.conf = object{"shaped": shaped}, object{"shaped": shaped}
		old.add()
		next.add()
		if links := splitLines(old.ip("-o", "link")); len(links) != 1 {
			t.Errorf("the predecessor is still there: %v", links)
		}
		if old.hostIf() != next.hostIf() {
			t.Errorf("%s became %s", old.hostIf(), next.hostIf())
		}
		for range 3 {
			old.del()
		}
		other.add()
		other.ping(next.addr(false))
		check := *next
		check.conf = object{"shaped": shaped, "prevResult": next.raw}
		must(t, check.do("CHECK"))
		next.del()
		other.del()
		h.clean()
	}
}

// TestAddedAgain: a container whose runtime died after ADD and adds it again keeps its address, for portmap behind us was told of
// no DEL and sends what comes to its published ports there.
func TestAddedAgain(t *testing.T) {
	h := newHost(t)
	first, other, again, wanted := h.pod(), h.pod(), h.pod(), h.pod()
	first.add()
	other.add()
	again.id, wanted.id = first.id, first.id
	again.add()
	if again.addr(false) != first.addr(false) || again.addr(true) != first.addr(true) {
		t.Errorf("%s and %s became %s and %s", first.addr(false), first.addr(true), again.addr(false), again.addr(true))
	}
	other.ping(again.addr(false))
	wanted.args = "IP=10.244.0.9"
	wanted.add()
	if got := wanted.addr(false); got.String() != "10.244.0.9" || wanted.addr(true) != first.addr(true) {
		t.Errorf("%s and %s, want 10.244.0.9, which was asked for, and %s", got, wanted.addr(true), first.addr(true))
	}
	other.ping(wanted.addr(false))
	wanted.del()
	other.del()
	h.clean()
}

// TestDel in all its conditions.
func TestDel(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	p.del() // before ADD: nothing is written
	if _, err := os.Stat(h.state()); !os.IsNotExist(err) {
		t.Errorf("DEL without ADD made %s: %v", h.state(), err)
	}
	p.add()
	for range 3 {
		p.del()
	}
	h.clean()

	p.add() // namespace not named
	p.netns = ""
	p.del()
	h.clean()

	q := h.pod().add() // namespace gone
	must(t, netns.Delete(q.ns))
	q.del()
	h.clean()

	q = h.pod().add() // concurrent, with prevResult
	q.conf = object{"prevResult": q.raw}
	errs := make(chan error)
	for range 8 {
		go func() {
			again := *q
			errs <- again.do("DEL")
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	h.clean()

	q = h.pod().add() // the configuration was spoilt since
	q.conf = object{"ipam": object{"type": "caracal-ipam", "ipv4_pools": []string{"10.0.0.0/8", "10.244.0.0/16"}}}
	q.del()
	h.clean()
}

// TestAddWhileDel: a DEL that overtakes its ADD leaves nothing, whoever wins.
func TestAddWhileDel(t *testing.T) {
	h := newHost(t)
	for i := range 12 {
		p := h.pod()
		done := make(chan error, 1)
		go func() {
			add := *p
			done <- add.do("ADD")
		}()
		time.Sleep(time.Duration(i) * time.Millisecond) // not to wait for anything: a different moment each time
		other := *p
		must(t, other.do("DEL"))
		<-done
		p.del()
	}
	h.clean()
}

// TestCheck finds what is not as it was made.
func TestCheck(t *testing.T) {
	h := newHost(t)
	p := h.pod().add()
	v4, host := p.addr(false).String(), p.hostIf()
	check := *p
	check.conf = object{"prevResult": p.raw}
	must(t, check.do("CHECK"))
	p.ip("route", "add", "198.51.100.0/24", "via", "169.254.1.1") // a later plugin's
	must(t, check.do("CHECK"))
	mac := p.result.Interfaces[1].Mac
	for _, c := range []struct {
		words    string
		do, undo []string
		host     bool
	}{
		{"address", []string{"ip", "addr", "del", v4 + "/32", "dev", "eth0"}, []string{"sh", "-c", "ip addr add " + v4 + "/32 dev eth0 && ip route add 169.254.1.1 dev eth0 scope link && ip neigh replace 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee nud permanent dev eth0 && ip route add default via 169.254.1.1"}, false},
		{"default route", []string{"ip", "route", "del", "default"}, []string{"ip", "route", "add", "default", "via", "169.254.1.1"}, false},
		{"MTU", []string{"ip", "link", "set", "eth0", "mtu", "1400"}, []string{"ip", "link", "set", "eth0", "mtu", "1500"}, false},
		{"route", []string{"ip", "route", "del", v4}, []string{"ip", "route", "add", v4, "dev", host, "proto", "202", "scope", "link"}, true},
	} {
		ns := p.ns
		if c.host {
			ns = h.name
		}
		run(t, ns, c.do...)
		check.fails(104, c.words, "CHECK")
		run(t, ns, c.undo...)
		must(t, check.do("CHECK"))
	}
	p.ip("link", "set", "eth0", "address", "02:00:00:00:00:99") // tuning's
	must(t, check.do("CHECK"))
	p.ip("link", "set", "eth0", "address", mac)
	none := *p
	none.fails(7, "prevResult", "CHECK")
	stranger := *h.pod()
	stranger.conf = check.conf
	stranger.fails(3, "not attached", "CHECK")
	p.ip("link", "del", "eth0")
	check.fails(104, "eth0", "CHECK")
	p.del()
	check.fails(3, "not attached", "CHECK")
	h.clean()
}

// TestGC keeps what is listed, and only touches its own network.
func TestGC(t *testing.T) {
	h := newHost(t)
	keep, drop, other := h.pod().add(), h.pod().add(), h.pod()
	other.conf = object{"name": "other"}
	other.add()
	gc := *keep
	for _, absent := range []object{{}, {"cni.dev/valid-attachments": nil}} {
		gc.conf = absent
		must(t, gc.do("GC"))
	}
	keep.ping(drop.addr(false))
	list := []object{{"containerID": keep.id, "ifname": "eth0"}, {"containerID": drop.id, "ifname": "eth9"}}
	gc.conf = object{"cni.dev/valid-attachments": list, "cni.dev/attachments": list}
	must(t, gc.do("GC"))
	if links := splitLines(drop.ip("-o", "link")); len(links) != 1 {
		t.Errorf("GC left %v", links)
	}
	keep.ping(other.addr(false))
	drop.del()
	gc.conf = object{"cni.dev/attachments": []object{}}
	must(t, gc.do("GC"))
	other.ping(other.addr(false))
	other.del()
	h.clean()
}
