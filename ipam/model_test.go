package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// model is what Assign and Release promise, in sets and lists: a claimed block's addresses are given out in their order,
// then those that were given back in the order of that, then those of the pool's next block.
type model struct {
	cfg    Config
	blocks map[netip.Prefix]bool
	fresh  map[netip.Addr]bool // in a claimed block and not yet given out in turn
	line   []netip.Addr        // given back, or passed over as reserved
	held   map[node.Key][]netip.Addr
}

func newModel(cfg Config) *model {
	return &model{cfg: cfg, blocks: map[netip.Prefix]bool{}, fresh: map[netip.Addr]bool{}, held: map[node.Key][]netip.Addr{}}
}

func (m *model) clone() *model {
	c := *m
	c.blocks, c.fresh, c.line, c.held = maps.Clone(m.blocks), maps.Clone(m.fresh), slices.Clone(m.line), maps.Clone(m.held)
	return &c
}

func (m *model) owner(a netip.Addr) bool {
	for _, held := range m.held {
		if slices.Contains(held, a) {
			return true
		}
	}
	return false
}

func (m *model) reserved(a netip.Addr) bool {
	return slices.ContainsFunc(m.cfg.Reservations, func(r netip.Prefix) bool { return r.Contains(a) })
}

func (m *model) claim(b netip.Prefix) {
	m.blocks[b] = true
	for a := b.Addr(); b.Contains(a); a = a.Next() {
		m.fresh[a] = true
	}
}

// blocksOf are the blocks of a pool, in order.
func blocksOf(p api.IPPool) (all []netip.Prefix) {
	for a := p.CIDR.Addr(); p.CIDR.Contains(a); a = a.Next() {
		if b := netip.PrefixFrom(a, p.BlockSize); b == b.Masked() {
			all = append(all, b)
		}
	}
	return all
}

// first gives out a block's first fresh address.
func (m *model) first(b netip.Prefix) (netip.Addr, bool) {
	var passed []netip.Addr
	for a := b.Addr(); b.Contains(a); a = a.Next() {
		switch {
		case !m.fresh[a] || m.owner(a) || slices.Contains(m.line, a):
		case m.reserved(a):
			passed = append(passed, a)
		default:
			for done := b.Addr(); done.Compare(a) <= 0; done = done.Next() {
				delete(m.fresh, done)
			}
			m.line = append(m.line, passed...)
			return a, true
		}
	}
	return netip.Addr{}, false
}

// any gives out an address of a family, or none.
func (m *model) any(v6 bool) (netip.Addr, bool) {
	for _, p := range m.cfg.Pools {
		for _, b := range blocksOf(p) {
			if p.CIDR.Addr().Is6() == v6 && m.blocks[b] {
				if a, ok := m.first(b); ok {
					return a, true
				}
			}
		}
	}
	for i, a := range m.line {
		if a.Is6() == v6 && !m.reserved(a) {
			m.line = slices.Delete(m.line, i, i+1)
			return a, true
		}
	}
	for _, p := range m.cfg.Pools {
		for _, b := range blocksOf(p) {
			if p.CIDR.Addr().Is6() == v6 && !m.blocks[b] && !m.wholly(b) {
				m.claim(b)
				return m.first(b)
			}
		}
	}
	return netip.Addr{}, false
}

// wholly tells whether all of a block is reserved.
func (m *model) wholly(b netip.Prefix) bool {
	for a := b.Addr(); b.Contains(a); a = a.Next() {
		if !m.reserved(a) {
			return false
		}
	}
	return true
}

func (m *model) take(a netip.Addr) error {
	if m.reserved(a) {
		return ErrReserved
	}
	if m.owner(a) {
		return ErrTaken
	}
	for _, p := range m.cfg.Pools {
		if p.CIDR.Contains(a) {
			if b := netip.PrefixFrom(a, p.BlockSize).Masked(); !m.blocks[b] {
				m.claim(b)
			}
			m.line = slices.DeleteFunc(m.line, func(x netip.Addr) bool { return x == a })
			return nil
		}
	}
	return ErrOutsidePool
}

func (m *model) assign(r Request) ([]netip.Addr, error) {
	if held := m.held[r.Key]; len(held) > 0 {
		return held, nil
	}
	for _, a := range r.Want {
		if err := m.take(a); err != nil {
			return nil, err
		}
		m.held[r.Key] = append(slices.Clone(m.held[r.Key]), a)
		r.V4, r.V6 = r.V4 && !a.Is4(), r.V6 && !a.Is6()
	}
	for _, v6 := range []bool{false, true} {
		if v6 && r.V6 || !v6 && r.V4 {
			a, ok := m.any(v6)
			if !ok {
				return nil, ErrExhausted
			}
			m.held[r.Key] = append(slices.Clone(m.held[r.Key]), a)
		}
	}
	return m.held[r.Key], nil
}

func (m *model) release(k node.Key) {
	m.line = append(m.line, m.held[k]...)
	delete(m.held, k)
}

func (m *model) reboot() {
	for _, k := range slices.SortedFunc(maps.Keys(m.held), func(a, b node.Key) int { return compareKeys(a.String(), b.String()) }) {
		m.release(k)
	}
}

func compareKeys(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Random attachments, requests, detachments, failures in the middle and reboots do what the model does: the same
// addresses in the same order, none twice, none lost.
func TestModel(t *testing.T) {
	const sequences, steps = 24, 400
	for s := range uint64(sequences) {
		random := rand.New(rand.NewPCG(s, 0))
		cfg := Config{Pools: []api.IPPool{pool("10.1.0.0/27", 29), pool("10.9.0.0/29", 31), pool("2001:db8::/123", 125)}}
		if s%2 == 1 {
			cfg.Reservations = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/31"), netip.MustParsePrefix("10.1.0.8/29"),
				netip.MustParsePrefix("10.9.0.3/32"), netip.MustParsePrefix("2001:db8::4/126")}
		}
		play(t, random, cfg, steps)
		if t.Failed() {
			t.Fatalf("sequence %d", s)
		}
	}
}

// player drives a database and the model side by side.
type player struct {
	*testing.T
	dir  string
	opts node.Options
	db   *node.DB
	m    *model
}

func play(t *testing.T, random *rand.Rand, cfg Config, steps int) {
	t.Helper()
	p := &player{T: t, dir: memory(t), opts: bootFile(t, "boot"), m: newModel(cfg)}
	p.open()
	defer func() { p.db.Close() }()
	for i := range steps {
		k := key(random.IntN(60))
		var want error
		switch n := random.IntN(100); {
		case n < 60:
			want = p.assign(randomRequest(random, k))
		case n < 90:
			p.m.release(k)
			p.update(func(tx *node.Tx) error { return forget(tx, k) }, nil)
		case n < 94: // a process dies, or its transaction fails, after all was said: nothing was
			p.update(func(tx *node.Tx) error {
				_, aerr := record(tx, cfg, randomRequest(random, k))
				return errors.Join(errDied, aerr, forget(tx, key(random.IntN(60))))
			}, errDied)
		case n < 97:
			p.db.Close()
			p.open()
		default:
			p.db.Close()
			if err := os.WriteFile(p.opts.BootIDFile, fmt.Append(nil, "boot", i), 0o600); err != nil {
				t.Fatal(err)
			}
			p.m.reboot()
			p.open()
		}
		if t.Failed() {
			t.Fatalf("step %d", i)
		}
		if want != nil || i%8 == 0 {
			p.compare()
		}
	}
}

var errDied = errors.New("died")

func randomRequest(random *rand.Rand, k node.Key) Request {
	r := Request{Key: k, V4: random.IntN(4) > 0, V6: random.IntN(2) > 0}
	for range max(0, random.IntN(6)-3) {
		a := netip.AddrFrom4([4]byte{10, []byte{1, 9}[random.IntN(2)], 0, byte(random.IntN(34))})
		if random.IntN(3) == 0 {
			a = netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", random.IntN(34)))
		}
		if !slices.Contains(r.Want, a) {
			r.Want = append(r.Want, a)
		}
	}
	return r
}

func (p *player) open() {
	p.Helper()
	db, err := node.Open(context.Background(), p.dir, p.opts)
	if err != nil {
		p.Fatal(err)
	}
	p.db = db
}

func (p *player) update(fn func(*node.Tx) error, want error) {
	p.Helper()
	if err := p.db.Update(fn); !errors.Is(err, want) {
		p.Errorf("%v, want %v", err, want)
	}
}

func (p *player) assign(r Request) error {
	p.Helper()
	after := p.m.clone()
	want, wantErr := after.assign(r)
	if wantErr == nil {
		p.m = after
	}
	var got []netip.Addr
	p.update(func(tx *node.Tx) (err error) {
		if got, err = record(tx, p.m.cfg, r); err != nil || len(got) > 0 {
			return err
		}
		return tx.DeleteEndpoint(r.Key) // neither family was wanted
	}, wantErr)
	byFamily := slices.Clone(want)
	slices.SortStableFunc(byFamily, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	if wantErr == nil && !slices.Equal(got, byFamily) {
		p.Errorf("%+v got %v, want %v", r, got, byFamily)
	}
	return wantErr
}

// compare looks at everything.
func (p *player) compare() {
	p.Helper()
	err := p.db.View(func(tx *node.Tx) error {
		report, err := Check(tx, nil)
		for _, problem := range report.Problems {
			p.Errorf("check: %+v", problem)
		}
		n := 0
		for k, want := range p.m.held {
			n += len(want)
			held, err := tx.Held(k)
			if err != nil || !slices.EqualFunc(held, want, func(h node.Holding, a netip.Addr) bool { return h.Addr == a }) {
				p.Errorf("%s holds %v, %v, want %v", k, held, err, want)
			}
		}
		if report.Addresses != n || report.Blocks != len(p.m.blocks) {
			p.Errorf("%d addresses in %d blocks, want %d in %d", report.Addresses, report.Blocks, n, len(p.m.blocks))
		}
		var line []netip.Addr
		err = errors.Join(err, tx.Freed(func(a netip.Addr) error { line = append(line, a); return nil }))
		if !slices.Equal(line, p.m.line) {
			p.Errorf("in line are %v, want %v", line, p.m.line)
		}
		// STATUS promises what the next ADD keeps.
		for _, v6 := range []bool{false, true} {
			_, ok := p.m.clone().any(v6)
			if err := Status(tx, p.m.cfg, !v6, v6); (err == nil) != ok {
				p.Errorf("status: %v, want %t", err, ok)
			}
		}
		return err
	})
	if err != nil {
		p.Error(err)
	}
}
