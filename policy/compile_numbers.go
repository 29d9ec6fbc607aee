package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"math"
)

// hash names content: things of the same hash are the same in every version and in every process.
type hash [16]byte

// hashOf tells the boundaries of its parts: no two lists of parts have the same hash.
func hashOf(parts ...string) hash {
	h := sha256.New()
	for _, p := range parts {
		n := uint64(len(p))
		h.Write([]byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24), byte(n >> 32)})
		h.Write([]byte(p))
	}
	return hash(h.Sum(nil)[:16])
}

// Numbers are the ids that a compiler gave out, for one that comes after it: with them it gives the same ids to what has
// stayed the same, so that little must be written. With no more than each Next, beyond all ids that the maps may still hold, it gives
// new ones to everything.
type Numbers struct {
	Policies   Numbering `json:"policies"`   // policy ids, and tables of source ports
	Identities Numbering `json:"identities"` // of addresses
	Rules      Numbering `json:"rules"`
}

// Numbering are the ids of one kind. The zero value begins with 1.
type Numbering struct {
	Next uint32            `json:"next"`          // no id from here on has been given out
	IDs  map[string]uint32 `json:"ids,omitempty"` // by what they stand for: a hash
}

// reserved is the first of the ids that mean something else in the maps: maps.PolicyUnknown, maps.IdentitySourcePorts.
const reserved = math.MaxUint32 - 1

// numbering gives numbers to contents, and to none a number that another had lately: one whose content is gone comes
// again when all the others have been.
type numbering struct {
	next uint32
	ids  map[hash]*number
	used map[uint32]struct{}
	kept map[hash]uint32 // what an earlier compiler gave out and nobody has asked for yet
}

type number struct {
	id   uint32
	refs int
}

func newNumbering(from Numbering) *numbering {
	n := &numbering{next: max(from.Next, 1), ids: make(map[hash]*number), used: make(map[uint32]struct{}), kept: make(map[hash]uint32)}
	for text, id := range from.IDs {
		if b, err := hex.DecodeString(text); err == nil && len(b) == len(hash{}) && id > 0 && id < reserved {
			n.kept[hash(b)] = id
			n.used[id] = struct{}{}
		}
	}
	return n
}

// take is the number of h; each take is answered by a release.
func (n *numbering) take(h hash) uint32 {
	if have := n.ids[h]; have != nil {
		have.refs++
		return have.id
	}
	id, known := n.kept[h]
	if known {
		delete(n.kept, h)
	} else {
		for id = n.next; ; id++ {
			if id >= reserved {
				id = 0
				continue
			}
			if _, used := n.used[id]; !used && id != 0 {
				break
			}
		}
		n.next = id + 1
		n.used[id] = struct{}{}
	}
	n.ids[h] = &number{id, 1}
	return id
}

func (n *numbering) release(h hash) {
	have := n.ids[h]
	if have.refs--; have.refs == 0 {
		delete(n.ids, h)
		delete(n.used, have.id)
	}
}

// settle forgets what of an earlier compiler's nobody asked for.
func (n *numbering) settle() {
	for _, id := range n.kept {
		delete(n.used, id)
	}
	clear(n.kept)
}

func (n *numbering) export() Numbering {
	out := Numbering{Next: n.next, IDs: make(map[string]uint32, len(n.ids)+len(n.kept))}
	for h, have := range n.ids {
		out.IDs[hex.EncodeToString(h[:])] = have.id
	}
	for h, id := range n.kept {
		out.IDs[hex.EncodeToString(h[:])] = id
	}
	return out
}
