package enforce

import (
	"fmt"

	"github.com/caracal-net/caracal/policy"
)

// Rule is what a rule id stands for that is in force; false: nothing.
func (p *Policy) Rule(id uint32) (Rule, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	info, ok := p.model.compiler.Tables().Rules[id]
	if !ok {
		return Rule{}, false
	}
	return RuleOf(info), true
}

// String says where the rule stands.
func (r Rule) String() string {
	switch {
	case r.Place == "":
		return policy.RuleRef{Tier: r.Tier, Policy: r.Policy, Index: r.Index}.String()
	case r.Tier == "":
		return fmt.Sprintf("%s, spec.%s", r.Policy, r.Place)
	}
	return fmt.Sprintf("%s, spec.%s (tier %s)", r.Policy, r.Place, r.Tier)
}
