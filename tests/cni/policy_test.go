package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/netns"
	caracal "github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
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
	wrong := h.pod()
	wrong.conf = object{"policy": object{"unknown": "perhaps"}}
	wrong.fails(7, "policy.unknown", "ADD")
	shut.conf = wrong.conf // spoilt since
	for _, p := range []*pod{none, open, shut} {
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
	must(h.t, h.db(func(tx *node.Tx) error {
		return tx.Endpoints(func(e node.Endpoint) error { pods = append(pods, e); return nil })
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
