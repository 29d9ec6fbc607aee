package node

import (
	"errors"
	"net/netip"
	"testing"
)

// An address goes from one holder to another, with its count and its block, and is released by the new one alone.
func TestTransfer(t *testing.T) {
	db, err := Open(t.Context(), t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	block := netip.MustParsePrefix("10.244.0.0/26")
	one, two := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.244.0.2")
	from, to := Key{"net", "from", "eth0"}, Key{"net", "to", "eth0"}
	err = db.Update(func(tx *Tx) error {
		return errors.Join(tx.PutBlock(Block{CIDR: block, Pool: block, Next: 3}), tx.Hold(from, one, block), tx.Hold(from, two, block), tx.Hold(to, netip.MustParseAddr("10.244.0.3"), block),
			tx.Transfer(one, to), tx.Transfer(one, to))
	})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *Tx) error {
		if owner, err := tx.Owner(one); err != nil || owner != to {
			t.Errorf("%s is held by %s, %v", one, owner, err)
		}
		if held, err := tx.Held(to); err != nil || len(held) != 2 || held[1] != (Holding{one, block}) {
			t.Errorf("%s holds %v, %v", to, held, err)
		}
		if freed, err := tx.Release(from); err != nil || len(freed) != 1 || freed[0] != two {
			t.Errorf("%s released %v, %v", from, freed, err)
		}
		if b, err := tx.Block(block); err != nil || b.Used != 2 {
			t.Errorf("block %+v, %v", b, err)
		}
		if err := tx.Transfer(two, to); !errors.Is(err, ErrNotFound) {
			t.Errorf("transfer of a free address: %v", err)
		}
		if err := tx.Transfer(one, Key{"a/b", "c", "d"}); err == nil {
			t.Error("transferred to a key that can't be one")
		}
		if err := tx.Transfer(one, from); err != nil {
			t.Error(err)
		}
		_, err := tx.Held(from)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
