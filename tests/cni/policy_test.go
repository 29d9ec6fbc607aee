package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/netns"
	caracal "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
)

// TestRecorded: what policy goes by is in the record: labels from all that may bring them, in both of their forms, and what
// Kubernetes calls the pod.
func TestRecorded(t *testing.T) {
	h := newHost(t)
	for _, labels := range []any{
		object{"app": "web", "tier": "front"}, []object{{"key": "app", "value": "web"}, {"key": "tier", "value": "front"}},
	} {
		p := h.pod()
		p.args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=" + p.id
		p.conf = object{
			"labels": object{"app": "overridden", "from": "conflist"},
			"args":   object{"labels": object{"tier": "overridden", "zone": "a"}, "cni": object{"labels": labels}},
		}
		p.add()
		must(t, h.db(func(tx *node.Tx) error {
			e, err := tx.Endpoint(node.Key{Network: "pods", ContainerID: p.id, IfName: "eth0"})
			if l := e.Labels; len(l) != 4 || l["app"] != "web" || l["tier"] != "front" || l["from"] != "conflist" || l["zone"] != "a" {
				t.Errorf("labels %v", l)
			}
			if e.PodNamespace != "shop" || e.PodName != "web-0" || e.PodUID != "u-1" {
				t.Errorf("%s/%s, %s", e.PodNamespace, e.PodName, e.PodUID)
			}
			return err
		}))
		p.del()
	}
	h.clean()
}

// pings tells whether a ping from the pod is answered.
func (p *pod) pings(to netip.Addr) error {
	out, err := try(p.ns, "ping", "-n", "-c", "1", "-W", "1", to.String())
	if err != nil {
		return errors.New(out)
	}
	return nil
}

// TestUnknownPolicy: what pods do where nobody knows of any policy is a setting.
func TestUnknownPolicy(t *testing.T) {
	h := newHost(t)
	none, open, shut := h.pod().add(), h.pod(), h.pod()
	open.conf, shut.conf = object{"policy": object{"unknown": "allow"}}, object{"policy": object{"unknown": "deny", "type": "k8s"}}
	open.add()
	shut.add()
	for _, v6 := range []bool{false, true} {
		none.ping(open.addr(v6))
		open.ping(none.addr(v6))
		for _, pair := range [][2]*pod{{shut, open}, {open, shut}} {
			if pair[0].pings(pair[1].addr(v6)) == nil {
				t.Errorf("%s reaches %s", pair[0].addr(v6), pair[1].addr(v6))
			}
		}
		run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", shut.addr(v6).String()) // as the kubelet does
	}
	check := *shut
	check.conf = object{"policy": object{"unknown": "deny"}, "prevResult": shut.raw}
	must(t, check.do("CHECK"))
	// An agent that has heard its store knows that there is no policy.
	h.claims()
	eventually(t, "the pod is open", func() error { return shut.pings(open.addr(false)) })
	late := h.pod()
	late.conf = object{"policy": object{"unknown": "deny"}}
	late.add()
	late.ping(shut.addr(true))

	wrong := h.pod()
	wrong.conf = object{"policy": object{"unknown": "perhaps"}}
	wrong.fails(7, "policy.unknown", "ADD")
	shut.conf = wrong.conf // spoilt since
	for _, p := range []*pod{none, open, shut, late} {
		p.del()
	}
	h.clean()
}

// last makes resources what this node knew last of policy, as an agent does that ends then.
func (h *host) last(yaml string) {
	h.t.Helper()
	var all []api.Resource
	if yaml != "" {
		var err error
		all, err = manifest.Parse([]byte(yaml))
		must(h.t, err)
	}
	h.policy(func(p *enforce.Policy) { p.Replace(all) })
}

// policy changes what this node knew last of policy, and puts it in force.
func (h *host) policy(change func(*enforce.Policy)) {
	h.t.Helper()
	m, err := caracal.Open(h.pins())
	must(h.t, err)
	defer m.Close()
	p, err := enforce.Load(context.Background(), enforce.Config{Dir: h.state(), Maps: m, Node: "node-1"})
	must(h.t, err)
	change(p)
	var pods []node.Endpoint
	must(h.t, h.db(func(tx *node.Tx) (err error) {
		pods, err = tx.AllEndpoints()
		return err
	}))
	p.SetLocal(pods)
	_, err = p.Commit(context.Background())
	must(h.t, errors.Join(err, p.Close()))
}

// role is a configuration that gives a pod a label, and perhaps addresses.
func role(name string, ips ...string) object {
	return object{"args": object{"cni": object{"labels": object{"role": name}, "ips": ips}}}
}

// inbox counts the datagrams that come to a port of a namespace, by what they say.
type inbox struct {
	mu  sync.Mutex
	got map[string]int
}

const mailPort = 7000

func (p *pod) inbox() *inbox {
	p.h.t.Helper()
	b := &inbox{got: make(map[string]int)}
	var c net.PacketConn
	must(p.h.t, netns.Do(netns.Path(p.ns), func() (err error) {
		c, err = net.ListenPacket("udp", fmt.Sprintf(":%d", mailPort))
		return err
	}))
	var done sync.WaitGroup
	done.Go(func() {
		buf := make([]byte, 100)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			b.mu.Lock()
			b.got[string(buf[:n])]++
			b.mu.Unlock()
		}
	})
	p.h.t.Cleanup(func() { c.Close(); done.Wait() })
	return b
}

func (b *inbox) count(what string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.got[what]
}

// gets waits until ten more of each have come.
func (b *inbox) gets(t testing.TB, what ...string) {
	t.Helper()
	for _, w := range what {
		before := b.count(w)
		eventually(t, w+" comes", func() error {
			if n := b.count(w) - before; n < 10 {
				return fmt.Errorf("%d came", n)
			}
			return nil
		})
	}
}

// never makes sure that none of these has come.
func (b *inbox) never(t testing.TB, what ...string) {
	t.Helper()
	for _, w := range what {
		if n := b.count(w); n > 0 {
			t.Errorf("%s came %d times", w, n)
		}
	}
}

// sends has the pod send a word to addresses, as often as it can from now on, until stop is called or the test ends.
func (p *pod) sends(word string, to ...netip.Addr) (stop func()) {
	p.h.t.Helper()
	var c net.PacketConn
	must(p.h.t, netns.Do(netns.Path(p.ns), func() (err error) {
		c, err = net.ListenPacket("udp", ":0")
		return err
	}))
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		for ctx.Err() == nil {
			for _, a := range to {
				family := " v4"
				if a.Is6() {
					family = " v6"
				}
				_, _ = c.WriteTo([]byte(word+family), net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, mailPort))) // perhaps no way there yet
			}
			time.Sleep(200 * time.Microsecond)
		}
	})
	stop = func() { cancel(); done.Wait(); c.Close() }
	p.h.t.Cleanup(stop)
	return stop
}

const onlyApps = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db}
spec:
  podSelector: {matchLabels: {role: db}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {role: app}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {role: app}}}]}]
`

// TestPolicyWithoutAgent: no agent runs, and a new pod is under the policy that was known last from its first packet on. All
// send as fast as they can before, during and after ADD.
//
//	app <-> db        stranger --x--> db        db --x--> stranger
func TestPolicyWithoutAgent(t *testing.T) {
	h := newHost(t)
	app, stranger := h.pod(), h.pod().add()
	app.conf = role("app")
	app.add()
	h.last(onlyApps)
	ips := []string{"10.244.3.1", "fd00:10::301"}
	to := []netip.Addr{netip.MustParseAddr(ips[0]), netip.MustParseAddr(ips[1])}
	atApp, atStranger := app.inbox(), stranger.inbox()
	defer app.sends("app", to...)()
	defer stranger.sends("stranger", to...)()
	for round := range 3 {
		db, word := h.pod(), fmt.Sprint("db", round)
		db.conf = role("db", ips...)
		atDB := db.inbox()
		stop := db.sends(word, app.addr(false), app.addr(true), stranger.addr(false), stranger.addr(true))
		db.add()
		atDB.gets(t, "app v4", "app v6")
		atApp.gets(t, word+" v4", word+" v6")
		atDB.never(t, "stranger v4", "stranger v6")
		atStranger.never(t, word+" v4", word+" v6")

		h.last("") // so they were sending, and it was policy that kept it from them
		atDB.gets(t, "stranger v4", "stranger v6")
		atStranger.gets(t, word+" v4", word+" v6")
		h.last(onlyApps)
		stop()
		db.del()
	}
	app.del()
	stranger.del()
	h.clean()
}

// daemon is an agent of a host.
type daemon struct {
	t   testing.TB
	cmd *exec.Cmd
	end chan struct{}
}

// agent starts an agent, which has a store of its own, and waits until it keeps policy.
func (h *host) agent() *daemon {
	h.t.Helper()
	d := h.start()
	eventually(h.t, "the agent keeps policy", func() error {
		out, err := try(h.name, "curl", "-sS", "--unix-socket", h.conf["agent_socket"].(string), "http://agent/v1/policy")
		if err == nil && !strings.Contains(out, `"known":true`) {
			err = errors.New(out)
		}
		return err
	})
	return d
}

func (h *host) start() *daemon {
	h.t.Helper()
	socket := filepath.Join(h.dir, "agent.sock")
	h.conf["agent_socket"] = socket
	d := &daemon{h.t, exec.Command(testenv.Bin(h.t, "caracald"), "--node-name", "node-1", "--state-dir", h.state(), "--bpffs-dir", h.pins(), "--socket", socket,
		"--ip", "192.0.2.1/32", "--ip6", "2001:db8::1/128", "--bgp-port", "-1", "--health", "", "--metrics", ""), make(chan struct{})}
	if testing.Verbose() {
		d.cmd.Stderr = os.Stderr
	}
	must(h.t, netns.Do(netns.Path(h.name), d.cmd.Start))
	go func() { d.cmd.Wait(); close(d.end) }()
	h.t.Cleanup(d.kill)
	return d
}

// TestPolicyAgentBegins adds pods while an agent begins and is killed: whoever puts their policy in force, it is there.
func TestPolicyAgentBegins(t *testing.T) {
	h := newHost(t)
	h.conf["policy"] = object{"unknown": "allow"}
	stranger := h.pod().add()
	h.last(onlyApps)
	h.cluster().kill()
	const ip = "10.244.0.40"
	defer stranger.sends("stranger", netip.MustParseAddr(ip))()
	for i := range 12 {
		p := h.pod()
		p.conf = role("db", ip)
		in := p.inbox()
		stop := p.sends("out", stranger.addr(false))
		agent := h.start()
		time.Sleep(time.Duration(i) * 15 * time.Millisecond) // somewhere between its start and its first look at everything
		p.add()
		agent.kill()
		in.never(t, "stranger v4")
		p.del()
		stop()
	}
}

func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.end
}

func (d *daemon) signal(s os.Signal) {
	d.t.Helper()
	must(d.t, d.cmd.Process.Signal(s))
}

// hang stops the agent, where it writes nothing: a process that is stopped with a lock in its hands stops everybody else, for
// as long as they wait for a lock.
func (d *daemon) hang(h *host) {
	d.t.Helper()
	eventually(d.t, "the agent hangs and holds no lock", func() error {
		d.signal(unix.SIGSTOP)
		for _, name := range []string{"lock", "node.db.lock"} {
			l, err := node.TryLock(h.state(), name)
			if err != nil {
				d.signal(unix.SIGCONT)
				return err
			}
			l.Unlock()
		}
		return nil
	})
}

// apply writes resources to the store of the host's agent.
func (h *host) apply(yaml string) {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "apply.yaml")
	must(h.t, os.WriteFile(file, []byte(yaml), 0o600))
	h.run(testenv.Bin(h.t, "caracalctl"), "--state-dir", h.state(), "apply", "-f", file)
}

// claims makes the host one of a cluster's and starts an agent.
func (h *host) claims() *daemon {
	h.t.Helper()
	h.apply(pools)
	d := h.agent()
	h.conf["ipam"] = object{"type": "caracal-ipam", "cluster": true}
	p := h.pod()
	eventually(h.t, "the agent has claimed blocks", func() error { return p.do("STATUS") })
	return d
}

// cluster does so with onlyApps in the store.
func (h *host) cluster() *daemon {
	h.t.Helper()
	h.apply(onlyApps)
	d := h.claims()
	eventually(h.t, "the agent knows policy", func() error {
		_, err := os.Stat(filepath.Join(h.state(), "policy.db"))
		return err
	})
	return d
}

const pools = `
{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: v4}, spec: {cidr: 10.244.0.0/16, natOutgoing: false}}
---
{apiVersion: projectcalico.org/v3, kind: IPPool, metadata: {name: v6}, spec: {cidr: "fd00:10::/64", natOutgoing: false}}
`

// TestPolicyByAgent: the agent puts a new pod's policy in force; when it is killed while ADD waits for it, ADD does; when it
// hangs a pod of known policy is cut off until the agent goes on, and of another the configuration says what it may.
func TestPolicyByAgent(t *testing.T) {
	h := newHost(t)
	app, stranger := h.pod(), h.pod().add()
	app.conf = role("app")
	app.add()
	agent := h.cluster()
	ips := []string{"10.244.0.40", "fd00:10::28"} // of the blocks that there are
	to := []netip.Addr{netip.MustParseAddr(ips[0]), netip.MustParseAddr(ips[1])}
	defer app.sends("app", to...)()
	defer stranger.sends("stranger", to...)()
	db := func(unknown string) (*pod, *inbox) {
		p := h.pod()
		p.conf = role("db", ips...)
		p.conf["policy"] = object{"unknown": unknown}
		return p, p.inbox()
	}
	for range 5 { // the same addresses at once for another pod with the same labels
		p, in := db("allow")
		p.add()
		in.gets(t, "app v4", "app v6")
		in.never(t, "stranger v4", "stranger v6")
		p.del()
	}

	for _, unknown := range []string{"allow", "deny"} {
		p, in := db(unknown)
		agent.hang(h)
		begin := time.Now()
		p.add()
		if took := time.Since(begin); took < 2*time.Second || took > 30*time.Second {
			t.Errorf("ADD took %s beside an agent that hangs", took)
		}
		time.Sleep(100 * time.Millisecond) // 500 packets of each kind
		in.never(t, "stranger v4", "stranger v6", "app v4", "app v6")
		free := h.pod() // about which no policy is
		free.conf = role("free")
		free.conf["policy"] = object{"unknown": unknown}
		free.add()
		want := [2]uint32{}
		if unknown == "deny" {
			want = [2]uint32{caracal.PolicyUnknown, caracal.PolicyUnknown}
		}
		if ids := h.ids(free); ids != want {
			t.Errorf("with %s: policy ids %d, want %d", unknown, ids, want)
		}
		free.del()
		agent.signal(unix.SIGCONT)
		in.gets(t, "app v4", "app v6")
		in.ends(t, "stranger v4", "stranger v6")
		p.del()
	}

	p, in := db("allow")
	agent.hang(h)
	added := make(chan error)
	go func() { added <- p.do("ADD") }()
	eventually(t, "ADD waits for the agent", func() error { return h.waits(to[0]) })
	agent.kill()
	must(t, <-added)
	in.gets(t, "app v4", "app v6")
	in.never(t, "stranger v4", "stranger v6")

	h.agent() // takes over what ADD has made
	in.gets(t, "app v4", "app v6")
	in.never(t, "stranger v4", "stranger v6")
	p.del()
	app.del()
	stranger.del()
	h.clean()
}

// TestPolicyRefused: a policy that can't be put in force for a pod, since a rule tells its addresses apart, does not leave it
// open, neither with an agent nor without: ADD fails, or the pod is cut off.
func TestPolicyRefused(t *testing.T) {
	h := newHost(t)
	h.pod().add().del() // loads the programs
	const apart = `
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: apart}
spec: {selector: role == 'two', ingress: [{action: Allow, destination: {nets: [10.244.0.40/32]}}]}
`
	both := func(who string) {
		for _, unknown := range []string{"allow", "deny"} {
			p := h.pod()
			p.conf = role("two", "10.244.0.40", "10.244.0.41")
			p.conf["policy"] = object{"unknown": unknown}
			if unknown == "allow" {
				p.fails(11, "apart", "ADD")
				continue
			}
			p.add()
			if ids := h.ids(p); ids != [2]uint32{caracal.PolicyUnknown, caracal.PolicyUnknown} {
				t.Errorf("%s: policy ids %d", who, ids)
			}
			p.del()
		}
	}
	h.last(apart)
	both("alone")
	h.clean()
	h.apply(apart)
	h.cluster()
	both("agent")
}

// TestPolicyAgentEnds: the agent is told to end while it puts a new pod's policy in force, and can't. ADD does it then.
func TestPolicyAgentEnds(t *testing.T) {
	h := newHost(t)
	h.conf["policy"] = object{"unknown": "allow"}
	stranger := h.pod().add()
	agent := h.cluster()
	ip := netip.MustParseAddr("10.244.0.40")
	defer stranger.sends("stranger", ip)()
	p := h.pod()
	p.conf = role("db", ip.String())
	in := p.inbox()
	agent.hang(h)
	added := make(chan error)
	go func() { added <- p.do("ADD") }()
	eventually(t, "ADD waits for the agent", func() error { return h.waits(ip) })
	lock, err := node.LockNode(context.Background(), h.state())
	must(t, err)
	agent.signal(unix.SIGCONT)
	time.Sleep(300 * time.Millisecond) // it waits for the lock by now, or is asked later: both must do
	agent.signal(unix.SIGTERM)
	time.Sleep(300 * time.Millisecond) // it gives up waiting
	lock.Unlock()
	must(t, <-added)
	<-agent.end
	in.never(t, "stranger v4")
	if ids := h.ids(p); ids[0] == 0 || ids[0] == caracal.PolicyUnknown {
		t.Errorf("policy ids %d", ids)
	}
	p.del()
	stranger.del()
	h.clean()
}

// waits: the pod with this address is in the maps, and its policy is not known.
func (h *host) waits(a netip.Addr) error {
	m, err := caracal.Open(h.pins())
	if err != nil {
		return err
	}
	defer m.Close()
	pods, err := m.Pods()
	for _, p := range pods {
		if slices.Contains(p.Addresses, a) && p.PolicyIngress == caracal.PolicyUnknown {
			return nil
		}
	}
	return errors.Join(err, fmt.Errorf("none with %s", a))
}

// ends waits until none of these comes any more.
func (b *inbox) ends(t testing.TB, what ...string) {
	t.Helper()
	for _, w := range what {
		eventually(t, w+" ends", func() error {
			before := b.count(w)
			time.Sleep(50 * time.Millisecond) // 200 more would come
			if n := b.count(w) - before; n > 0 {
				return fmt.Errorf("%d more", n)
			}
			return nil
		})
	}
}

// TestPolicyAddressReused: who gets the address of a pod that is gone gets nothing else of it, whether an agent runs, or
// nobody who knows policy.
//
//	was at one address: app -> db        comes there: other --x--> db
//	was at one address: db <--x-- other  comes there: other <- other
func TestPolicyAddressReused(t *testing.T) {
	h := newHost(t)
	h.conf["policy"] = object{"unknown": "allow"}
	h.pod().add() // loads the programs
	h.last(onlyApps)
	db, other := h.pod(), h.pod()
	db.conf = role("db")
	db.add()
	other.add()
	atDB := db.inbox()
	const first, second = "10.244.0.40", "10.244.0.41"
	swap := func(t *testing.T, word string, between func()) {
		app, gone, heir, open := h.pod(), h.pod(), h.pod(), h.pod()
		app.conf, gone.conf = role("app", first), role("db", second)
		app.id, gone.id = "z"+app.id, "z"+gone.id // neither name nor age says who has an address
		heir.conf, open.conf = role("other", first), role("other", second)
		in := open.inbox()
		app.add()
		gone.add()
		stop := app.sends("app "+word, db.addr(false))
		atDB.gets(t, "app "+word+" v4")
		stop()
		defer heir.sends("heir "+word, db.addr(false), netip.MustParseAddr(second))()
		app.del()
		between()
		heir.add()
		gone.del()
		open.add()
		in.gets(t, "heir "+word+" v4")
		atDB.never(t, "heir "+word+" v4")
		heir.del()
		open.del()
	}
	for i := range 3 {
		swap(t, fmt.Sprint("alone ", i), func() {})
	}
	good, err := os.ReadFile(filepath.Join(h.state(), "policy.db"))
	must(t, err)
	swap(t, "spoilt", func() { must(t, os.WriteFile(filepath.Join(h.state(), "policy.db"), []byte("spoilt"), 0o600)) })
	must(t, os.WriteFile(filepath.Join(h.state(), "policy.db"), good, 0o600))

	h.cluster()
	for i := range 10 {
		swap(t, fmt.Sprint("agent ", i), func() {})
	}
}

// TestPolicyDamaged: what was known last can't be read. The configuration says what pods may then, each ADD warns of it, and an
// agent puts it right.
func TestPolicyDamaged(t *testing.T) {
	h := newHost(t)
	log := filepath.Join(h.dir, "cni.log")
	h.conf["log_file_path"] = log
	stranger := h.pod().add()
	h.last(onlyApps)
	db, broken := filepath.Join(h.state(), "policy.db"), filepath.Join(h.state(), "policy.broken")
	good, err := os.ReadFile(db)
	must(t, err)
	page := func(n int, fill byte) []byte {
		b := slices.Clone(good)
		for i := range b[n*4096 : (n+1)*4096] {
			b[n*4096+i] = fill
		}
		return b
	}
	for name, content := range map[string][]byte{
		"garbage": []byte("garbage"), "empty": {}, "half": good[:len(good)/2], "head alone": good[:4096], "two heads": good[:8192], "more": append(slices.Clone(good), make([]byte, 4096)...),
		"no heads": append(make([]byte, 8192), good[8192:]...), "page 2 zero": page(2, 0), "page 3 ones": page(3, 0xff), "page 4 letters": page(4, 'a'), "page 5 letters": page(5, 'a'), "a directory": nil,
	} {
		for _, unknown := range []string{"allow", "deny"} {
			must(t, errors.Join(os.RemoveAll(db), os.RemoveAll(broken)))
			if content == nil {
				must(t, os.Mkdir(db, 0o700))
			} else {
				must(t, os.WriteFile(db, content, 0o600))
			}
			for _, times := range []string{"first", "second"} { // it has been moved by then
				must(t, os.RemoveAll(log))
				p := h.pod()
				p.conf = role("db")
				p.conf["policy"] = object{"unknown": unknown}
				p.add()
				said, _ := os.ReadFile(log) // none: nothing was said
				ids := h.ids(p)
				switch {
				case ids != [2]uint32{} && ids[0] != caracal.PolicyUnknown: // what was spoilt was nothing
				case !strings.Contains(string(said), "the pod's policy is not known"):
					t.Errorf("%s, %s time, %s: the log says %q", name, times, unknown, said)
				case (unknown == "deny") != (ids == [2]uint32{caracal.PolicyUnknown, caracal.PolicyUnknown}):
					t.Errorf("%s, %s time, %s: policy ids %d", name, times, unknown, ids)
				}
				p.del()
			}
		}
	}

	must(t, errors.Join(os.RemoveAll(db), os.WriteFile(db, []byte("garbage"), 0o600)))
	p := h.pod()
	p.conf = role("db", "10.244.0.40", "fd00:10::28")
	p.conf["policy"] = object{"unknown": "allow"}
	in := p.inbox()
	defer stranger.sends("stranger", netip.MustParseAddr("10.244.0.40"), netip.MustParseAddr("fd00:10::28"))()
	p.add()
	in.gets(t, "stranger v4", "stranger v6")
	h.cluster()
	in.ends(t, "stranger v4", "stranger v6")
	p.del()
	stranger.del()
	h.clean()
}

// ids are the policy ids of a pod in the maps, ingress first.
func (h *host) ids(p *pod) [2]uint32 {
	h.t.Helper()
	m, err := caracal.Open(h.pins())
	must(h.t, err)
	defer m.Close()
	pods, err := m.Pods()
	must(h.t, err)
	for _, got := range pods {
		if slices.Contains(got.Addresses, p.addr(false)) {
			return [2]uint32{got.PolicyIngress, got.PolicyEgress}
		}
	}
	h.t.Fatalf("no pod with %s in the maps", p.addr(false))
	return [2]uint32{}
}

// TestPolicyAtOnce adds pods at once with no agent: one puts policy in force for all that are there, or each does.
func TestPolicyAtOnce(t *testing.T) {
	h := newHost(t)
	h.conf["policy"] = object{"unknown": "allow"}
	h.pod().add().del()
	h.last(onlyApps)
	pods := make([]*pod, 24)
	for i := range pods {
		pods[i] = h.pod()
		pods[i].conf = role("db")
		pods[i].conf["log_file_path"] = filepath.Join(h.dir, "cni.log")
	}
	each := func(command string) {
		var group sync.WaitGroup
		for _, p := range pods {
			group.Go(func() {
				if err := p.do(command); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
	for range 3 {
		each("ADD")
		ids := h.ids(pods[0])
		for _, p := range pods {
			if got := h.ids(p); got != ids || got[0] == caracal.PolicyUnknown || got[0] == 0 || got[1] == 0 {
				t.Errorf("policy ids %d, and %d of another", got, ids)
			}
		}
		each("DEL")
		h.clean()
	}
	if log, err := os.ReadFile(filepath.Join(h.dir, "cni.log")); err == nil {
		t.Errorf("the log: %s", log)
	}
}

// TestPolicyKilled kills ADD after ever longer times, while policy is being put in force too: DEL removes all of it, and what
// was in force stays.
func TestPolicyKilled(t *testing.T) {
	h := newHost(t)
	app, stranger, db := h.pod(), h.pod().add(), h.pod()
	app.conf = role("app")
	app.add()
	h.last(onlyApps)
	db.conf = role("db")
	db.add()
	in := db.inbox()
	defer app.sends("app", db.addr(false))()
	defer stranger.sends("stranger", db.addr(false))()
	for _, p := range []*pod{app, stranger, db} {
		p.settled()
	}
	parts := func() []string { return strings.Split(strings.TrimPrefix(h.leftovers().Error(), "left: "), "; ") }
	rest := parts()
	for i := range 40 {
		p := h.pod()
		p.conf = role("db")
		stdin, err := json.Marshal(p.config())
		must(t, err)
		cmd := exec.Command(h.bin)
		cmd.Env, cmd.Stdin = p.env("ADD"), bytes.NewReader(stdin)
		must(t, netns.Do(netns.Path(h.name), cmd.Start))
		time.Sleep(time.Duration(i) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		must(t, p.do("DEL"))
		eventually(t, "nothing more is left", func() error {
			for _, now := range parts() {
				if !slices.Contains(rest, now) && !strings.HasPrefix(now, "flow ") {
					return errors.New(now)
				}
			}
			return nil
		})
		if t.Failed() {
			break
		}
	}
	in.gets(t, "app v4")
	in.never(t, "stranger v4")
	app.del()
	stranger.del()
	db.del()
	h.clean()
}
