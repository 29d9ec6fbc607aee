package policy

import (
	"iter"
	"math"
	"net/netip"
	"slices"
)

// Key is that of a row of caracal_policy. Fields are in host order; of Port only the bits within Bits may be set.
type Key struct {
	Bits     uint8 // of the prefix, which begins with Policy and ends with Port: 64, 80, or 81 to 96
	Policy   uint32
	Identity uint32
	Protocol uint8  // with Bits of 80 and more
	Port     uint16 // destination's; of ICMP type<<8|code; in a table of source ports the source's
}

// Lengths of a key: policy and identity; with protocol and pad. A port adds up to 16.
const (
	keyBits      = 64
	protocolBits = 16
)

// Row is a verdict.
type Row struct {
	Action Action // Allow or Deny; 0 with FlagSource, and of Lookup: no rows, which denies
	Flags  uint8
	Rule   uint32 // id, see Tables.Rules; 0: no rule; with FlagSource: the Policy of the rows that hold the verdict by source port
}

// Flags of a row.
const (
	FlagLog    uint8 = 1 << iota // a Log rule matched before
	FlagSource                   // the verdict is in the row of {Row.Rule, SourceIdentity, protocol, source port}
)

// SourceIdentity stands in the place of an identity in tables of source ports.
const SourceIdentity uint32 = math.MaxUint32

// PodPolicies are a local endpoint's policy ids; 0: none applies, and all is allowed.
type PodPolicies struct{ Ingress, Egress uint32 }

// RuleInfo is what a rule id stands for.
type RuleInfo struct {
	RuleRef
	Direction Direction
	Rule      *Rule // nil: the end of a list
}

// Tables are what the kernel looks up. Those of a Compiler are its own: read them only, and only until its next Update.
type Tables struct {
	Peers map[netip.Prefix]uint32 // identity, of addresses whose longest prefix it is; 0 too, inside of what has another
	Pods  map[string]PodPolicies  // by endpoint's id: the local ones
	Rules map[uint32]RuleInfo     // of all policies in force here

	policies map[uint32]*table
	rows     int
	lengths  [129]int // number of Peers by their length as IPv6
}

// table is the rows of one policy id, or of one table of source ports.
type table struct {
	number uint32
	blocks map[uint32]*block // by identity
	fresh  bool              // since Accept
	was    map[uint32]*block // since Accept: what changed, and was this; nil: nothing
}

func newTables() *Tables {
	return &Tables{Peers: make(map[netip.Prefix]uint32), Pods: make(map[string]PodPolicies), Rules: make(map[uint32]RuleInfo), policies: make(map[uint32]*table)}
}

// TablesOf are tables with these peers and rows, as they were read from the maps, and no pods.
func TablesOf(peers map[netip.Prefix]uint32, rows iter.Seq2[Key, Row]) *Tables {
	t := newTables()
	for p, identity := range peers {
		t.setPeer(p, identity)
	}
	for k, r := range rows {
		of := t.policies[k.Policy]
		if of == nil {
			of = &table{number: k.Policy, blocks: make(map[uint32]*block)}
			t.policies[k.Policy] = of
		}
		b := of.blocks[k.Identity]
		if b == nil {
			b = &block{}
			of.blocks[k.Identity] = b
		}
		b.rows = append(b.rows, blockRow{k.Protocol, k.Bits, k.Port, r})
		t.rows++
	}
	return t
}

// Size is the numbers of entries.
type Size struct{ Peers, Rows, Pods, Policies int }

// Size is what the maps must have room for; while a Delta is carried out also for what it deletes.
func (t *Tables) Size() Size { return Size{len(t.Peers), t.rows, len(t.Pods), len(t.policies)} }

// Rows are all rows, in no order.
func (t *Tables) Rows() iter.Seq2[Key, Row] {
	return func(yield func(Key, Row) bool) {
		for _, table := range t.policies {
			for identity, b := range table.blocks {
				for k, r := range (RowSet{table.number, identity, b.rows}).All() {
					if !yield(k, r) {
						return
					}
				}
			}
		}
	}
}

// Identity is that of an address: of the longest prefix that contains it, 0 without.
func (t *Tables) Identity(a netip.Addr) uint32 {
	id, _ := t.covering(netip.PrefixFrom(a, a.BitLen()), 128)
	return id
}

// Lookup is the verdict of a policy id on a packet to or from a remote address, found as the kernel finds it: by the longest
// prefix, first for the address's identity, then for anybody's.
func (t *Tables) Lookup(policy uint32, remote netip.Addr, p Packet) Row {
	if policy == 0 {
		return Row{Action: Allow}
	}
	port := p.TargetPort
	switch {
	case hasTypes(p.Protocol):
		port = uint16(p.ICMPType)<<8 | uint16(p.ICMPCode)
	case !hasPorts(p.Protocol):
		port = 0
	}
	row, found := t.row(policy, t.Identity(remote), p.Protocol, port)
	if !found {
		row, _ = t.row(policy, 0, p.Protocol, port)
	}
	if row.Flags&FlagSource != 0 {
		row, _ = t.row(row.Rule, SourceIdentity, p.Protocol, p.SourcePort)
	}
	return row
}

func (t *Tables) row(policy, identity uint32, protocol uint8, port uint16) (best Row, found bool) {
	table := t.policies[policy]
	if table == nil || table.blocks[identity] == nil {
		return Row{}, false
	}
	longest := -1
	for _, r := range table.blocks[identity].rows {
		n := int(r.bits) - keyBits
		matches := n == 0 || r.protocol == protocol && (n == protocolBits || (r.port^port)>>(16+protocolBits-n) == 0)
		if matches && n > longest {
			best, longest = r.Row, n
		}
	}
	return best, longest >= 0
}

// covering is the identity of the longest prefix in Peers that contains p and is no longer than bits, as IPv6.
func (t *Tables) covering(p netip.Prefix, bits int) (identity uint32, found bool) {
	k := keyOf(p)
	for n := min(bits, int(k.bits)); n >= 0; n-- {
		if t.lengths[n] == 0 {
			continue
		}
		if id, found := t.Peers[k.cut(uint8(n)).prefix()]; found {
			return id, true
		}
	}
	return 0, false
}

func (t *Tables) setPeer(p netip.Prefix, identity uint32) {
	if _, had := t.Peers[p]; !had {
		t.lengths[keyOf(p).bits]++
	}
	t.Peers[p] = identity
}

func (t *Tables) deletePeer(p netip.Prefix) {
	if _, had := t.Peers[p]; had {
		t.lengths[keyOf(p).bits]--
		delete(t.Peers, p)
	}
}

// RowSet is rows of one policy id and identity.
type RowSet struct {
	Policy, Identity uint32
	rows             []blockRow
}

// Len is the number of rows.
func (s RowSet) Len() int { return len(s.rows) }

// All are the rows, the catch-all first.
func (s RowSet) All() iter.Seq2[Key, Row] {
	return func(yield func(Key, Row) bool) {
		for _, r := range s.rows {
			if !yield(Key{r.bits, s.Policy, s.Identity, r.protocol, r.port}, r.Row) {
				return
			}
		}
	}
}

// PeerChange is a prefix whose identity changes: what the old tables said of it, and what the new say, by an entry of its
// own or by that of a prefix around it.
type PeerChange struct {
	Prefix        netip.Prefix
	Before, After uint32
}

// Delta is what makes old tables new ones. Keys of rows that are put are new ones, for ids mean the same while they are: rows can be put
// before the change and deleted after it.
type Delta struct {
	PutPeers, DeletePeers []PeerChange
	PutRows, DeleteRows   []RowSet
	PutPods               map[string]PodPolicies
	DeletePods            []string
}

// Empty tells that nothing changes.
func (d *Delta) Empty() bool {
	return len(d.PutPeers)+len(d.DeletePeers)+len(d.PutRows)+len(d.DeleteRows)+len(d.PutPods)+len(d.DeletePods) == 0
}

// Rows are the numbers of rows that are put and deleted.
func (d *Delta) Rows() (put, deleted int) {
	for _, s := range d.PutRows {
		put += s.Len()
	}
	for _, s := range d.DeleteRows {
		deleted += s.Len()
	}
	return put, deleted
}

// addRows notes how the rows of a policy id and an identity change.
func (d *Delta) addRows(policy, identity uint32, old, new *block) {
	var before, after []blockRow
	if old != nil {
		before = old.rows
	}
	if new != nil {
		after = new.rows
	}
	if old != nil && new != nil { // of other compilers; one compiler's are equal
		if slices.Equal(before, after) {
			return
		}
		was := make(map[blockRow]Row, len(before))
		for _, r := range before {
			was[blockRow{r.protocol, r.bits, r.port, Row{}}] = r.Row
		}
		after = slices.DeleteFunc(slices.Clone(after), func(r blockRow) bool {
			k := blockRow{r.protocol, r.bits, r.port, Row{}}
			same, had := was[k]
			delete(was, k)
			return had && same == r.Row
		})
		before = slices.DeleteFunc(slices.Clone(before), func(r blockRow) bool {
			_, gone := was[blockRow{r.protocol, r.bits, r.port, Row{}}]
			return !gone
		})
	}
	if len(after) > 0 {
		d.PutRows = append(d.PutRows, RowSet{policy, identity, after})
	}
	if len(before) > 0 {
		d.DeleteRows = append(d.DeleteRows, RowSet{policy, identity, before})
	}
}

// Diff is what makes old tables new ones, whoever compiled them; old may be nil. If their ids are not of one line (see Numbers), a key may
// be put with another row than it had.
func Diff(old, new *Tables) *Delta {
	if old == nil {
		old = newTables()
	}
	d := &Delta{PutPods: make(map[string]PodPolicies)}
	for p, after := range new.Peers {
		before, had := old.Peers[p]
		if !had {
			before, _ = old.covering(p, 128)
		}
		if !had || before != after {
			d.PutPeers = append(d.PutPeers, PeerChange{p, before, after})
		}
	}
	for p, before := range old.Peers {
		if _, has := new.Peers[p]; !has {
			after, _ := new.covering(p, 128)
			d.DeletePeers = append(d.DeletePeers, PeerChange{p, before, after})
		}
	}
	none := &table{}
	for number, t := range new.policies {
		was := old.policies[number]
		if was == nil {
			was = none
		}
		for identity, b := range t.blocks {
			d.addRows(number, identity, was.blocks[identity], b)
		}
	}
	for number, t := range old.policies {
		is := new.policies[number]
		if is == nil {
			is = none
		}
		for identity, b := range t.blocks {
			if is.blocks[identity] == nil {
				d.addRows(number, identity, b, nil)
			}
		}
	}
	for id, is := range new.Pods {
		if was, had := old.Pods[id]; !had || was != is {
			d.PutPods[id] = is
		}
	}
	for id := range old.Pods {
		if _, has := new.Pods[id]; !has {
			d.DeletePods = append(d.DeletePods, id)
		}
	}
	d.sort()
	return d
}

func (d *Delta) sort() {
	byPrefix := func(a, b PeerChange) int { return comparePrefixes(a.Prefix, b.Prefix) }
	slices.SortFunc(d.PutPeers, byPrefix)
	slices.SortFunc(d.DeletePeers, byPrefix)
	byIDs := func(a, b RowSet) int {
		return slices.Compare([]uint32{a.Policy, a.Identity}, []uint32{b.Policy, b.Identity})
	}
	slices.SortFunc(d.PutRows, byIDs)
	slices.SortFunc(d.DeleteRows, byIDs)
	slices.Sort(d.DeletePods)
}
