package maps

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// PolicyAction is what a row of caracal_policy makes of a flow.
type PolicyAction uint8

// The actions.
const (
	PolicyAllow = PolicyAction(bpf.DataplanePolicyActionPOLICY_ALLOW)
	PolicyDeny  = PolicyAction(bpf.DataplanePolicyActionPOLICY_DENY)
)

var policyActions = []string{"none", "allow", "deny"}

// String is the action's word.
func (a PolicyAction) String() string { return word(policyActions, a) }

// MarshalText writes the action's word.
func (a PolicyAction) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// Identities with a meaning of their own.
const (
	IdentityAnyone      = 0          // whoever has no rows under the policy id
	IdentitySourcePorts = 0xffffffff // Policy is a table of source ports
)

// PolicyUnknown is the policy id of a pod whose policy is not known. It has no rows, so what it judges is dropped
// (DROP_POLICY_UNKNOWN).
const PolicyUnknown = 0xfffffffe

// How many bits of a PolicyKey count. BitsProtocol+n: n bits of the port.
const (
	BitsAny      = 64 // policy and identity: any protocol
	BitsProtocol = 80 // any port
	BitsPort     = 96
)

const ( // POLICY_*
	policyLog         = 1
	policySourcePorts = 2
)

// PolicyKey says which flows a row is about.
type PolicyKey struct {
	Policy   uint32 `json:"policy"`   // policy id
	Identity uint32 `json:"identity"` // of the other end
	Bits     uint8  `json:"bits"`     // BitsAny, or BitsProtocol to BitsPort
	Protocol uint8  `json:"protocol"` // IANA number
	Port     uint16 `json:"port"`     // the responder's, the lowest of 1 << (BitsPort - Bits); ICMP: type<<8 | code
}

// PolicyRow is a row of caracal_policy.
type PolicyRow struct {
	PolicyKey
	Action PolicyAction `json:"action"`
	Log    bool         `json:"log,omitempty"` // a rule that logs was met
	// SourcePorts says that the source port decides: Rule is then the Policy of rows with IdentitySourcePorts.
	SourcePorts bool   `json:"sourcePorts,omitempty"`
	Rule        uint32 `json:"rule"` // rule id; 0: none
}

// encode is the key as the map has it; what does not count is zero.
func (k PolicyKey) encode() (bpf.DataplanePolicyKey, error) {
	out := bpf.DataplanePolicyKey{Prefixlen: uint32(k.Bits), Policy: be32(k.Policy), Identity: be32(k.Identity)}
	switch {
	case k.Bits == BitsAny:
	case k.Bits >= BitsProtocol && k.Bits <= BitsPort:
		out.Protocol = k.Protocol
		out.Port = port(uint16(uint32(k.Port) & (0xffff << (BitsPort - k.Bits))))
	default:
		return out, fmt.Errorf("policy row with %d bits: %d, or %d to %d", k.Bits, BitsAny, BitsProtocol, BitsPort)
	}
	return out, nil
}

// be32 turns a number into how it lies in memory in wire order, and back.
func be32(v uint32) uint32 {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return binary.NativeEndian.Uint32(b[:])
}

// PutPolicy writes rows, over those that have the same key. ErrFull: some of them may have been written.
func (m *Maps) PutPolicy(rows []PolicyRow) error {
	if len(rows) == 0 {
		return nil
	}
	keys, values := make([]bpf.DataplanePolicyKey, len(rows)), make([]bpf.DataplanePolicyRow, len(rows))
	for i, r := range rows {
		var err error
		if keys[i], err = r.encode(); err != nil {
			return err
		}
		values[i] = bpf.DataplanePolicyRow{Action: bpf.DataplanePolicyAction(r.Action), Rule: r.Rule}
		if r.Log {
			values[i].Flags |= policyLog
		}
		if r.SourcePorts {
			values[i].Flags |= policySourcePorts
		}
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPolicy)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if _, err := pinned.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("write %d rows of policy: %w", len(rows), full(err))
	}
	return nil
}

// RemovePolicy removes the rows of exactly these keys. Missing ones are not an error.
func (m *Maps) RemovePolicy(rows []PolicyKey) error {
	keys := make([]bpf.DataplanePolicyKey, len(rows))
	for i, k := range rows {
		var err error
		if keys[i], err = k.encode(); err != nil {
			return err
		}
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPolicy)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if err := removeAll(pinned, keys); err != nil {
		return fmt.Errorf("remove rows of policy: %w", err)
	}
	return nil
}

// Policy lists all rows, by key.
func (m *Maps) Policy() ([]PolicyRow, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPolicy)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	var rows []PolicyRow
	err = each(pinned, func(k *bpf.DataplanePolicyKey, v *bpf.DataplanePolicyRow) {
		rows = append(rows, decodePolicyRow(PolicyKey{
			Policy: be32(k.Policy), Identity: be32(k.Identity), Bits: uint8(k.Prefixlen), Protocol: k.Protocol, Port: port(k.Port),
		}, v))
	})
	if err != nil {
		return nil, fmt.Errorf("list policy: %w", err)
	}
	slices.SortFunc(rows, func(a, b PolicyRow) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Identity, b.Identity), cmp.Compare(a.Protocol, b.Protocol),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.Bits, b.Bits))
	})
	return rows, nil
}

// Decide finds the row that decides about a flow, as the programs do: policy is the policy id of one end, identity that of the
// other, port the responder's (ICMP: type<<8 | code) and source the opener's. Of the row's key only Policy and Identity are those
// that it was found by. ErrNotFound when there is none: the programs drop then (drop_policy_unknown).
func (m *Maps) Decide(policy, identity uint32, protocol uint8, port, source uint16) (PolicyRow, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPolicy)
	if err != nil {
		return PolicyRow{}, err
	}
	defer pinned.Close()
	find := func(policy, identity uint32, port uint16) (row PolicyRow, err error) {
		k := PolicyKey{Policy: policy, Identity: identity, Bits: BitsPort, Protocol: protocol, Port: port}
		key, err := k.encode()
		if err != nil {
			return row, err
		}
		var value bpf.DataplanePolicyRow
		if err := pinned.Lookup(&key, &value); err != nil {
			if errors.Is(err, ebpf.ErrKeyNotExist) {
				err = ErrNotFound
			}
			return row, fmt.Errorf("policy %d: %w", policy, err)
		}
		return decodePolicyRow(PolicyKey{Policy: policy, Identity: identity}, &value), nil
	}
	row, err := find(policy, identity, port)
	if errors.Is(err, ErrNotFound) && identity != IdentityAnyone {
		row, err = find(policy, IdentityAnyone, port)
	}
	if err == nil && row.SourcePorts {
		row, err = find(row.Rule, IdentitySourcePorts, source)
	}
	return row, err
}

func decodePolicyRow(k PolicyKey, v *bpf.DataplanePolicyRow) PolicyRow {
	return PolicyRow{PolicyKey: k, Action: PolicyAction(v.Action), Log: v.Flags&policyLog != 0, SourcePorts: v.Flags&policySourcePorts != 0, Rule: v.Rule}
}

// PolicyRoom is how many rows caracal_policy, and how many prefixes caracal_peers has room for.
func (m *Maps) PolicyRoom() (rows, peers int, err error) {
	for name, into := range map[string]*int{bpf.DataplaneMapCaracalPolicy: &rows, bpf.DataplaneMapCaracalPeers: &peers} {
		pinned, err := m.pinned(name)
		if err != nil {
			return 0, 0, err
		}
		*into = int(pinned.MaxEntries())
		pinned.Close()
	}
	return rows, peers, nil
}
