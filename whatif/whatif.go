// Package whatif finds out which of a node's live flows another policy would cut. It copies what the node decides by into a
// second instance of the programs, that no interface leads to, and shows them a packet of every flow. Nothing on the node
// changes: no map, no counter, no epoch.
package whatif

import (
	"context"
	"errors"
	"fmt"
	gomaps "maps"
	"net/netip"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

var (
	// ErrCandidate says that the candidate cannot be put in force: it does not compile, or does not fit.
	ErrCandidate = errors.New("the candidate can't be put in force")
	// ErrInForce says that what is said to be in force cannot be.
	ErrInForce = errors.New("the policy in force can't be made again")
)

// Config is what there is and what would be. An endpoint of either model is one of this node if a pod of its maps has one of its
// addresses.
type Config struct {
	Maps      *maps.Maps // the node's
	InForce   *policy.Model
	Candidate *policy.Model
	// Numbers are those of the compiler whose tables are in the maps, so that rules have the ids that they have there; zero: they have others.
	Numbers policy.Numbers
	// Progress, if not nil, is told what is looked at: "flows, 30 %".
	Progress func(what string)
}

// Report is what would become of the flows that there are. Those that expired or ended are none of them.
type Report struct {
	Flows    int
	Denied   int        // that policy does not let pass as it is
	Cut      []Cut      // that pass, and would not
	Unjudged []Unjudged // of which it can't be told
}

// Cut is a flow that the candidate denies.
type Cut struct {
	maps.Flow
	Verdict string          // as in docs/maps.md: which end's policy it is
	RuleID  uint32          // see Config.Numbers
	Rule    policy.RuleInfo // that denies it
}

// Unjudged is a flow of which it can't be told whether the candidate cuts it.
type Unjudged struct {
	maps.Flow
	Why string
}

// Run says what becomes of the flows. Its caller stays in the node's network namespace and has root's rights. When ctx is
// done it ends with its error, and nothing is left in any case. Errors: ErrCandidate with what is wrong, ErrInForce,
// maps.ErrChanging.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	at := cfg.Progress
	if at == nil {
		at = func(string) {}
	}
	at("the node's maps")
	s, err := cfg.Maps.Snapshot()
	if err != nil {
		return nil, err
	}
	rows, peers, err := cfg.Maps.PolicyRoom()
	if err != nil {
		return nil, err
	}
	copied, err := instance(s, loader.Config{MaxFlows: max(1, uint32(s.Flows())), MaxPolicy: uint32(rows), MaxPeers: uint32(peers)})
	if err != nil {
		return nil, fmt.Errorf("make a copy of the node's programs: %w", err)
	}
	defer copied.Close()
	epoch := s.Epoch() // s is large, and not needed any more
	j, err := newJudge(copied.Maps)
	if err != nil {
		return nil, err
	}
	defer j.runner.Close()
	at("what the policies compile to")
	tables, err := compile(cfg, j.holder)
	if err != nil {
		return nil, err
	}

	flows, err := live(copied.Maps)
	if err != nil {
		return nil, err
	}
	report := &Report{Flows: len(flows)}
	each := func(what string, flows []maps.Flow, fn func(maps.Flow) error) error {
		for i, f := range flows {
			if i%256 == 0 {
				if err := ctx.Err(); err != nil {
					return err
				}
			}
			if i%(len(flows)/10+1) == 0 {
				at(fmt.Sprintf("%s, %d %%", what, 100*i/len(flows)))
			}
			if err := fn(f); err != nil {
				return err
			}
		}
		return nil
	}

	passing := flows[:0] // never ahead of what is read
	err = each("the flows under the policy in force", flows, func(f maps.Flow) (err error) {
		var o outcome
		if !current(&f, epoch) {
			o, err = j.flow(&f)
		}
		switch {
		case err != nil:
		case o.denied != nil:
			report.Denied++
		case o.unknown != "":
			report.Unjudged = append(report.Unjudged, Unjudged{f, o.unknown})
		default:
			passing = append(passing, f)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := tables.put(copied.Maps); errors.Is(err, maps.ErrFull) {
		return nil, fmt.Errorf("%w; there is room for %d rows of policy and %d prefixes of peers", err, rows, peers)
	} else if err != nil {
		return nil, err
	}
	err = each("the flows under the candidate", passing, func(f maps.Flow) error {
		o, err := j.flow(&f)
		switch {
		case err != nil:
		case o.denied != nil && o.denied.Verdict == verdictUnknown:
			report.Unjudged = append(report.Unjudged, Unjudged{f, "one of its pods has a policy, but no resource is about that pod"})
		case o.denied != nil:
			report.Cut = append(report.Cut, tables.cut(f, o.denied))
		case o.unknown != "":
			report.Unjudged = append(report.Unjudged, Unjudged{f, o.unknown})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return report, nil
}

// live lists the flows that are not over. Of a connection that both sides have closed, or one has reset, nothing can be cut.
func live(m *maps.Maps) ([]maps.Flow, error) {
	all, err := m.Flows()
	if err != nil {
		return nil, err
	}
	flows := all[:0]
	for _, f := range all {
		if f.State != "closing" && f.State != "closed" {
			f.Confirmed = f.State == "open" // in the copy all are in one map
			flows = append(flows, f)
		}
	}
	return flows, nil
}

// current tells whether the node's programs let a flow pass in an epoch: each direction that was seen was judged in it.
func current(f *maps.Flow, epoch uint32) bool {
	for _, l := range []maps.Leg{f.Sent, f.Received} {
		if seen(l) && l.Epoch != epoch {
			return false
		}
	}
	return seen(f.Sent) || seen(f.Received)
}

// copied is a second instance of a node's programs.
type copied struct {
	*maps.Maps
	closeDir func() error
}

// instance loads the programs once more, with maps of their own, of these sizes, that hold a snapshot.
func instance(s *maps.Snapshot, cfg loader.Config) (_ *copied, err error) {
	dir, closeDir, err := loader.PrivateDir()
	if err != nil {
		return nil, err
	}
	cfg.Dir = dir
	c := &copied{closeDir: closeDir}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := loader.Ensure(cfg); err != nil {
		return nil, err
	}
	if c.Maps, err = maps.Open(dir); err != nil {
		return nil, err
	}
	return c, c.Restore(s)
}

// Close removes it.
func (c *copied) Close() error {
	var err error
	if c.Maps != nil {
		err = c.Maps.Close()
	}
	return errors.Join(err, c.closeDir())
}

// compiled is how the maps come to the policy in force, and from there to the candidate.
type compiled struct {
	inForce, candidate *policy.Delta
	rules              map[uint32]policy.RuleInfo
	ifindex            func(endpoint string) (uint32, bool)
}

// compile makes the tables of both models. holder says behind which interface each address of this node is.
func compile(cfg Config, holder map[netip.Addr]uint32) (*compiled, error) {
	local := make(map[string]uint32)
	for _, m := range []*policy.Model{cfg.InForce, cfg.Candidate} {
		for id, e := range m.Endpoints {
			for _, a := range e.Addresses {
				if ifindex, ok := holder[a]; ok {
					local[id] = ifindex
				}
			}
		}
	}
	t := &compiled{ifindex: func(id string) (uint32, bool) { i, ok := local[id]; return i, ok }}
	c := policy.NewCompiler(policy.Options{Numbers: cfg.Numbers, Local: func(id string) bool { _, ok := local[id]; return ok }})
	for _, step := range []struct {
		model *policy.Model
		into  **policy.Delta
		bad   error
	}{{cfg.InForce, &t.inForce, ErrInForce}, {cfg.Candidate, &t.candidate, ErrCandidate}} {
		err := c.SetModel(step.model)
		if err == nil {
			*step.into, err = c.Update()
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", step.bad, err)
		}
		c.Accept()
	}
	t.rules = gomaps.Clone(c.Tables().Rules)
	return t, nil
}

// put puts the candidate in force in m, in the same steps as on the node: first what is in force there, from nothing.
func (t *compiled) put(m *maps.Maps) error {
	rows, err := m.Policy()
	if err != nil {
		return err
	}
	peers, err := m.Peers()
	if err != nil {
		return err
	}
	keys, prefixes := make([]maps.PolicyKey, len(rows)), make([]netip.Prefix, len(peers))
	for i, r := range rows {
		keys[i] = r.PolicyKey
	}
	for i, p := range peers {
		prefixes[i] = p.Prefix
	}
	if err := errors.Join(m.RemovePolicy(keys), m.RemovePeers(prefixes)); err != nil {
		return err
	}
	if err := commit.SetPolicy(m, t.inForce, t.ifindex); err != nil {
		return fmt.Errorf("%w: %w", ErrInForce, err)
	}
	if err := commit.SetPolicy(m, t.candidate, t.ifindex); err != nil {
		return fmt.Errorf("%w: %w", ErrCandidate, err)
	}
	_, err = m.RaiseEpoch() // also when nothing differs
	return err
}

// cut says by which rule the candidate denies a flow.
func (t *compiled) cut(f maps.Flow, drop *maps.Event) Cut {
	id := drop.RuleEgress
	if drop.Verdict == verdictIngress {
		id = drop.RuleIngress
	}
	return Cut{f, drop.Verdict, id, t.rules[id]}
}
