package docker

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store/bolt"
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
	unused, unjoined, others := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.244.0.3"), netip.MustParseAddr("10.244.0.2")
	endpoint, err := endpointKey("735f15b514db3a7310a7f3ef0734a6cd", "f79de1d7f9a5a3b1")
	if err != nil {
		t.Fatal(err)
	}
	other := node.Key{Network: "docker-net", ContainerID: "c1", IfName: "eth0"}
	err = db.Update(func(tx *node.Tx) error {
		return errors.Join(tx.PutBlock(node.Block{CIDR: block, Pool: block, Next: 4}), tx.Hold(requested(unused), unused, block), tx.Hold(endpoint, unjoined, block), tx.PutSetting(macSetting+endpoint.ContainerID, "02:00:00:00:00:01"),
			tx.Hold(other, others, block))
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
		for _, a := range []netip.Addr{unused, unjoined} {
			if owner, err := tx.Owner(a); !errors.Is(err, node.ErrNotFound) {
				t.Errorf("%s is still held by %s, %v", a, owner, err)
			}
		}
		if mac := tx.Setting(macSetting + endpoint.ContainerID); mac != "" {
			t.Errorf("an endpoint that is gone is still to have MAC address %s", mac)
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

// What goes wrong in each round is in the log once.
func TestTendLog(t *testing.T) {
	dir := t.TempDir()
	s, err := bolt.Open(dir, bolt.Options{})
	if err := errors.Join(err, s.Close()); err != nil { // every request fails
		t.Fatal(err)
	}
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	d := &Drivers{
		attacher: cni.NewAttacher(cni.Config{StateDir: dir}, log, nil), engine: newEngine(filepath.Join(dir, "docker.sock")), store: s,
		Config: Config{Log: log}, look: make(chan struct{}),
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		d.tend(ctx)
		close(ended)
	}()
	for range 3 {
		d.look <- struct{}{} // taken between two rounds
	}
	cancel()
	<-ended
	if got := strings.Count(out.String(), "level=WARN"); got != 1 {
		t.Errorf("%d warnings, want 1:\n%s", got, &out)
	}
}
