package dataplane

import (
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
)

// Who is killed in the middle of a change of policy leaves the old one or the new one, whoever raises the epoch next.
func TestPolicyInterrupted(t *testing.T) {
	b := newBench(t, loader.Config{})
	ends := b.v4pair()
	deny := []maps.PolicyRow{
		{PolicyKey: maps.PolicyKey{Policy: 7, Bits: maps.BitsAny}, Action: maps.PolicyAllow},
		{PolicyKey: maps.PolicyKey{Policy: 7, Identity: 5, Bits: maps.BitsAny}, Action: maps.PolicyDeny},
	}
	b.rows(deny...)
	b.policy(b.b, 0, 7)
	port := uint16(1000)
	want := func(verdict string) {
		t.Helper()
		port++
		f := udp(b.a, at(ends[0].Addr(), port), ends[1], 8)
		check(t, f, b.fromA(f), verdict)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	raise := func() error { _, err := b.maps.RaiseEpoch(); return err }
	flip := func() error { _, err := b.maps.Flip(); return err }
	a, whole := netip.PrefixFrom(ends[0].Addr(), 32), netip.MustParsePrefix("10.65.0.0/26")

	want("forward_pod")
	must(b.maps.Stage()) // killed before the epoch was raised
	must(b.maps.StagePeers([]maps.Peer{{Prefix: a, Next: 5}}))
	must(b.maps.StagePod(uint32(b.b.commit.IfIndex), 0, 9))
	want("forward_pod")
	for range 3 {
		must(raise())
		want("forward_pod")
	}

	must(b.maps.Stage()) // killed after it was
	must(b.maps.StagePeers([]maps.Peer{{Prefix: a, Next: 5}, {Prefix: whole, Next: 6}}))
	must(flip())
	for range 3 {
		want("drop_policy_ingress")
		must(raise())
	}
	must(b.maps.Stage())
	must(b.maps.StagePod(uint32(b.b.commit.IfIndex), 0, 0))
	must(flip())
	for range 3 {
		want("forward_pod")
		must(raise())
	}
	for _, p := range peersOf(t, b.node) {
		if p.Identity != p.Next {
			t.Errorf("%s has identity %d, and %d after the next change", p.Prefix, p.Identity, p.Next)
		}
	}
}

func peersOf(t *testing.T, n *node) []maps.Peer {
	t.Helper()
	p, err := n.maps.Peers()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A policy for which there is no room is refused whole, and the old one stays in force.
func TestPolicyDoesNotFit(t *testing.T) {
	for name, cfg := range map[string]loader.Config{"rows": {MaxPolicy: 100, MaxPeers: 10000}, "peers": {MaxPolicy: 10000, MaxPeers: 100}} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, cfg)
			ends := b.v4pair()
			e := b.enforce(b.b)
			set := func(rules ...policy.Rule) error {
				t.Helper()
				d, err := e.compile(&policy.Model{
					Endpoints: map[string]*policy.Endpoint{"b": endpointOf(b.b)},
					Tiers:     []policy.Tier{{Name: "default", Default: policy.Deny, Policies: []*policy.Policy{{ID: "p", Ingress: &policy.Rules{Rules: rules}}}}},
				})
				if err != nil {
					t.Fatal(err)
				}
				return e.put(d)
			}
			from := func(n string) policy.Rule {
				return policy.Rule{Action: policy.Allow, Source: policy.Peer{Nets: []netip.Prefix{netip.MustParsePrefix(n)}}}
			}
			want := func(port uint16, verdict string) {
				t.Helper()
				f := udp(b.a, at(ends[0].Addr(), port), ends[1], 8)
				check(t, f, b.fromA(f), verdict)
			}
			if err := set(from("10.65.0.0/24")); err != nil {
				t.Fatal(err)
			}
			want(1, "forward_pod")
			before := len(rowsOf(t, b.node)) + len(peersOf(t, b.node))
			var many []policy.Rule
			for i := range 500 {
				many = append(many, from(fmt.Sprintf("192.0.%d.%d/32", 2+i/250, i%250)))
			}
			for range 2 {
				if err := set(many...); !errors.Is(err, maps.ErrFull) {
					t.Fatalf("a policy for which there is no room: %v", err)
				}
				want(2, "forward_pod")
				if _, err := b.maps.RaiseEpoch(); err != nil {
					t.Fatal(err)
				}
				want(3, "forward_pod")
				if n := len(rowsOf(t, b.node)) + len(peersOf(t, b.node)); n != before {
					t.Errorf("%d rows and peers, %d before", n, before)
				}
			}
			if err := set(from("192.0.2.0/24")); err != nil { // which fits
				t.Fatal(err)
			}
			want(4, "drop_policy_ingress")
		})
	}
}

func rowsOf(t *testing.T, n *node) []maps.PolicyRow {
	t.Helper()
	rows, err := n.maps.Policy()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}

// After any number of changes the maps are as those of a node that never had another policy, in both epochs.
func TestChangesLeaveNoTrace(t *testing.T) {
	seeds, steps := uint64(20), 20
	if testing.Short() {
		seeds = 4
	}
	changed, fresh := newNode(t, loader.Config{}), newNode(t, loader.Config{})
	newEnforcer(t, fresh.maps, isLocal)
	total := 0
	for seed := range seeds {
		g := policytest.New(seed)
		m := g.Model()
		e := newEnforcer(t, changed.maps, isLocal)
		pods := make(map[string]commit.Pod)
		for step := range steps {
			fail := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatalf("seed %d, step %d: %v\n%s", seed, step, err, policytest.List(m, policy.Packet{}))
				}
			}
			added, err := follow(e, m, pods)
			fail(err)
			d, err := e.compile(m)
			fail(err)
			for _, id := range added { // it may have the policy ids of its predecessor
				d.PutPods[id] = e.compiler.Tables().Pods[id]
			}
			fail(e.put(d))
			total++
			if step%5 == 4 || step == steps-1 {
				fail(sameAsFresh(e, changed, fresh, m, pods))
			}
			m = g.Change(m)
		}
		m = &policy.Model{}
		if _, err := follow(e, m, pods); err != nil {
			t.Fatal(err)
		}
		e.set(m)
		if rows, peers := rowsOf(t, changed), peersOf(t, changed); len(rows)+len(peers) > 0 {
			t.Fatalf("seed %d: without policy %d rows and %d peers stay", seed, len(rows), len(peers))
		}
	}
	t.Logf("%d changes of %d models", total, seeds)
}

// follow makes the node's pods the local endpoints of a model, behind interfaces that need not exist, and returns those that it
// added.
func follow(e *enforcer, m *policy.Model, pods map[string]commit.Pod) (added []string, err error) {
	for id, p := range pods {
		if m.Endpoints[id] != nil && slices.Equal(p.Addrs, m.Endpoints[id].Addresses) {
			continue
		}
		if err := commit.RemovePod(e.maps, p); err != nil {
			return nil, err
		}
		delete(pods, id)
		delete(e.ifindex, id)
	}
	for _, id := range slices.Sorted(stdmaps.Keys(m.Endpoints)) {
		if _, has := pods[id]; has || !isLocal(id) {
			continue
		}
		free := uint32(10_000)
		for slices.Contains(slices.Collect(stdmaps.Values(e.ifindex)), free) {
			free++
		}
		pods[id] = commit.Pod{IfIndex: int(free), Addrs: m.Endpoints[id].Addresses, MAC: gatewayMAC, HostMAC: gatewayMAC, MTU: 1500, Network: "test"}
		e.ifindex[id] = free
		added = append(added, id)
		if err := commit.AddPod(e.maps, pods[id]); err != nil {
			return nil, err
		}
	}
	return added, nil
}

// sameAsFresh says in what a node's maps differ from those of one that had nothing and is given the same model, by the same
// numbers.
func sameAsFresh(e *enforcer, n, fresh *node, m *policy.Model, pods map[string]commit.Pod) error {
	tables, err := policy.Compile(m, policy.Options{Local: isLocal, Numbers: e.compiler.Numbers()})
	if err != nil {
		return err
	}
	nothing, err := policy.Compile(&policy.Model{}, policy.Options{})
	if err != nil {
		return err
	}
	ifindex := func(id string) (uint32, bool) { i, ok := e.ifindex[id]; return i, ok }
	for _, p := range pods {
		if err := commit.AddPod(fresh.maps, p); err != nil {
			return err
		}
	}
	if err := commit.SetPolicy(fresh.maps, policy.Diff(nothing, tables), ifindex); err != nil {
		return err
	}
	for range 2 { // epochs
		for what, list := range map[string]func(*node) (any, error){
			"rows":  func(n *node) (any, error) { return n.maps.Policy() },
			"peers": func(n *node) (any, error) { return n.maps.Peers() },
			"pods":  func(n *node) (any, error) { return n.maps.Pods() },
		} {
			got, err := list(n)
			if err != nil {
				return err
			}
			want, err := list(fresh)
			if err != nil {
				return err
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
				return fmt.Errorf("%s are others than from nothing (-want +got):\n%s", what, diff)
			}
		}
		for _, n := range []*node{n, fresh} {
			if _, err := n.maps.RaiseEpoch(); err != nil {
				return err
			}
		}
	}
	if err := commit.SetPolicy(fresh.maps, policy.Diff(tables, nothing), ifindex); err != nil {
		return err
	}
	for _, p := range pods {
		if err := commit.RemovePod(fresh.maps, p); err != nil {
			return err
		}
	}
	return nil
}
