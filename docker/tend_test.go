package docker

import (
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/node"
)

// Addresses that Docker does not use are freed. Those of a CNI network, whatever it is called, are not: where only its IPAM is ours
// nothing else is recorded of its containers.
func TestHoldings(t *testing.T) {
	dir := t.TempDir()
	db, err := node.Open(t.Context(), dir, node.Options{})
	if err != nil {
		t.Fatal(err)
	}
	block := netip.MustParsePrefix("10.244.0.0/26")
	unused, others := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.244.0.2")
	other := node.Key{Network: "docker-net", ContainerID: "c1", IfName: "eth0"}
	err = db.Update(func(tx *node.Tx) error {
		return errors.Join(tx.PutBlock(node.Block{CIDR: block, Pool: block, Next: 3}), tx.Hold(requested(unused), unused, block), tx.Hold(other, others, block))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	d := &Drivers{attacher: cni.NewAttacher(cni.Config{StateDir: dir}, slog.New(slog.DiscardHandler), nil), Config: Config{Log: slog.New(slog.DiscardHandler)}}
	tender := &tender{Drivers: d, since: make(map[string]time.Time)}
	for range 2 {
		if err := tender.tendHoldings(t.Context(), make(map[string]bool)); err != nil {
			t.Fatal(err)
		}
		for what := range tender.since {
			tender.since[what] = time.Now().Add(-grace)
		}
	}
	err = d.attacher.View(t.Context(), func(tx *node.Tx) error {
		if owner, err := tx.Owner(unused); !errors.Is(err, node.ErrNotFound) {
			t.Errorf("%s is still held by %s, %v", unused, owner, err)
		}
		if owner, err := tx.Owner(others); err != nil || owner != other {
			t.Errorf("%s is held by %q, %v; want %s", others, owner, err, other)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
