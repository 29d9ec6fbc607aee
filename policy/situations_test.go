package policy_test

import (
	"testing"

	. "github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/policy/policytest"
)

// TestSituations holds the conversion of what people write, and the evaluator, against situations from the documentation and
// the tests of Kubernetes, Calico and the network policy API.
func TestSituations(t *testing.T) {
	all := policytest.Situations(t, "testdata")
	if len(all) < 80 {
		t.Errorf("%d situations", len(all))
	}
	for _, s := range all {
		t.Run(s.Name, func(t *testing.T) {
			for _, p := range s.Probes {
				f := s.Model.Flow(p.Packet)
				for name, v := range map[string]*Verdict{p.From: f.Egress, p.To: f.Ingress} {
					if _, pod := s.Addresses[name]; pod != (v != nil) {
						t.Fatalf("line %d: %s is no endpoint", p.Line, name)
					}
				}
				if f.Action() != p.Want {
					t.Errorf("line %d: %s -> %s, %s: %s, want %s", p.Line, p.From, p.To, p.Packet, f.Action(), p.Want)
					explain(t, s.Model, p.Packet, f)
				}
			}
		})
	}
}

func explain(t *testing.T, m *Model, p Packet, f FlowVerdict) {
	for end, v := range map[string]*Verdict{"egress": f.Egress, "ingress": f.Ingress} {
		if v == nil {
			continue
		}
		t.Logf("    %s: %s by %s", end, v.Action, v.Rule)
		for _, l := range v.Trace {
			why := "matches"
			if len(l.Missed) > 0 {
				why = m.Miss(l.Rule, l.Missed[0], p)
			}
			t.Logf("        %s: %s: %s", l.Ref, l.Rule, why)
		}
	}
}
