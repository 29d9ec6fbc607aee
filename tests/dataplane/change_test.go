package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
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
	for _, p := range peersOf(t, b) {
		if p.Identity != p.Next {
			t.Errorf("%s has identity %d, and %d after the next change", p.Prefix, p.Identity, p.Next)
		}
	}
}

func peersOf(t *testing.T, b *bench) []maps.Peer {
	t.Helper()
	p, err := b.maps.Peers()
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
			before := len(rowsOf(t, b)) + len(peersOf(t, b))
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
				if n := len(rowsOf(t, b)) + len(peersOf(t, b)); n != before {
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

func rowsOf(t *testing.T, b *bench) []maps.PolicyRow {
	t.Helper()
	rows, err := b.maps.Policy()
	if err != nil {
		t.Fatal(err)
	}
	return rows
}
