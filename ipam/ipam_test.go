package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

func pool(cidr string, size int) api.IPPool {
	return api.IPPool{CIDR: netip.MustParsePrefix(cidr), BlockSize: size}
}

func key(i int) node.Key {
	return node.Key{Network: "net", ContainerID: fmt.Sprint("c", i), IfName: "eth0"}
}

// with runs fn on a database of its own.
func with(t testing.TB, fn func(update func(func(*node.Tx) error) error)) {
	t.Helper()
	db, err := node.Open(context.Background(), t.TempDir(), node.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	fn(db.Update)
}

func TestAssignFillsBlocksThenReusesTheLongestFree(t *testing.T) {
	cfg := Config{Pools: []api.IPPool{pool("10.1.0.0/29", 30)}}
	with(t, func(update func(func(*node.Tx) error) error) {
		assign := func(i int) (got netip.Addr, err error) {
			err = update(func(tx *node.Tx) error {
				addrs, err := Assign(tx, cfg, Request{Key: key(i), V4: true})
				if err == nil {
					got = addrs[0]
				}
				return err
			})
			return got, err
		}
		for i := range 8 {
			if got, err := assign(i); err != nil || got != netip.MustParseAddr(fmt.Sprint("10.1.0.", i)) {
				t.Fatalf("address %d: %s, %v", i, got, err)
			}
		}
		if _, err := assign(8); !errors.Is(err, ErrExhausted) {
			t.Fatalf("full pool: %v", err)
		}
		for _, i := range []int{5, 2, 7} {
			if err := update(func(tx *node.Tx) error { _, err := Release(tx, key(i)); return err }); err != nil {
				t.Fatal(err)
			}
		}
		for n, want := range []string{"10.1.0.5", "10.1.0.2", "10.1.0.7"} {
			if got, err := assign(10 + n); err != nil || got.String() != want {
				t.Fatalf("reuse %d: %s, %v, want %s", n, got, err, want)
			}
		}
	})
}
