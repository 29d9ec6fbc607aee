package policy_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
)

func everybody(string) bool { return true }

// differs says where tables say something else than the evaluator of a packet, at the ends that are local.
func differs(m *policy.Model, tables *policy.Tables, p policy.Packet) error {
	for _, dir := range []policy.Direction{policy.Egress, policy.Ingress} {
		own := p.Source
		if dir == policy.Ingress {
			own = p.Destination
		}
		e := m.At(own)
		if e == nil {
			continue
		}
		if d := tables.Check(m, e.ID, dir, p); d != nil {
			return d
		}
	}
	return nil
}

// sound says what tables lack: a catch-all of every identity's rows, or an entry that says what the one around it does.
func sound(tables *policy.Tables) error {
	type pair struct{ policy, identity uint32 }
	rows, all := 0, make(map[pair]bool)
	keys := make(map[policy.Key]bool)
	for k, r := range tables.Rows() {
		rows++
		at := pair{k.Policy, k.Identity}
		all[at] = all[at] || k.Bits == 64 && k.Protocol == 0 && k.Port == 0
		if keys[k] || k.Bits < 96 && k.Port<<(max(k.Bits, 80)-80) != 0 || k.Bits > 64 && k.Bits < 80 {
			return fmt.Errorf("bad key %+v", k)
		}
		keys[k] = true
		if (r.Action == 0) != (r.Flags&policy.FlagSource != 0) {
			return fmt.Errorf("bad row %+v of %+v", r, k)
		}
	}
	for at, has := range all {
		if !has {
			return fmt.Errorf("policy %d has no catch-all for identity %d", at.policy, at.identity)
		}
		if at.identity != policy.SourceIdentity && !all[pair{at.policy, 0}] {
			return fmt.Errorf("policy %d has nothing for identity 0", at.policy)
		}
	}
	if size := tables.Size(); size.Rows != rows || size.Peers != len(tables.Peers) {
		return fmt.Errorf("size %+v with %d rows", size, rows)
	}
	return nil
}

// TestCompile holds tables against the evaluator, for random models and packets.
func TestCompile(t *testing.T) {
	policytest.Check(t, 1, 3000, 50, func(m *policy.Model, packets []policy.Packet) (int, error) {
		tables, err := policy.Compile(m, policy.Options{Local: everybody})
		if err == nil {
			err = sound(tables)
		}
		if err != nil {
			return 0, err
		}
		for i, p := range packets {
			if err := differs(m, tables, p); err != nil {
				return i, err
			}
		}
		return 0, nil
	})
}

// TestManyRules is TestCompile with a policy of some hundred rules: those of many random models.
func TestManyRules(t *testing.T) {
	for seed := range uint64(40) {
		g := policytest.New(seed)
		m := g.Model()
		all := &policy.Policy{ID: "all", Ingress: &policy.Rules{}, Egress: &policy.Rules{}}
		for range 20 {
			for _, tier := range g.Model().Tiers {
				for _, p := range tier.Policies {
					for from, to := range map[*policy.Rules]*policy.Rules{p.Ingress: all.Ingress, p.Egress: all.Egress} {
						if from != nil {
							to.Rules = append(to.Rules, slices.DeleteFunc(slices.Clone(from.Rules), func(r policy.Rule) bool { // would end it
								return r.Protocol == nil || r.Source.Selector == nil && r.Destination.Ports == nil
							})...)
						}
					}
				}
			}
		}
		m.Tiers = append([]policy.Tier{{Name: "first", Default: policy.Pass, Policies: []*policy.Policy{all}}}, m.Tiers...)
		tables, err := policy.Compile(m, policy.Options{Local: everybody})
		if err == nil {
			err = sound(tables)
		}
		for i := 0; i < 500 && err == nil; i++ {
			err = differs(m, tables, g.Packet(m))
		}
		if err != nil {
			t.Fatalf("seed %d, %d and %d rules: %v", seed, len(all.Ingress.Rules), len(all.Egress.Rules), err)
		}
	}
}

// in says what a delta makes of maps: it is carried out as the writer of kernel maps does.
type in struct {
	peers map[netip.Prefix]uint32
	rows  map[policy.Key]policy.Row
	pods  map[string]policy.PodPolicies
}

func (i *in) apply(d *policy.Delta) error {
	for _, c := range append(d.PutPeers, d.DeletePeers...) {
		if got := i.around(c.Prefix); got != c.Before {
			return fmt.Errorf("%v was %d, not %d", c.Prefix, got, c.Before)
		}
	}
	for _, s := range d.PutRows {
		for k, r := range s.All() {
			if _, had := i.rows[k]; had {
				return fmt.Errorf("row %+v is put over another", k)
			}
			i.rows[k] = r
		}
	}
	for _, c := range d.PutPeers {
		i.peers[c.Prefix] = c.After
	}
	for _, c := range d.DeletePeers {
		if _, had := i.peers[c.Prefix]; !had {
			return fmt.Errorf("%v is deleted, but was not there", c.Prefix)
		}
		delete(i.peers, c.Prefix)
	}
	for _, c := range d.DeletePeers {
		if got := i.around(c.Prefix); got != c.After {
			return fmt.Errorf("%v is %d now, not %d", c.Prefix, got, c.After)
		}
	}
	for _, s := range d.DeleteRows {
		for k := range s.All() {
			if _, had := i.rows[k]; !had {
				return fmt.Errorf("row %+v is deleted, but was not there", k)
			}
			delete(i.rows, k)
		}
	}
	for id, p := range d.PutPods {
		i.pods[id] = p
	}
	for _, id := range d.DeletePods {
		delete(i.pods, id)
	}
	return nil
}

// around is the identity of the longest prefix that contains all of p.
func (i *in) around(p netip.Prefix) uint32 {
	best, bits := uint32(0), -1
	a, n := p.Addr().As16(), p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	for q, id := range i.peers {
		b, m := q.Addr().As16(), q.Bits()
		if q.Addr().Is4() {
			m += 96
		}
		if m <= n && m > bits && netip.PrefixFrom(netip.AddrFrom16(a), m).Masked() == netip.PrefixFrom(netip.AddrFrom16(b), m).Masked() {
			best, bits = id, m
		}
	}
	return best
}

func (i *in) is(tables *policy.Tables) error {
	rows := 0
	for k, r := range tables.Rows() {
		rows++
		if got, has := i.rows[k]; !has || got != r {
			return fmt.Errorf("row %+v is %+v, not %+v", k, got, r)
		}
	}
	if rows != len(i.rows) || fmt.Sprint(i.peers) != fmt.Sprint(tables.Peers) || fmt.Sprint(i.pods) != fmt.Sprint(tables.Pods) {
		return fmt.Errorf("other rows, peers or pods: %d, %v, %v; not %d, %v, %v", len(i.rows), i.peers, i.pods, rows, tables.Peers, tables.Pods)
	}
	return nil
}

// shape is what tables are whatever the numbers.
func shape(tables *policy.Tables) string {
	return fmt.Sprintf("%+v, %d rules", tables.Size(), len(tables.Rules))
}

// TestIncremental changes models and wants of the tables and deltas of one compiler what another makes of the last model.
func TestIncremental(t *testing.T) {
	for seed := range uint64(400) {
		g := policytest.New(seed)
		m := g.Model()
		local := func(id string) bool { return !strings.HasPrefix(id, "ops/") }
		c := policy.NewCompiler(policy.Options{Local: local})
		kernel := in{make(map[netip.Prefix]uint32), make(map[policy.Key]policy.Row), make(map[string]policy.PodPolicies)}
		for step := range 12 {
			fail := func(err error) {
				if err != nil {
					t.Fatalf("seed %d, step %d: %v\n%s", seed, step, err, policytest.List(m, policy.Packet{}))
				}
			}
			fail(c.SetModel(m))
			delta, err := c.Update()
			fail(err)
			fail(sound(c.Tables()))
			if (seed+uint64(step))%3 != 0 { // otherwise it does not get into the maps: the next one must
				fail(kernel.apply(delta))
				fail(kernel.is(c.Tables()))
				c.Accept()
				again, err := c.Update()
				fail(err)
				if !again.Empty() {
					fail(fmt.Errorf("nothing changed, but: %+v", again))
				}
			}
			fresh, err := policy.Compile(m, policy.Options{Local: local, Numbers: c.Numbers()})
			fail(err)
			if shape(fresh) != shape(c.Tables()) {
				fail(fmt.Errorf("%s; not %s", shape(c.Tables()), shape(fresh)))
			}
			if d := policy.Diff(c.Tables(), fresh); !d.Empty() {
				fail(fmt.Errorf("from nothing it is another: %+v", d))
			}
			for range 10 {
				p := g.Packet(m)
				fail(differs(m, c.Tables(), p))
			}
			m = g.Change(m)
		}
	}
}
