package ipam

import (
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// In a cluster addresses come out of the blocks that the agent has claimed, and out of nothing else.
func TestClusterPools(t *testing.T) {
	r := newRig(t)
	cluster := []api.IPPool{pool("10.1.0.0/24", 30), pool("2001:db8::/120", 126)}
	update := func(fn func(*node.Tx) error) {
		t.Helper()
		if err := r.db.Update(fn); err != nil {
			t.Fatal(err)
		}
	}
	r.expect(Config{Cluster: true}, 0, Request{V4: true}, "", ErrNoCluster)
	update(func(tx *node.Tx) error {
		if err := SetClusterPools(tx, cluster); err != nil {
			return err
		}
		return tx.PutBlock(node.Block{CIDR: netip.MustParsePrefix("10.1.0.8/30"), Pool: cluster[0].CIDR})
	})
	for i, want := range []string{"10.1.0.8", "10.1.0.9", "10.1.0.10", "10.1.0.11"} {
		r.expect(Config{}, i, Request{V4: true}, want, nil)
	}
	r.expect(Config{}, 4, Request{V4: true}, "", ErrExhausted)
	r.expect(Config{}, 5, Request{V6: true}, "", ErrExhausted)
	r.expect(Config{}, 6, Request{Want: []netip.Addr{netip.MustParseAddr("10.1.0.12")}}, "", ErrNotClaimed)
	r.expect(Config{Pools: []api.IPPool{pool("10.9.0.0/24", 30)}}, 7, Request{V4: true}, "", ErrPool)
	update(func(tx *node.Tx) error { return SetClusterPools(tx, nil) })
	if _, err := r.assign(Config{Pools: cluster[:1]}, Request{Key: key(8), V4: true}); err != nil {
		t.Errorf("out of the cluster again: %v", err)
	}
}

// What somebody asks for by a pool's name or CIDR comes out of that one; of the other family out of any. A closed block gives out
// nothing, and of a block as large as a cluster gives its nodes any address may be asked for.
func TestOnly(t *testing.T) {
	r := newRig(t)
	cluster := []api.IPPool{pool("10.1.0.0/24", 28), pool("10.2.0.0/24", 28), pool("2001:db8::/48", 64)}
	update := func(fn func(*node.Tx) error) {
		t.Helper()
		if err := r.db.Update(fn); err != nil {
			t.Fatal(err)
		}
	}
	block := func(p api.IPPool, cidr string) {
		t.Helper()
		update(func(tx *node.Tx) error {
			return tx.PutBlock(node.Block{CIDR: netip.MustParsePrefix(cidr), Pool: p.CIDR})
		})
	}
	update(func(tx *node.Tx) error {
		if err := SetClusterPools(tx, cluster); err != nil {
			return err
		}
		return SetPoolNames(tx, Names{"one": cluster[0].CIDR, "two": cluster[1].CIDR, "six": cluster[2].CIDR})
	})
	block(cluster[0], "10.1.0.0/28")
	block(cluster[1], "10.2.0.16/28")
	block(cluster[2], "2001:db8:0:7::/64")
	only := func(v4, v6 []string) Config { return Config{Cluster: true, Only: Only{v4, v6}} }
	r.expect(only([]string{"two"}, nil), 0, Request{V4: true, V6: true}, "10.2.0.16 2001:db8:0:7::", nil)
	r.expect(only([]string{"10.2.0.0/24"}, []string{"six"}), 1, Request{V4: true, V6: true}, "10.2.0.17 2001:db8:0:7::1", nil)
	r.expect(only(nil, nil), 2, Request{V4: true}, "10.1.0.0", nil)
	r.expect(only([]string{"six"}, nil), 3, Request{V4: true}, "", ErrPool)
	r.expect(only([]string{"10.3.0.0/24"}, nil), 4, Request{V4: true}, "", ErrPool)
	r.expect(only([]string{"two"}, nil), 5, Request{Want: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}, "", ErrOutsidePool)
	far := netip.MustParseAddr("2001:db8:0:7:ffff::1")
	r.expect(only(nil, nil), 6, Request{Want: []netip.Addr{far}}, far.String(), nil)
	update(func(tx *node.Tx) error {
		_, err := Release(tx, key(6))
		return err
	})
	update(func(tx *node.Tx) error {
		b, err := tx.Block(netip.MustParsePrefix("10.1.0.0/28"))
		if err != nil {
			return err
		}
		b.Closed = true
		return tx.PutBlock(b)
	})
	r.expect(only([]string{"one"}, nil), 7, Request{V4: true}, "", ErrExhausted)
	r.expect(only(nil, nil), 8, Request{V4: true}, "10.2.0.18", nil)
	r.expect(only(nil, nil), 9, Request{Want: []netip.Addr{netip.MustParseAddr("10.1.0.9")}}, "", ErrNotClaimed)
	update(func(tx *node.Tx) error {
		if err := SetNamespacePools(tx, map[string]Only{"shop": {V4: []string{"two"}}, "gone": {V6: []string{"six"}}}); err != nil {
			return err
		}
		return SetNamespacePools(tx, map[string]Only{"shop": {V4: []string{"one"}}})
	})
	update(func(tx *node.Tx) error {
		if all, err := AllNamespacePools(tx); err != nil || len(all) != 1 {
			t.Errorf("%v, %v", all, err)
		}
		shop, err := NamespacePools(tx, "shop")
		if got := (Only{V6: []string{"six"}}).Or(shop); err != nil || len(got.V4) != 1 || got.V4[0] != "one" || got.V6[0] != "six" {
			t.Errorf("%v, %v", got, err)
		}
		return nil
	})
}
