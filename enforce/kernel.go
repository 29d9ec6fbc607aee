package enforce

import (
	"net/netip"

	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// kernel is what the maps hold of policy.
type kernel struct {
	peers map[netip.Prefix]uint32
	rows  map[policy.Key]policy.Row
	last  struct{ policy, identity, rule uint32 } // the largest ids
}

func readKernel(m *maps.Maps) (*kernel, error) {
	k := &kernel{peers: make(map[netip.Prefix]uint32), rows: make(map[policy.Key]policy.Row)}
	peers, err := m.Peers()
	if err != nil {
		return nil, err
	}
	for _, p := range peers {
		k.peers[p.Prefix] = p.Identity
		k.last.identity = max(k.last.identity, p.Identity, p.Next)
	}
	rows, err := m.Policy()
	if err != nil {
		return nil, err
	}
	for _, r := range rows {
		row := policy.Row{Rule: r.Rule}
		switch r.Action {
		case maps.PolicyAllow:
			row.Action = policy.Allow
		case maps.PolicyDeny:
			row.Action = policy.Deny
		}
		if r.Log {
			row.Flags |= policy.FlagLog
		}
		if r.SourcePorts {
			row.Flags |= policy.FlagSource
		} else {
			k.last.rule = max(k.last.rule, r.Rule)
		}
		k.rows[policy.Key{Bits: r.Bits, Policy: r.Policy, Identity: r.Identity, Protocol: r.Protocol, Port: r.Port}] = row
		k.last.policy = max(k.last.policy, r.Policy)
		if r.Identity != maps.IdentitySourcePorts {
			k.last.identity = max(k.last.identity, r.Identity)
		}
	}
	pods, err := m.Pods()
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		for _, id := range []uint32{p.PolicyEgress, p.PolicyIngress} {
			if id != maps.PolicyUnknown {
				k.last.policy = max(k.last.policy, id)
			}
		}
	}
	counted, err := m.RuleIDs()
	if err != nil {
		return nil, err
	}
	for _, id := range counted {
		k.last.rule = max(k.last.rule, id)
	}
	return k, nil
}

// beyond are numbers that give out no id that the maps hold.
func (k *kernel) beyond(n policy.Numbers) policy.Numbers {
	n.Policies.Next = max(n.Policies.Next, k.last.policy+1)
	n.Identities.Next = max(n.Identities.Next, k.last.identity+1)
	n.Rules.Next = max(n.Rules.Next, k.last.rule+1)
	return n
}

// clash tells whether a row of tables has another meaning in the maps.
func (k *kernel) clash(t *policy.Tables) bool {
	for key, row := range t.Rows() {
		if have, is := k.rows[key]; is && have != row {
			return true
		}
	}
	return false
}

// tables is what the maps hold, without pods.
func (k *kernel) tables() *policy.Tables {
	return policy.TablesOf(k.peers, func(yield func(policy.Key, policy.Row) bool) {
		for key, row := range k.rows {
			if !yield(key, row) {
				return
			}
		}
	})
}
