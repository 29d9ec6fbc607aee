package dataplane

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// ofPod is a policy for the pod of that name; a direction without rules is denied whole.
func ofPod(name string, ingress, egress *policy.Rules) *policy.Policy {
	return &policy.Policy{ID: "policy of " + name, Selector: selector.In("name", name), Ingress: ingress, Egress: egress}
}

func rulesOf(rules ...policy.Rule) *policy.Rules { return &policy.Rules{Rules: rules} }

// modelOf has one tier, in which what a policy selects is denied unless a rule allows it.
func modelOf(endpoints []*policy.Endpoint, policies ...*policy.Policy) *policy.Model {
	m := &policy.Model{Endpoints: make(map[string]*policy.Endpoint), Tiers: []policy.Tier{{Name: "default", Default: policy.Deny, Policies: policies}}}
	for _, e := range endpoints {
		m.Endpoints[e.ID] = e
	}
	return m
}

// labelled allows what comes from, or goes to, whoever has a label.
func labelled(action policy.Action, d policy.Direction, key, value string) policy.Rule {
	s := selector.In(key, value)
	r := policy.Rule{Action: action}
	if d == policy.Ingress {
		r.Source.Selector = &s
	} else {
		r.Destination.Selector = &s
	}
	return r
}

// A deny cuts what is open, whichever end it is at and whoever speaks: of what is sent after SetPolicy returned nothing
// arrives. When it is allowed again it goes on.
func TestDenyCuts(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	e := n.enforce(a, b)
	friend, enemy := []*policy.Endpoint{endpointOf(a, "is", "friend"), endpointOf(b, "is", "friend")}, []*policy.Endpoint{endpointOf(a, "is", "enemy"), endpointOf(b, "is", "enemy")}
	all := rulesOf(policy.Rule{Action: policy.Allow})
	friends := []*policy.Policy{
		ofPod("b", rulesOf(labelled(policy.Allow, policy.Ingress, "is", "friend")), rulesOf()), // which opens nothing, and answers
		ofPod("a", rulesOf(), rulesOf(labelled(policy.Allow, policy.Egress, "is", "friend"))),
	}
	allowed := modelOf(friend, friends...)
	denied := []struct {
		name  string
		model *policy.Model
	}{
		{"responder's rules", modelOf(friend, ofPod("b", rulesOf(), rulesOf()), friends[1])},
		{"opener's rules", modelOf(friend, friends[0], ofPod("a", all, rulesOf()))},
		{"opener's labels", modelOf([]*policy.Endpoint{enemy[0], friend[1]}, friends...)},
		{"responder's labels", modelOf([]*policy.Endpoint{friend[0], enemy[1]}, friends...)},
		{"both ends", modelOf(friend, ofPod("a", all, rulesOf()), ofPod("b", rulesOf(), nil))},
	}
	events := n.events()
	var took []time.Duration
	for _, kind := range []struct {
		protocol string
		v6       bool
	}{{"udp", false}, {"udp", true}, {"tcp", false}, {"tcp", true}, {"icmp", false}} {
		t.Run(fmt.Sprintf("%s v6=%t", kind.protocol, kind.v6), func(t *testing.T) {
			e.set(allowed)
			c := talk(t, kind.protocol, a, b, kind.v6, time.Millisecond)
			defer c.end()
			goesOn := func(what string) {
				t.Helper()
				before := time.Now().UnixNano()
				// TCP waits longer each time before it sends again: as long as it was cut, at most.
				within(t, 5*patience, what, func() bool { return c.there.arrived.Load() > before && c.back.arrived.Load() > before })
			}
			legs := func() (there, back uint64) {
				t.Helper()
				flows, err := n.maps.Flows()
				if err != nil {
					t.Fatal(err)
				}
				i := slices.IndexFunc(flows, func(f maps.Flow) bool {
					return f.Confirmed && f.Protocol == kind.protocol && f.Opener.Addr() == a.addr(kind.v6) && f.Responder.Addr() == b.addr(kind.v6)
				})
				if i < 0 {
					t.Fatalf("no such flow among %+v", flows)
				}
				return flows[i].Sent.Packets, flows[i].Received.Packets
			}
			goesOn("traffic")
			for _, d := range denied {
				drain(t, events)
				begin := time.Now()
				e.set(d.model)
				there, back := c.there.sent.Load(), c.back.sent.Load()
				legThere, legBack := legs()
				cut := make(map[bool]bool) // by: a sent it
				until(t, d.name+" to cut both directions", func() bool {
					for _, ev := range drain(t, events) {
						if ev.Kind == "drop" && ev.Protocol == kind.protocol {
							cut[ev.Source.Addr() == a.addr(kind.v6)] = true
						}
					}
					return cut[true] && cut[false] && c.there.sent.Load() > there+20 && c.back.sent.Load() > back+20
				})
				if x, y := legs(); x != legThere || y != legBack {
					t.Errorf("%s: %d and %d packets passed after it was in force", d.name, x-legThere, y-legBack)
				}
				if kind.protocol != "tcp" && (c.there.newest.Load() > there || c.back.newest.Load() > back) {
					t.Errorf("%s: packets %d and %d arrived, sent after %d and %d", d.name, c.there.newest.Load(), c.back.newest.Load(), there, back)
				}
				took = append(took, max(0, c.last().Sub(begin)))
				e.set(allowed)
				goesOn("traffic after " + d.name)
			}
		})
	}
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	middle := took[len(took)/2]
	t.Logf("from the change of the model to the last packet that arrived, of %d cuts: median %s, at most %s", len(took), middle, took[len(took)-1])
	if middle > 100*time.Millisecond {
		t.Errorf("the median cut took %s, want 100 ms", middle)
	}
}

// While a deny moves from one end to the other and back, nothing that it denies gets through, whether it belongs to a flow
// that was open before, answers one, or would open one.
func TestDenyMoves(t *testing.T) {
	iterations := 300
	if testing.Short() {
		iterations = 30
	}
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	e := n.enforce(a, b)
	plain := func(x, y string) []*policy.Endpoint {
		return []*policy.Endpoint{endpointOf(a, "is", x), endpointOf(b, "is", y)}
	}
	any := rulesOf(policy.Rule{Action: policy.Allow})
	but := func(d policy.Direction) *policy.Rules {
		return rulesOf(labelled(policy.Deny, d, "is", "enemy"), policy.Rule{Action: policy.Allow})
	}
	suspicious := []*policy.Policy{ofPod("a", any, but(policy.Egress)), ofPod("b", but(policy.Ingress), any)}
	for _, way := range []struct {
		name string
		at   [2]*policy.Model // denied at the opener, at the responder
	}{
		{"rules", [2]*policy.Model{
			modelOf(plain("", ""), ofPod("a", any, rulesOf()), ofPod("b", any, any)),
			modelOf(plain("", ""), ofPod("a", any, any), ofPod("b", rulesOf(), any)),
		}},
		{"labels", [2]*policy.Model{modelOf(plain("friend", "enemy"), suspicious...), modelOf(plain("enemy", "friend"), suspicious...)}},
		{"policies", [2]*policy.Model{
			modelOf(plain("", ""), ofPod("a", nil, rulesOf())),
			modelOf(plain("", ""), ofPod("b", rulesOf(), nil)),
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			e.set(modelOf(plain("friend", "friend")))
			open := talk(t, "udp", a, b, false, 0)
			defer open.end()
			until(t, "traffic", func() bool { return open.there.newest.Load() > 100 && open.back.newest.Load() > 100 })
			e.set(way.at[0])
			// One flow after another is tried to be opened, by a packet for each port of b.
			stop, done := make(chan struct{}), make(chan uint64)
			fd := a.socket(t, unix.SOCK_DGRAM, 6000, false)
			go func() {
				tried := uint64(0)
				for port := 10_000; ; port++ {
					select {
					case <-stop:
						done <- tried
						return
					default:
					}
					_ = unix.Sendto(fd, []byte("new"), unix.MSG_DONTWAIT, sockaddr(b.v4, 10_000+port%50_000)) // lost is as good
					tried++
				}
			}()
			before, there, back := n.counts(), open.there.sent.Load(), open.back.sent.Load()
			moves := time.Duration(0)
			for i := range iterations {
				delta, err := e.compile(way.at[1-i%2])
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				if err := e.put(delta); err != nil {
					t.Fatal(err)
				}
				moves += time.Since(begin)
			}
			close(stop)
			tried := <-done
			open.end()
			got := n.since(before)
			if got["from_pod forward_pod"] != 0 {
				t.Errorf("%d packets got through", got["from_pod forward_pod"])
			}
			if got["from_pod drop_policy_egress"] == 0 || got["from_pod drop_policy_ingress"] == 0 || tried == 0 {
				t.Errorf("not tried at both ends: %v", got)
			}
			t.Logf("%d moves, %s each; denied meanwhile: %d packets and %d answers of an open flow, %d openings; counts %v",
				iterations, moves/time.Duration(iterations), open.there.sent.Load()-there, open.back.sent.Load()-back, tried, got)
		})
	}
}

// rewrite writes the pods' entries again and again until stop, and says how often.
func (n *node) rewrite(stop time.Time, pods ...*pod) (rewrites int) {
	n.t.Helper()
	for time.Now().Before(stop) {
		for _, p := range pods {
			if err := n.maps.SettlePod(uint32(p.commit.IfIndex)); err != nil {
				n.t.Fatal(err)
			}
			rewrites++
		}
	}
	return rewrites
}

// Whatever user space does to the pods' entries meanwhile, a packet is judged by its own two pods' policy: what is denied does
// not get through, and what is allowed is neither lost nor sent astray. The kernel gives the place of an entry that is replaced to the
// next one at once, while programs may still look at it.
func TestPodsRewritten(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	c, d := n.addPod("c", 3, loader.TCX), n.addPod("d", 4, loader.TCX)
	n.rows(row(100, 0, 0, 0, 0, deny, 0), row(101, 0, 0, 0, 0, allow, 0))
	allowed := dialogue(t, "udp", c, d, false)
	fd := a.socket(t, unix.SOCK_DGRAM, 6000, false)
	cfd := c.socket(t, unix.SOCK_DGRAM, 6000, false)
	open := talk(t, "udp", a, b, false, 0)
	defer open.end()
	until(t, "traffic", func() bool { return open.there.newest.Load() > 100 && open.back.newest.Load() > 100 })
	n.policy(a, 100, 101)
	for _, p := range []*pod{b, c, d} {
		n.policy(p, 101, 101)
	}
	if err := maps.Quiesce(); err != nil {
		t.Fatal(err)
	}
	before, there, back := n.counts(), open.there.sent.Load(), open.back.sent.Load()
	stop := time.Now().Add(3 * time.Second)
	tried := 0
	var load sync.WaitGroup
	load.Go(func() {
		for port := 0; time.Now().Before(stop); port++ {
			_ = unix.Sendto(fd, []byte("new"), unix.MSG_DONTWAIT, sockaddr(b.v4, 10_000+port%50_000)) // lost is as good
			tried++
		}
	})
	sent := uint64(0)
	load.Go(func() { // each packet opens a flow, so that each looks at the entries
		for port := 0; time.Now().Before(stop); port++ {
			if unix.Sendto(cfd, []byte("new"), unix.MSG_DONTWAIT, sockaddr(d.v4, 10_000+port%50_000)) == nil {
				sent++
			}
			if port%100 == 0 {
				if err := allowed.trip(allowed.made.Add(1)); err != nil {
					t.Errorf("trip %d: %v", allowed.made.Load(), err)
					return
				}
			}
		}
	})
	rewrites := n.rewrite(stop, a, b, c, d)
	load.Wait()
	open.end()
	got := n.since(before)
	for k := range got {
		if strings.Contains(k, " drop_") && k != "from_pod drop_policy_egress" {
			t.Errorf("%d %s", got[k], k)
		}
	}
	if open.there.newest.Load() > there || open.back.newest.Load() > back {
		t.Error("packets of the open flow got through")
	}
	flows, err := n.maps.Flows()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if f.Opener.Addr() == a.v4 && f.Responder.Port() >= 10_000 {
			t.Errorf("a denied flow was opened: %s to %s", f.Opener, f.Responder)
		}
	}
	t.Logf("%d rewrites, %d openings denied, %d allowed; counts %v", rewrites, tried, sent, got)
}

// While user space rewrites the pods' entries, each packet finds its two pods: the kernel's look-up may miss an entry that is being
// replaced. Runs of the program alone look some twenty times as often as traffic makes them.
func TestPodsFound(t *testing.T) {
	b := newBench(t, loader.Config{})
	b.rows(row(100, 0, 0, 0, 0, deny, 0))
	b.policy(b.b, 0, 100)
	frame := udp(b.a, b.v4pair()[0], b.v4pair()[1], 1)
	check(t, frame, b.fromA(frame), "drop_policy_ingress")
	before := b.node.counts()
	stop := time.Now().Add(3 * time.Second)
	const runs = 10_000
	packets := uint64(0)
	var load sync.WaitGroup
	load.Go(func() {
		if err := b.ns.Do(func() error {
			for ; time.Now().Before(stop); packets += runs {
				if _, err := b.programs["from_pod"].Run(&ebpf.RunOptions{Data: frame, Repeat: runs, Context: ctxOf(b.a)}); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	rewrites := b.rewrite(stop, b.a, b.b)
	load.Wait()
	got := b.node.since(before)
	if len(got) != 1 || got["from_pod drop_policy_ingress"] < packets { // a run that a signal ends is begun again
		t.Errorf("of %d packets between two pods: %v", packets, got)
	}
	t.Logf("%d rewrites, %d packets", rewrites, packets)
}
