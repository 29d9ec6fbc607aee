package maps

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// Peer is an entry of caracal_peers: the identity of a prefix's addresses, 0 for anyone else.
type Peer struct {
	Prefix   netip.Prefix `json:"prefix"`
	Identity uint32       `json:"identity"` // in the current epoch
	Next     uint32       `json:"next"`     // in the next; the same but while a change is staged
}

// StagePeers writes each prefix's Next, what it is from the next epoch on. In the current one nothing changes: a new prefix
// has there what the longest one that covers it gives. Who raises the epoch settles them afterwards.
func (m *Maps) StagePeers(peers []Peer) error {
	return m.putPeers(len(peers), func(i int, old bpf.DataplanePeer, current uint32) (netip.Prefix, bpf.DataplanePeer) {
		old.Identity[current^1] = peers[i].Next
		return peers[i].Prefix, old
	})
}

// SettlePeers makes prefixes that have entries, in the epoch after this one, what they are now. It is for when no program
// run holds the previous epoch any more.
func (m *Maps) SettlePeers(prefixes []netip.Prefix) error {
	return m.putPeers(len(prefixes), func(i int, old bpf.DataplanePeer, current uint32) (netip.Prefix, bpf.DataplanePeer) {
		old.Identity[current^1] = old.Identity[current]
		return prefixes[i], old
	})
}

// PutPeers writes each prefix's Identity, in every epoch. It is for addresses that nobody has yet.
func (m *Maps) PutPeers(peers []Peer) error {
	return m.putPeers(len(peers), func(i int, _ bpf.DataplanePeer, _ uint32) (netip.Prefix, bpf.DataplanePeer) {
		return peers[i].Prefix, bpf.DataplanePeer{Identity: [2]uint32{peers[i].Identity, peers[i].Identity}}
	})
}

// putPeers writes n entries. change is given what the longest prefix that covers all of the i-th one has, itself too, and
// the index of the slot in force.
func (m *Maps) putPeers(n int, change func(i int, old bpf.DataplanePeer, current uint32) (netip.Prefix, bpf.DataplanePeer)) error {
	if n == 0 {
		return nil
	}
	state, err := m.State()
	if err != nil {
		return err
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPeers)
	if err != nil {
		return err
	}
	defer pinned.Close()
	keys, values := make([]bpf.DataplanePrefix, n), make([]bpf.DataplanePeer, n)
	// All are read before any is written: entries of one change do not cover each other in the current epoch.
	for i := range n {
		p, _ := change(i, bpf.DataplanePeer{}, state.Epoch&1)
		keys[i] = prefixKey(p)
		var old bpf.DataplanePeer
		if err := pinned.Lookup(&keys[i], &old); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("read peer %s: %w", p, err)
		}
		_, values[i] = change(i, old, state.Epoch&1)
	}
	if _, err := pinned.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("write %d peers: %w", n, full(err))
	}
	return nil
}

// TrimPeers removes, of these prefixes, those whose identities are what the prefixes around them give anyway.
func (m *Maps) TrimPeers(prefixes []netip.Prefix) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPeers)
	if err != nil {
		return err
	}
	defer pinned.Close()
	longest := slices.SortedFunc(slices.Values(prefixes), func(a, b netip.Prefix) int { return cmp.Compare(b.Bits(), a.Bits()) })
	for _, p := range longest {
		key := prefixKey(p)
		var own, around bpf.DataplanePeer
		if err := pinned.Lookup(&key, &own); err != nil {
			if errors.Is(err, ebpf.ErrKeyNotExist) {
				continue
			}
			return fmt.Errorf("read peer %s: %w", p, err)
		}
		if key.Prefixlen > 0 {
			wider := key
			wider.Prefixlen--
			if err := pinned.Lookup(&wider, &around); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("read peers around %s: %w", p, err)
			}
		}
		if own != around {
			continue
		}
		if err := remove(pinned, &key); err != nil {
			return fmt.Errorf("remove peer %s: %w", p, err)
		}
	}
	return nil
}

// RemovePeers removes the entries of exactly these prefixes, in both epochs. Missing ones are not an error.
func (m *Maps) RemovePeers(prefixes []netip.Prefix) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPeers)
	if err != nil {
		return err
	}
	defer pinned.Close()
	keys := make([]bpf.DataplanePrefix, len(prefixes))
	for i, p := range prefixes {
		keys[i] = prefixKey(p)
	}
	if err := removeAll(pinned, keys); err != nil {
		return fmt.Errorf("remove peers: %w", err)
	}
	return nil
}

// Peer finds the longest prefix that covers a, and returns its identities as those of a. None there is the zero identity.
func (m *Maps) Peer(a netip.Addr) (Peer, error) {
	state, err := m.State()
	if err != nil {
		return Peer{}, err
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPeers)
	if err != nil {
		return Peer{}, err
	}
	defer pinned.Close()
	p := netip.PrefixFrom(a, a.BitLen())
	var value bpf.DataplanePeer
	if err := pinned.Lookup(prefixKey(p), &value); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return Peer{}, fmt.Errorf("read peer %s: %w", a, err)
	}
	return decodePeer(p, &value, state.Epoch), nil
}

// Peers lists all entries, IPv4 first, by prefix.
func (m *Maps) Peers() ([]Peer, error) {
	state, err := m.State()
	if err != nil {
		return nil, err
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalPeers)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	var peers []Peer
	err = each(pinned, func(k *bpf.DataplanePrefix, v *bpf.DataplanePeer) {
		peers = append(peers, decodePeer(prefix(*k), v, state.Epoch))
	})
	if err != nil {
		return nil, fmt.Errorf("list peers: %w", err)
	}
	slices.SortFunc(peers, func(a, b Peer) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	return peers, nil
}

func decodePeer(p netip.Prefix, v *bpf.DataplanePeer, epoch uint32) Peer {
	return Peer{Prefix: p, Identity: v.Identity[epoch&1], Next: v.Identity[epoch&1^1]}
}
