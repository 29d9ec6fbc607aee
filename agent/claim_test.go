package agent

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/bolt"
)

// TestClaimAnew: a claim that is taken up again does not fall to a deletion that was asked for before.
func TestClaimAnew(t *testing.T) {
	s, err := bolt.Open(t.TempDir(), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	a := &Agent{Config: Config{Node: "h1", Log: slog.New(slog.DiscardHandler)}, store: s}
	a.cluster = newCluster(a)
	b := Block{netip.MustParsePrefix("10.244.0.0/26"), netip.MustParsePrefix("10.244.0.0/16"), "h1"}
	key := api.BlockKey(b.CIDR)
	var was [2]store.KV
	for i := range was {
		if err := a.claimOne(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		was[i], _ = a.cluster.get(key)
	}
	if err := s.Delete(t.Context(), key, was[0].Revision); !errors.Is(err, store.ErrConflict) {
		t.Errorf("the late deletion: %v", err)
	}
	theirs := b
	theirs.Node = "h2"
	if err := a.claimOne(t.Context(), theirs); !errors.Is(err, store.ErrExists) {
		t.Errorf("another's claim: %v", err)
	}
	// What was released is not the next one's to release.
	if err := a.release(t.Context(), []Claim{{b, was[1].Revision}}); err != nil {
		t.Fatal(err)
	}
	if _, there := a.cluster.get(key); there {
		t.Error("it is still in the picture")
	}
	if err := a.claimOne(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	if err := a.release(t.Context(), []Claim{{b, was[1].Revision}}); !errors.Is(err, store.ErrConflict) {
		t.Errorf("releasing what another node has claimed since: %v", err)
	}
}

// TestSurplus: what is given up never makes the node claim another at once, and what was claimed ahead is not given up.
func TestSurplus(t *testing.T) {
	pool := api.IPPool{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockSize: 26}
	disabled := api.IPPool{CIDR: netip.MustParsePrefix("10.245.0.0/16"), BlockSize: 26, Disabled: true}
	resized := api.IPPool{CIDR: pool.CIDR, BlockSize: 28}
	cidr := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, 0, byte(i * 64)}), 26)
	}
	long := time.Now().Add(-2 * surplusAfter)
	for _, test := range []struct {
		name string
		used []int // addresses, by block; -1: node.db does not have it
		pool api.IPPool
		idle time.Time
		want []int // blocks
	}{
		{"one empty block", []int{0}, pool, long, nil},
		{"claimed ahead when half was used", []int{33, 0}, pool, long, nil},
		{"the first is full but for one", []int{63, 0}, pool, long, nil},
		{"the first is empty again", []int{0, 0}, pool, long, []int{1}},
		{"one pod is left in the first", []int{1, 0}, pool, long, nil},
		{"one pod is left in the second", []int{0, 1}, pool, long, nil},
		{"half used of three", []int{32, 0, 0}, pool, long, []int{2}},
		{"not empty for long", []int{0, 0, 0}, pool, time.Now(), nil},
		{"three empty blocks", []int{0, 0, 0}, pool, long, []int{2, 1}},
		{"half given up before", []int{-1, 0}, pool, time.Now(), []int{0}},
		{"half given up before, and there are few", []int{-1, 40}, pool, time.Now(), []int{0}},
		{"blocks of another size", []int{1, 0}, resized, long, []int{1}},
		{"a disabled pool", []int{0, 1}, disabled, long, []int{0}},
		{"a disabled pool, not for long", []int{0, 1}, disabled, time.Now(), nil},
	} {
		a := &Agent{idle: make(map[netip.Prefix]time.Time)}
		var mine []Claim
		var here local
		for i, used := range test.used {
			mine = append(mine, Claim{Block: Block{cidr(i), test.pool.CIDR, "h1"}})
			if used >= 0 {
				here.blocks = append(here.blocks, node.Block{CIDR: cidr(i), Pool: test.pool.CIDR, Used: used})
			}
			if used == 0 {
				a.idle[cidr(i)] = test.idle
			}
		}
		var got []int
		for _, c := range a.surplus([]api.IPPool{test.pool}, mine, here, func(netip.Prefix) bool { return false }) {
			got = append(got, int(c.CIDR.Addr().As4()[3])/64)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: blocks %v are surplus, want %v", test.name, got, test.want)
		}
		left := slices.DeleteFunc(mine, func(c Claim) bool { return slices.Contains(got, int(c.CIDR.Addr().As4()[3])/64) })
		if free := here.free(left)[test.pool.CIDR]; len(got) > 0 && !slices.Contains(test.used, -1) && test.pool.BlockSize == 26 && !test.pool.Disabled && free < 64 {
			t.Errorf("%s: %d addresses stay free", test.name, free)
		}
	}
}

// TestSurplusHeld: what a node holds is not given up because node.db was lost; but somebody's claim of a block around one that node.db
// has is, whose pods' addresses these are.
func TestSurplusHeld(t *testing.T) {
	pool := api.IPPool{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockSize: 26}
	wide, narrow := Claim{Block: Block{netip.MustParsePrefix("10.244.0.0/25"), pool.CIDR, "h1"}}, netip.MustParsePrefix("10.244.0.64/26")
	for _, test := range []struct {
		name     string
		recorded []node.Block
		held     bool
		want     []Claim
	}{
		{"node.db was lost", nil, true, nil},
		{"nobody has an address of it", nil, false, []Claim{wide}},
		{"the addresses are of another block", []node.Block{{CIDR: narrow, Pool: pool.CIDR, Used: 1}}, true, []Claim{wide}},
	} {
		a := &Agent{idle: make(map[netip.Prefix]time.Time)}
		mine := []Claim{wide}
		for _, b := range test.recorded {
			mine = append(mine, Claim{Block: Block{b.CIDR, b.Pool, "h1"}})
		}
		got := a.surplus([]api.IPPool{pool}, mine, local{blocks: test.recorded}, func(netip.Prefix) bool { return test.held })
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: %v are surplus, want %v", test.name, got, test.want)
		}
	}
}

// TestBlockSizeChanged: no block is claimed that has addresses of another's, whatever its size is.
func TestBlockSizeChanged(t *testing.T) {
	s, err := bolt.Open(t.TempDir(), bolt.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	a := &Agent{Config: Config{Node: "h1", Log: slog.New(slog.DiscardHandler)}, store: s}
	a.cluster = newCluster(a)
	pool := api.IPPool{CIDR: netip.MustParsePrefix("10.244.0.0/27"), BlockSize: 30}
	v := &view{blocks: make(map[netip.Prefix]Claim)}
	for _, b := range []string{"10.244.0.0/29", "10.244.0.10/31", "10.244.0.12/30", "10.244.0.17/32"} {
		v.blocks[netip.MustParsePrefix(b)] = Claim{}
	}
	for _, want := range []string{"10.244.0.20/30", "10.244.0.24/30", "10.244.0.28/30", ""} {
		b, err := a.claimNext(t.Context(), v, pool)
		if want == "" {
			if !errors.Is(err, ipam.ErrExhausted) {
				t.Errorf("claimed %s, %v", b.CIDR, err)
			}
		} else if err != nil || b.CIDR.String() != want {
			t.Errorf("claimed %s, %v; want %s", b.CIDR, err, want)
		}
		v.blocks[b.CIDR] = Claim{Block: b}
	}
}

// TestPooled: what is announced counts within the cluster's pools.
func TestPooled(t *testing.T) {
	c := newCluster(&Agent{})
	pool, err := json.Marshal(api.Resource{Kind: api.Kinds[0], Metadata: api.Metadata{Name: "p"}, Spec: &api.IPPool{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockSize: 26}})
	if err != nil {
		t.Fatal(err)
	}
	c.kvs = map[string]store.KV{"/ippools/p": {Key: "/ippools/p", Value: pool}, "/ippools/bad": {Key: "/ippools/bad", Value: []byte("{")}}
	in, out := netip.MustParseAddr("10.244.3.1"), netip.MustParseAddr("1.2.3.4")
	if got := c.pooled([]netip.Addr{out, in}); !slices.Equal(got, []netip.Addr{in}) {
		t.Errorf("%s", got)
	}
}
