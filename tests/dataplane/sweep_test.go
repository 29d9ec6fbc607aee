package dataplane

import (
	"testing"
	"time"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

func (n *node) churn() maps.Churn {
	n.t.Helper()
	c, err := n.maps.Churn()
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// sweepAll sweeps the table by pieces.
func (n *node) sweepAll(piece uint32) (removed int) {
	n.t.Helper()
	for first := uint32(0); first < n.state().MaxFlows; first += piece {
		gone, err := n.maps.SweepFlows(first, piece)
		if err != nil {
			n.t.Fatal(err)
		}
		removed += gone
	}
	return removed
}

// A sweep removes what is expired and nothing else, gives back what it was charged, and tells how many went.
func TestSweep(t *testing.T) {
	const life = 50 * time.Millisecond
	b := newBench(t, loader.Config{MaxFlows: 200, Timeouts: loader.Timeouts{UDP: life, Opening: life, ICMP: time.Hour}})
	x, y := b.a.v4, b.b.v4
	for id := range uint16(30) { // which stay
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
		f = echo(b.b, y, x, id, true)
		check(t, f, b.fromB(f), "forward_pod")
	}
	for port := range uint16(60) {
		if there, back := b.talk(1000 + port); there != "forward_pod" || back != "forward_pod" {
			t.Fatalf("flow %d: %s, %s", port, there, back)
		}
	}
	half := udp(b.a, at(x, 999), at(y, 53), 1) // never answered
	check(t, half, b.fromA(half), "forward_pod")
	if removed := b.sweepAll(64); removed > 60 {
		t.Errorf("%d flows were swept, of 60 that may have expired", removed)
	}
	until(t, "flows to expire", func() bool {
		f, ok := b.flow("udp", at(x, 999), at(y, 53))
		return !ok || f.Idle > life+8*time.Millisecond
	})
	b.sweepAll(64)
	c := b.churn()
	if s := b.state(); s.Flows != 30 || b.held(t, b.a) != 30 {
		t.Errorf("%d flows stay, %d charged to a; want 30", s.Flows, b.held(t, b.a))
	}
	if c.Opened != 91 || c.Confirmed != 90 || c.Swept+c.Reclaimed != 60 || c.Opening != 0 || c.Displaced != 0 || c.MaxOpens != 16384 {
		t.Errorf("churn %+v", c)
	}
	for id := range uint16(30) {
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
	}
	if removed := b.sweepAll(1000); removed != 0 {
		t.Errorf("%d flows were swept that are alive", removed)
	}
	if again := b.churn(); again.Opened != c.Opened {
		t.Errorf("churn %+v, after packets of open flows; before %+v", again, c)
	}
	b.purge(t)
	if c := b.churn(); c.Opening != 0 || c.Displaced != 0 {
		t.Errorf("churn %+v after purge", c)
	}
}
