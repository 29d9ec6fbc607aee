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
