package ipam

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/node"
)

// An attachment must not cost more because many others are there: nothing may walk their records. Counted in memory
// allocations, which no load on the machine changes.
func TestCostStaysTheSame(t *testing.T) {
	cost := func(n int) float64 {
		dir := memory(t)
		populate(t, dir, n)
		db, err := node.Open(context.Background(), dir, node.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		run := func(fn func(*node.Tx) error) {
			if err := db.Update(fn); err != nil {
				t.Fatal(err)
			}
		}
		return testing.AllocsPerRun(50, func() {
			run(func(tx *node.Tx) error {
				_, err := record(tx, testConfig, Request{Key: key(n), V4: true})
				return err
			})
			run(func(tx *node.Tx) error { return forget(tx, key(n)) })
		})
	}
	few, many := cost(10), cost(500)
	t.Logf("allocations beside 10 pods: %.0f, beside 500: %.0f", few, many)
	if many > 2*few {
		t.Errorf("%.0f allocations beside 500 pods, %.0f beside 10", many, few)
	}
}

// FuzzConfig takes pools, reservations and a requested address from outside. Whatever they are, Assign answers soon, with
// an error of its own or with addresses that the configuration has.
func FuzzConfig(f *testing.F) {
	f.Add("10.1.0.0/29", 30, "2001:db8::/64", 0, "10.1.0.1/32", "10.1.0.2")
	f.Add("10.1.0.0/8", 32, "::/0", 128, "10.0.0.0/8", "2001:db8::1")
	f.Add("10.1.0.1/24", -1, "10.1.0.0/25", 1<<31-1, "::ffff:10.1.0.0/120", "::ffff:10.1.0.0")
	f.Add("2001:db8::/48", 122, "10.0.0.0/31", 26, "2001:db8::/49", "fe80::1%eth0")
	dir := memory(f)
	f.Fuzz(func(t *testing.T, pool1 string, size1 int, pool2 string, size2 int, reserved, wanted string) {
		var cfg Config
		for _, p := range []struct {
			cidr string
			size int
		}{{pool1, size1}, {pool2, size2}} {
			if cidr, err := netip.ParsePrefix(p.cidr); err == nil {
				p := pool("10.0.0.0/8", p.size)
				p.CIDR = cidr
				cfg.Pools = append(cfg.Pools, p)
			}
		}
		if r, err := netip.ParsePrefix(reserved); err == nil {
			cfg.Reservations = append(cfg.Reservations, r)
		}
		req := Request{Key: key(1)}
		pools, _ := cfg.pools()
		req.V4, req.V6 = Families(pools)
		if a, err := netip.ParseAddr(wanted); err == nil {
			req.Want = append(req.Want, a)
		}
		db, err := node.Open(context.Background(), dir, node.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		undo := errors.New("undo")
		err = db.Update(func(tx *node.Tx) error {
			status := Status(tx, cfg, req.V4, req.V6)
			got, err := Assign(tx, cfg, req)
			if err != nil {
				return err
			}
			if status != nil && len(req.Want) == 0 {
				t.Errorf("%+v: status said %v, and ADD got %v", cfg, status, got)
			}
			for _, a := range got {
				if k, err := tx.Owner(a); err != nil || k != req.Key {
					t.Errorf("%s is held by %v, %v", a, k, err)
				}
				for _, r := range cfg.Reservations {
					if r.Contains(a) {
						t.Errorf("%s is reserved by %s", a, r)
					}
				}
			}
			return undo
		})
		for _, known := range []error{undo, ErrExhausted, ErrTaken, ErrOutsidePool, ErrReserved, ErrPool} {
			if errors.Is(err, known) {
				return
			}
		}
		t.Errorf("%+v %+v: %v", cfg, req, err)
	})
}
