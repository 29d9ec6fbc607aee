package policy_test

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
)

// TestProve: of what is right there is nothing to say, whatever the model and the change.
func TestProve(t *testing.T) {
	packets := 0
	for seed := range uint64(300) {
		g := policytest.New(seed)
		m := g.Model()
		c := policy.NewCompiler(policy.Options{Local: func(id string) bool { return !strings.HasPrefix(id, "ops/") }})
		for range 5 {
			if err := c.SetModel(m); err != nil {
				t.Fatal(err)
			}
			n, err := policy.Prove(m, c.Tables(), update(t, c), time.Second)
			if err != nil {
				t.Fatalf("seed %d: %v\n%s", seed, err, policytest.List(m, policy.Packet{}))
			}
			packets += n
			c.Accept()
			m = g.Change(m)
		}
	}
	t.Logf("%d packets", packets)
	if packets < 100_000 {
		t.Errorf("%d packets of 1500 changes", packets)
	}
}

// found is a disagreement that a few proofs find, nil if none.
func found(t *testing.T, m *policy.Model, tables *policy.Tables, d *policy.Delta, tries int) *policy.Disagreement {
	t.Helper()
	for range tries {
		_, err := policy.Prove(m, tables, d, time.Second)
		var wrong *policy.Disagreement
		if errors.As(err, &wrong) {
			return wrong
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return nil
}

// TestProveFinds spoils tables by hand, each in one thing.
func TestProveFinds(t *testing.T) {
	tcp := uint8(6)
	friend := sel(t, "role == 'friend'")
	m := model(t, []policy.Rule{
		{Action: policy.Allow, Protocol: &tcp, Source: policy.Peer{Selector: &friend}, Destination: policy.Peer{Ports: []policy.Ports{{First: 8000, Last: 8009}}}},
		{Action: policy.Allow, Protocol: &tcp, Source: policy.Peer{Nets: nets("192.0.2.0/24")}, Destination: policy.Peer{Ports: []policy.Ports{{Name: "http"}}}},
	}, endpoint("server", "role=server", "10.65.0.1"), endpoint("friend", "role=friend", "10.65.0.2"), endpoint("other", "", "10.65.0.3"))
	m.Endpoints["server"].Ports = []policy.NamedPort{{Name: "http", Protocol: 6, Port: 80}}
	for name, spoil := range map[string]func(*policy.Tables){
		"a policy id that is missing": func(tables *policy.Tables) { tables.Pods["server"] = policy.PodPolicies{} },
		"a policy id of nobody":       func(tables *policy.Tables) { tables.Pods["server"] = policy.PodPolicies{Ingress: 99} },
		"a friend's identity": func(tables *policy.Tables) {
			tables.Peers[netip.MustParsePrefix("10.65.0.2/32")] = 0
		},
		"a net's identity": func(tables *policy.Tables) { tables.Peers[netip.MustParsePrefix("192.0.2.0/24")] = 0 },
		"a rule's name":    func(tables *policy.Tables) { delete(tables.Rules, 1) },
	} {
		c := policy.NewCompiler(policy.Options{Local: func(id string) bool { return id == "server" }})
		if err := c.SetModel(m); err != nil {
			t.Fatal(err)
		}
		d := update(t, c)
		if wrong := found(t, m, c.Tables(), d, 3); wrong != nil {
			t.Fatalf("before it was spoilt: %v", wrong)
		}
		spoil(c.Tables())
		wrong := found(t, m, c.Tables(), d, 5)
		if wrong == nil {
			t.Errorf("%s was not found", name)
			continue
		}
		t.Logf("%s: %v", name, wrong)
	}

	// Every row, one after the other.
	tables, err := policy.Compile(m, policy.Options{Local: func(id string) bool { return id == "server" }})
	if err != nil {
		t.Fatal(err)
	}
	nothing, err := policy.Compile(&policy.Model{}, policy.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := policy.Diff(nothing, tables)
	for i := 0; ; i++ {
		key, undo, ok := tables.Spoil(i, func(r *policy.Row) { r.Action = policy.Allow + policy.Deny - r.Action })
		if !ok {
			break
		}
		if wrong := found(t, m, tables, d, 50); wrong == nil {
			t.Errorf("the opposite in %+v was not found", key)
		}
		undo()
	}
}

// TestProveFindsMost spoils one random row of random models. Not every row is anybody's who has an address in the model.
func TestProveFindsMost(t *testing.T) {
	spoilt, seen := 0, 0
	for seed := range uint64(300) {
		g := policytest.New(seed)
		m := g.Model()
		c := policy.NewCompiler(policy.Options{Local: everybody})
		if err := c.SetModel(m); err != nil {
			t.Fatal(err)
		}
		d := update(t, c)
		rows := c.Tables().Size().Rows
		if rows == 0 {
			continue
		}
		change := func(r *policy.Row) {
			if r.Flags&policy.FlagSource == 0 {
				r.Action = policy.Allow + policy.Deny - r.Action
			}
		}
		if _, _, ok := c.Tables().Spoil(rand.IntN(rows), change); !ok {
			t.Fatal("no such row")
		}
		spoilt++
		if found(t, m, c.Tables(), d, 20) != nil {
			seen++
		}
	}
	t.Logf("found in %d of %d tables", seen, spoilt)
	if seen < spoilt/2 {
		t.Errorf("found in %d of %d tables", seen, spoilt)
	}
}

// BenchmarkProve proves the change of one policy of 1,000 on a node with 250 pods, 10,000 on others.
func BenchmarkProve(b *testing.B) {
	m := node(b, 250, 10000, 200, 1000)
	c := compile(b, m)
	c.Accept()
	m.Tiers[0].Policies[500] = appPolicy(b, 500, 200, 9999)
	if err := c.SetTiers(m.Tiers); err != nil {
		b.Fatal(err)
	}
	d := update(b, c)
	packets := 0
	start := cpu()
	for b.Loop() {
		n, err := policy.Prove(m, c.Tables(), d, 2*time.Millisecond)
		if err != nil {
			b.Fatal(err)
		}
		packets += n
	}
	b.ReportMetric((cpu()-start)/float64(b.N)*1e3, "cpu-ms/op")
	b.ReportMetric(float64(packets)/float64(b.N), "packets/op")
}
