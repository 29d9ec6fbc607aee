package bgp

import (
	"cmp"
	"net/netip"
	"slices"
)

// Sink receives what the speaker learns, one call at a time, in order. It must not call the speaker.
type Sink interface {
	// Learned says that the best path to a prefix is now this one. It is told again only when it changes.
	Learned(r Route)
	// Withdrawn says that no path is left. A peer that restarts keeps its paths for its restart time.
	Withdrawn(p netip.Prefix)
	// Alarm is something that an operator must see.
	Alarm(a Alarm)
}

// Route is the best path to a prefix, from a peer.
type Route struct {
	Prefix      netip.Prefix
	NextHop     netip.Addr
	From        netip.Addr // the peer
	ASPath      []uint32   // nearest first; empty for a prefix of our own AS
	Communities []string   // "65001:100", large ones "65001:1:2"
	Stale       bool       // the peer is gone or restarting and has not confirmed it; a Sink is not told when that changes
}

// same tells whether r and o are the same to a Sink.
func (r *Route) same(o *Route) bool {
	return r.NextHop == o.NextHop && r.From == o.From && slices.Equal(r.ASPath, o.ASPath) && slices.Equal(r.Communities, o.Communities)
}

// path is a peer's path to a prefix, accepted by the import filters.
type path struct {
	Route
	localPref, med uint32
	length         int // of the AS path, a set counting once
	origin         uint32
	internal       bool
	id             netip.Addr // the peer's router ID
}

// compare is RFC 4271's decision process without the cost of reaching next hops, which all are neighbours to us. It is
// negative when p is better than o.
func (p *path) compare(o *path) int {
	if c := cmp.Or(cmp.Compare(o.localPref, p.localPref), cmp.Compare(p.length, o.length), cmp.Compare(p.origin, o.origin)); c != 0 {
		return c
	}
	if len(p.ASPath) > 0 && len(o.ASPath) > 0 && p.ASPath[0] == o.ASPath[0] || len(p.ASPath) == 0 && len(o.ASPath) == 0 {
		if c := cmp.Compare(p.med, o.med); c != 0 {
			return c
		}
	}
	if p.internal != o.internal {
		if o.internal {
			return -1
		}
		return 1
	}
	return cmp.Or(p.id.Compare(o.id), p.From.Compare(o.From))
}

// destination is what is known of a prefix.
type destination struct {
	paths []*path // one for each peer, almost always one
	told  *Route  // what the Sink knows; nil: nothing
}

func (d *destination) from(peer netip.Addr) int {
	return slices.IndexFunc(d.paths, func(p *path) bool { return p.From == peer })
}

// blocks are prefixes that can be asked what they contain.
type blocks struct {
	all     map[netip.Prefix]bool
	lengths []int // of masks, ascending
}

func newBlocks(all map[netip.Prefix]bool) blocks {
	b := blocks{all: all}
	for p := range all {
		if !slices.Contains(b.lengths, p.Bits()) {
			b.lengths = append(b.lengths, p.Bits())
		}
	}
	slices.Sort(b.lengths)
	return b
}

// around returns a block that is p or contains it.
func (b blocks) around(p netip.Prefix) (netip.Prefix, bool) {
	for _, n := range b.lengths {
		if n > p.Bits() {
			break
		}
		if block, err := p.Addr().Prefix(n); err == nil && b.all[block] {
			return block, true
		}
	}
	return netip.Prefix{}, false
}

// Routes lists the best paths now, our own prefixes excluded, sorted by prefix. They are what the Sink was told, but for
// Stale.
func (s *Speaker) Routes() []Route {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Route
	for _, d := range s.routes {
		if d.told == nil {
			continue
		}
		r := *d.told
		r.ASPath, r.Communities = slices.Clone(r.ASPath), slices.Clone(r.Communities)
		if i := d.from(r.From); i >= 0 {
			r.Stale = d.paths[i].Stale
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Route) int { return comparePrefixes(a.Prefix, b.Prefix) })
	return all
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// settle tells the Sink what is best now for a prefix, if that is something else than what it knows.
func (s *Speaker) settle(prefix netip.Prefix) {
	d := s.routes[prefix]
	if d == nil {
		return
	}
	var best *path
	if _, ours := s.own.around(prefix); !ours {
		for _, p := range d.paths {
			if s.peers[p.From].takes(prefix) && (best == nil || p.compare(best) < 0) {
				best = p
			}
		}
	}
	before := d.told
	s.mu.Lock()
	if best == nil {
		d.told = nil
	} else if before == nil || !best.same(before) {
		r := best.Route
		r.Stale = false
		d.told = &r
	}
	if len(d.paths) == 0 {
		delete(s.routes, prefix)
	}
	s.mu.Unlock()
	switch {
	case d.told == before:
	case d.told == nil:
		s.sink.Withdrawn(prefix)
	default:
		s.sink.Learned(*d.told)
	}
}

// heard takes in a peer's path to a prefix, or that it has none any more.
func (s *Speaker) heard(n *peer, p *path, withdrawn bool) {
	s.mu.Lock()
	d := s.routes[p.Prefix]
	if d == nil {
		d = &destination{}
		s.routes[p.Prefix] = d
	}
	i := d.from(n.Address)
	switch {
	case withdrawn && i >= 0:
		d.paths = slices.Delete(d.paths, i, i+1)
	case withdrawn:
	case i >= 0:
		d.paths[i] = p
	default:
		d.paths = append(d.paths, p)
	}
	full := false
	if withdrawn {
		n.release(p.Prefix)
	} else {
		full = !n.take(p.Prefix)
	}
	s.mu.Unlock()
	if full {
		s.alarm(Alarm{Kind: Limit, Prefix: p.Prefix, Peer: n.Address,
			Text: formatf("%s announces more than %d prefixes; those that came first are kept", n.Address, n.MaxPrefixes)})
	}
	if block, ours := s.own.around(p.Prefix); ours && !withdrawn {
		s.alarmForeign(n.Address, p.Prefix, block)
	}
	s.settle(p.Prefix)
}

// setOwn makes b our own blocks. What peers have of them is not told to the Sink, and told again when it is not ours any
// more.
func (s *Speaker) setOwn(b blocks) {
	before := s.own
	s.mu.Lock()
	s.own = b
	var touched []netip.Prefix
	for prefix := range s.routes {
		_, was := before.around(prefix)
		if _, is := b.around(prefix); was != is {
			touched = append(touched, prefix)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(touched, comparePrefixes)
	for _, prefix := range touched {
		if block, is := b.around(prefix); is {
			for _, p := range s.routes[prefix].paths {
				s.alarmForeign(p.From, prefix, block)
			}
		}
		s.settle(prefix)
	}
}

// take counts a prefix against the peer's limit. False: it is one too many.
func (n *peer) take(prefix netip.Prefix) bool {
	if n.over[prefix] {
		return false
	}
	if n.taken[prefix] {
		return true
	}
	if n.MaxPrefixes > 0 && len(n.taken) >= n.MaxPrefixes {
		n.over[prefix] = true
		return false
	}
	n.taken[prefix] = true
	return true
}

func (n *peer) release(prefix netip.Prefix) {
	delete(n.taken, prefix)
	delete(n.over, prefix)
}

// takes tells whether prefix counts. Peers that were removed have nothing.
func (n *peer) takes(prefix netip.Prefix) bool { return n != nil && n.taken[prefix] }

// promote takes prefixes above the limit where there is room again. It waits for the next tick, or a peer that goes would
// have each of its prefixes replaced by another that goes too.
func (s *Speaker) promote() {
	for _, n := range s.peers {
		var in []netip.Prefix
		s.mu.Lock()
		for prefix := range n.over {
			if n.MaxPrefixes > 0 && len(n.taken) >= n.MaxPrefixes {
				break
			}
			delete(n.over, prefix)
			n.taken[prefix] = true
			in = append(in, prefix)
		}
		s.mu.Unlock()
		for _, prefix := range in {
			s.settle(prefix)
		}
	}
}

// forget drops all paths of a peer.
func (s *Speaker) forget(peer netip.Addr) {
	s.mu.Lock()
	var touched []netip.Prefix
	for prefix, d := range s.routes {
		if i := d.from(peer); i >= 0 {
			d.paths = slices.Delete(d.paths, i, i+1)
			touched = append(touched, prefix)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(touched, comparePrefixes)
	for _, prefix := range touched {
		s.settle(prefix)
	}
}
