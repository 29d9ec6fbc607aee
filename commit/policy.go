package commit

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// SetPolicy puts a change of compiled policy in force, for all pods and both directions in one write. New rows come first;
// then what pods and peers will be from the next epoch on; then the epoch; and when no packet is judged by the old one any
// more, what only that needed goes. If it does not fit (maps.ErrFull) the old policy stays in force whole. A pod that
// ifindex does not know has no interface yet, or no more, and is left out.
//
// Whoever is killed on the way leaves either the old policy in force or the new one, and maps.RaiseEpoch cleans up.
func SetPolicy(m *maps.Maps, d *policy.Delta, ifindex func(endpoint string) (uint32, bool)) error {
	settle, err := PutPolicy(m, d, ifindex)
	if err != nil {
		return err
	}
	return settle()
}

// PutPolicy is the first half of SetPolicy, after which the change is in force. The caller keeps the node lock and calls
// settle, the second half, which waits 10 to 20 ms for running programs.
func PutPolicy(m *maps.Maps, d *policy.Delta, ifindex func(endpoint string) (uint32, bool)) (settle func() error, err error) {
	if d.Empty() {
		return func() error { return nil }, nil
	}
	if err := m.Settle(); err != nil {
		return nil, err
	}
	put := rows(d.PutRows)
	var staged staged
	if err = m.PutPolicy(put); err == nil {
		staged, err = stage(m, d, ifindex)
	}
	if err != nil {
		// Nothing of it is in force. The keys of its rows are new ones, so that no other policy's rows go with them.
		return nil, errors.Join(fmt.Errorf("the policy that was in force stays: %w", err), m.Settle(), m.TrimPeers(prefixes(d.PutPeers)), m.RemovePolicy(keys(put)))
	}
	if _, err := m.Flip(); err != nil {
		return nil, err
	}
	return func() error {
		if err := maps.Quiesce(); err != nil {
			return err
		}
		if err := staged.settle(m); err != nil {
			return err
		}
		return errors.Join(m.RemovePeers(prefixes(d.DeletePeers)), m.RemovePolicy(keys(rows(d.DeleteRows))))
	}, nil
}

// AddPolicy puts in force a change that is only about pods that are cut off until then (maps.PolicyUnknown), or not in the maps
// yet: their policy ids, the identities of their addresses, new rows. Nobody can be judged by half of it, so nobody is waited for.
func AddPolicy(m *maps.Maps, d *policy.Delta, ifindex func(endpoint string) (uint32, bool)) error {
	if err := m.Settle(); err != nil {
		return err
	}
	put := rows(d.PutRows)
	if err := m.PutPolicy(put); err != nil {
		return errors.Join(fmt.Errorf("the policy that was in force stays: %w", err), m.RemovePolicy(keys(put)))
	}
	var peers []maps.Peer
	for _, c := range d.PutPeers {
		peers = append(peers, maps.Peer{Prefix: c.Prefix, Identity: c.After})
	}
	if err := m.PutPeers(peers); err != nil {
		return err
	}
	for id, p := range d.PutPods {
		i, ok := ifindex(id)
		if !ok {
			continue
		}
		if err := m.PutPodPolicy(i, p.Egress, p.Ingress); err != nil && !errors.Is(err, maps.ErrNotFound) {
			return err
		}
	}
	_, err := m.Flip()
	return err
}

// staged is what differs in the slots of an epoch and the next.
type staged struct {
	peers []netip.Prefix
	pods  []uint32
}

// stage writes what pods and peers are from the next epoch on.
func stage(m *maps.Maps, d *policy.Delta, ifindex func(string) (uint32, bool)) (s staged, err error) {
	if err := m.Stage(); err != nil {
		return s, err
	}
	var peers []maps.Peer
	for _, changes := range [][]policy.PeerChange{d.PutPeers, d.DeletePeers} {
		for _, c := range changes {
			peers = append(peers, maps.Peer{Prefix: c.Prefix, Next: c.After})
		}
		s.peers = append(s.peers, prefixes(changes)...)
	}
	if err := m.StagePeers(peers); err != nil {
		return s, err
	}
	for id, p := range d.PutPods {
		i, ok := ifindex(id)
		if !ok {
			continue
		}
		if err := m.StagePod(i, p.Egress, p.Ingress); err != nil && !errors.Is(err, maps.ErrNotFound) {
			return s, err
		}
		s.pods = append(s.pods, i)
	}
	return s, nil
}

// settle makes what was staged the same in both slots. It is maps.Settle without looking at all pods and peers.
func (s staged) settle(m *maps.Maps) error {
	for _, i := range s.pods {
		if err := m.SettlePod(i); err != nil && !errors.Is(err, maps.ErrNotFound) {
			return err
		}
	}
	if err := m.SettlePeers(s.peers); err != nil {
		return err
	}
	return m.Settled()
}

func prefixes(changes []policy.PeerChange) []netip.Prefix {
	out := make([]netip.Prefix, len(changes))
	for i, c := range changes {
		out[i] = c.Prefix
	}
	return out
}

func rows(sets []policy.RowSet) []maps.PolicyRow {
	var out []maps.PolicyRow
	for _, s := range sets {
		for k, r := range s.All() {
			row := maps.PolicyRow{PolicyKey: maps.PolicyKey{
				Policy: k.Policy, Identity: k.Identity, Bits: k.Bits, Protocol: k.Protocol, Port: k.Port,
			}, Rule: r.Rule, Log: r.Flags&policy.FlagLog != 0, SourcePorts: r.Flags&policy.FlagSource != 0}
			switch r.Action {
			case policy.Allow:
				row.Action = maps.PolicyAllow
			case policy.Deny:
				row.Action = maps.PolicyDeny
			}
			out = append(out, row)
		}
	}
	return out
}

func keys(rows []maps.PolicyRow) []maps.PolicyKey {
	out := make([]maps.PolicyKey, len(rows))
	for i, r := range rows {
		out[i] = r.PolicyKey
	}
	return out
}
