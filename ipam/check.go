package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/node"
)

// Problem is one thing that Check found wrong.
type Problem struct {
	Kind   string     `json:"kind"` // leaked, unrecorded, double, stray, lost, miscounted
	Addr   netip.Addr `json:"address,omitzero"`
	Holder string     `json:"holder,omitempty"` // network/container/interface
	Detail string     `json:"detail"`
}

// Report is what Check found.
type Report struct {
	Blocks    int       `json:"blocks"`
	Addresses int       `json:"addresses"` // held
	Problems  []Problem `json:"problems"`
}

// Check compares blocks, addresses and endpoints with one another. alive tells whether an attachment without an
// endpoint record is known to live; nil: none is. Attachments that a foreign main plugin made have no endpoint
// record; they are told by their endpoint's absence only.
func Check(tx *node.Tx, alive func(node.Key) bool) (Report, error) {
	blocks, err := tx.Blocks()
	if err != nil {
		return Report{}, err
	}
	report := Report{Blocks: len(blocks), Problems: []Problem{}}
	add := func(kind string, a netip.Addr, k node.Key, format string, args ...any) {
		holder := ""
		if k != (node.Key{}) {
			holder = k.String()
		}
		report.Problems = append(report.Problems, Problem{kind, a, holder, fmt.Sprintf(format, args...)})
	}
	used := make(map[netip.Prefix]int)
	held := make(map[netip.Addr]node.Key)
	err = tx.Holdings(func(k node.Key, all []node.Holding) error {
		for _, h := range all {
			report.Addresses++
			used[h.Block]++
			if other, ok := held[h.Addr]; ok {
				add("double", h.Addr, k, "also held by %s", other)
			}
			held[h.Addr] = k
			if !h.Block.Contains(h.Addr) || !slices.ContainsFunc(blocks, func(b node.Block) bool { return b.CIDR == h.Block }) {
				add("stray", h.Addr, k, "in no block of this node")
			}
			owner, err := tx.Owner(h.Addr)
			switch {
			case errors.Is(err, node.ErrNotFound):
				add("double", h.Addr, k, "the address does not know that it is held, and may be given out again")
			case err != nil:
				return err
			case owner != k:
				add("double", h.Addr, k, "the address says that it is held by %s", owner)
			}
		}
		if _, err := tx.Endpoint(k); k.Network != HostNetwork && errors.Is(err, node.ErrNotFound) && (alive == nil || !alive(k)) {
			for _, h := range all {
				add("leaked", h.Addr, k, "no endpoint of that name is recorded")
			}
		} else if err != nil && !errors.Is(err, node.ErrNotFound) {
			return err
		}
		return nil
	})
	if err != nil {
		return Report{}, err
	}
	err = tx.Owners(func(a netip.Addr, k node.Key) error {
		if holder, ok := held[a]; !ok || holder != k {
			add("double", a, k, "the holder does not know of it")
		}
		return nil
	})
	if err != nil {
		return Report{}, err
	}
	err = tx.Endpoints(func(e node.Endpoint) error {
		if e.IPAM != Name && e.IPAM != Docker {
			return nil
		}
		for _, a := range e.Addrs {
			if held[a] != e.Key {
				add("unrecorded", a, e.Key, "its endpoint uses the address without holding it")
			}
		}
		return nil
	})
	if err != nil {
		return Report{}, err
	}
	waits := make(map[netip.Addr]bool)
	err = tx.Freed(func(a netip.Addr) error {
		if k, ok := held[a]; ok {
			add("double", a, k, "it waits to be given out while it is held")
		}
		if waits[a] {
			add("double", a, node.Key{}, "it waits twice to be given out")
		}
		if !slices.ContainsFunc(blocks, func(b node.Block) bool { return b.CIDR.Contains(a) }) {
			add("stray", a, node.Key{}, "it waits to be given out, in no block of this node")
		}
		waits[a] = true
		return nil
	})
	for i, b := range blocks {
		if b.Used != used[b.CIDR] {
			add("miscounted", netip.Addr{}, node.Key{}, "block %s says that %d of its addresses are held; %d are", b.CIDR, b.Used, used[b.CIDR])
		}
		if !b.Pool.Contains(b.CIDR.Addr()) || b.Pool.Bits() > b.CIDR.Bits() {
			add("stray", netip.Addr{}, node.Key{}, "block %s is not in its pool %s", b.CIDR, b.Pool)
		}
		if i > 0 && b.CIDR.Overlaps(blocks[i-1].CIDR) {
			add("double", netip.Addr{}, node.Key{}, "block %s overlaps %s", b.CIDR, blocks[i-1].CIDR)
		}
		for n := range b.Next {
			if _, ok := held[b.At(n)]; !ok && !waits[b.At(n)] {
				add("lost", b.At(n), node.Key{}, "nobody holds it and it is not given out again")
			}
		}
	}
	return report, err
}

// Name is what an endpoint's record calls this IPAM.
const Name = "caracal"

// Docker is what the record of a Docker endpoint calls it: the endpoint holds its addresses, and they stay held when it goes,
// until Docker releases them itself.
const Docker = "docker"
