package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

func pool(cidr string, size int) api.IPPool {
	return api.IPPool{CIDR: netip.MustParsePrefix(cidr), BlockSize: size}
}

func disabled(p api.IPPool) api.IPPool {
	p.Disabled = true
	return p
}

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addrs(s string) (all []netip.Addr) {
	for _, a := range strings.Fields(s) {
		all = append(all, netip.MustParseAddr(a))
	}
	return all
}

func key(i int) node.Key {
	return node.Key{Network: "net", ContainerID: fmt.Sprint("c", i), IfName: "eth0"}
}

// rig is a database of its own.
type rig struct {
	testing.TB
	db *node.DB
}

func newRig(t testing.TB) *rig {
	t.Helper()
	boot := filepath.Join(t.TempDir(), "boot_id")
	if err := os.WriteFile(boot, []byte("boot-1"), 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := node.Open(context.Background(), t.TempDir(), node.Options{BootIDFile: boot})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &rig{t, db}
}

// assign makes sure, besides, that Status promised what Assign did when no address was requested.
func (r *rig) assign(cfg Config, req Request) ([]netip.Addr, error) {
	r.Helper()
	var held []node.Holding
	status := r.db.View(func(tx *node.Tx) error {
		held, _ = tx.Held(req.Key)
		return Status(tx, cfg, req.V4, req.V6)
	})
	var got []netip.Addr
	err := r.db.Update(func(tx *node.Tx) (err error) {
		got, err = Assign(tx, cfg, req)
		return err
	})
	if len(req.Want) == 0 && len(held) == 0 && fmt.Sprint(status) != fmt.Sprint(err) {
		r.Errorf("Status said %v, Assign %v", status, err)
	}
	r.check()
	return got, err
}

// expect assigns to attachment i: addresses, space between, or a sentinel.
func (r *rig) expect(cfg Config, i int, req Request, want string, sentinel error) {
	r.Helper()
	req.Key = key(i)
	got, err := r.assign(cfg, req)
	if sentinel != nil {
		if !errors.Is(err, sentinel) {
			r.Fatalf("attachment %d: %v, %v, want %v", i, got, err, sentinel)
		}
		return
	}
	if err != nil || !slices.Equal(got, addrs(want)) {
		r.Fatalf("attachment %d: %v, %v, want %s", i, got, err, want)
	}
}

func (r *rig) release(all ...int) {
	r.Helper()
	for _, i := range all {
		if err := r.db.Update(func(tx *node.Tx) error { _, err := Release(tx, key(i)); return err }); err != nil {
			r.Fatal(err)
		}
	}
	r.check()
}

func (r *rig) check() {
	r.Helper()
	err := r.db.View(func(tx *node.Tx) error {
		report, err := Check(tx, func(node.Key) bool { return true })
		if len(report.Problems) > 0 {
			r.Errorf("check: %+v", report.Problems)
		}
		return err
	})
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) blocks() (all []string) {
	r.Helper()
	err := r.db.View(func(tx *node.Tx) error {
		blocks, err := tx.Blocks()
		for _, b := range blocks {
			all = append(all, b.CIDR.String())
		}
		return err
	})
	if err != nil {
		r.Fatal(err)
	}
	return all
}

var v4, v6, both = Request{V4: true}, Request{V6: true}, Request{V4: true, V6: true}

func want(s string) Request { return Request{Want: addrs(s)} }

func TestFillThenReuseTheLongestFree(t *testing.T) {
	cfg := Config{Pools: []api.IPPool{pool("10.1.0.0/29", 30)}}
	r := newRig(t)
	for i := range 8 {
		r.expect(cfg, i, v4, fmt.Sprint("10.1.0.", i), nil)
	}
	r.expect(cfg, 8, v4, "", ErrExhausted)
	r.release(5, 2, 7, 2, 99)
	for n, a := range []string{"10.1.0.5", "10.1.0.2", "10.1.0.7"} {
		r.expect(cfg, 10+n, v4, a, nil)
	}
	r.expect(cfg, 13, v4, "", ErrExhausted)
}

func TestReuseComesBeforeANewBlockAndAfterTheUnused(t *testing.T) {
	cfg := Config{Pools: []api.IPPool{pool("10.1.0.0/24", 30)}}
	r := newRig(t)
	r.expect(cfg, 0, v4, "10.1.0.0", nil)
	r.release(0)
	r.expect(cfg, 1, v4, "10.1.0.1", nil)
	r.expect(cfg, 2, want("10.1.0.2"), "10.1.0.2", nil) // before its turn, and released: used once
	r.release(2)
	r.expect(cfg, 3, v4, "10.1.0.3", nil)
	r.expect(cfg, 4, v4, "10.1.0.0", nil)
	r.expect(cfg, 5, v4, "10.1.0.2", nil)
	r.expect(cfg, 6, v4, "10.1.0.4", nil)
}

func TestConfig(t *testing.T) {
	for _, test := range []struct {
		name string
		cfg  Config
		v4   bool
		v6   bool
		ok   bool
	}{
		{"default", Config{}, true, false, true},
		{"dual stack", Config{Pools: []api.IPPool{pool("10.1.0.0/16", 0), pool("2001:db8::/64", 0)}}, true, true, true},
		{"only IPv6", Config{Pools: []api.IPPool{pool("2001:db8::/64", 0)}}, false, true, true},
		{"equal", Config{Pools: []api.IPPool{pool("10.1.0.0/16", 0), pool("10.1.0.0/16", 0)}}, false, false, false},
		{"overlapping", Config{Pools: []api.IPPool{pool("10.1.0.0/16", 0), pool("10.1.128.0/24", 0)}}, false, false, false},
		{"too small", Config{Pools: []api.IPPool{pool("10.1.0.0/31", 0)}}, false, false, false},
		{"host bits", Config{Pools: []api.IPPool{pool("10.1.0.1/16", 0)}}, false, false, false},
		{"multicast", Config{Pools: []api.IPPool{pool("224.0.0.0/8", 0)}}, false, false, false},
		{"v4-mapped", Config{Pools: []api.IPPool{pool("::ffff:10.1.0.0/112", 0)}}, false, false, false},
		{"no reservation", Config{Reservations: []netip.Prefix{{}}}, true, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.cfg.Validate()
			if (err == nil) != test.ok || err != nil && !errors.Is(err, ErrPool) {
				t.Fatalf("%v", err)
			}
			pools, _ := test.cfg.pools()
			if has4, has6 := Families(pools); has4 != test.v4 || has6 != test.v6 {
				t.Errorf("families %t, %t", has4, has6)
			}
			if !test.ok {
				newRig(t).expect(test.cfg, 0, both, "", ErrPool)
			}
		})
	}
	r := newRig(t)
	r.expect(Config{}, 0, v4, "10.244.0.0", nil)
	r.expect(Config{}, 1, v6, "", ErrExhausted)
	r.expect(Config{}, 1, both, "", ErrExhausted)
	if got := r.blocks(); !slices.Equal(got, []string{"10.244.0.0/26"}) {
		t.Errorf("blocks %v", got)
	}
}

func TestRequestedAddresses(t *testing.T) {
	cfg := Config{
		Pools:        []api.IPPool{pool("10.1.0.0/24", 28), disabled(pool("10.2.0.0/24", 28)), pool("2001:db8::/120", 124)},
		Reservations: prefixes("10.1.0.8/31", "::ffff:10.1.0.32/124"),
	}
	for _, test := range []struct {
		name string
		req  Request
		want string
		err  error
	}{
		{"free", want("10.1.0.5"), "10.1.0.5", nil},
		{"free, asking for the family too", Request{Want: addrs("10.1.0.5"), V4: true}, "10.1.0.5", nil},
		{"free, and any IPv6", Request{Want: addrs("10.1.0.5"), V4: true, V6: true}, "10.1.0.5 2001:db8::", nil},
		{"IPv6, and any IPv4", Request{Want: addrs("2001:db8::7"), V4: true, V6: true}, "10.1.0.1 2001:db8::7", nil},
		{"both", want("2001:db8::7 10.1.0.5"), "10.1.0.5 2001:db8::7", nil},
		{"two of a family", want("10.1.0.6 10.1.0.5"), "10.1.0.6 10.1.0.5", nil},
		{"twice the same", want("10.1.0.5 ::ffff:10.1.0.5"), "10.1.0.5", nil},
		{"written as IPv6", want("::ffff:10.1.0.5"), "10.1.0.5", nil},
		{"in an unclaimed block", want("10.1.0.250"), "10.1.0.250", nil},
		{"first of the pool", want("10.1.0.16"), "10.1.0.16", nil},
		{"freed", want("10.1.0.2"), "10.1.0.2", nil},
		{"taken", want("10.1.0.0"), "", ErrTaken},
		{"reserved", want("10.1.0.9"), "", ErrReserved},
		{"reserved in IPv6 style", want("10.1.0.40"), "", ErrReserved},
		{"outside", want("10.3.0.1"), "", ErrOutsidePool},
		{"with a zone", want("2001:db8::1%eth0"), "", ErrOutsidePool},
		{"none at all", Request{Want: []netip.Addr{{}}}, "", ErrOutsidePool},
		{"in a disabled pool", want("10.2.0.200"), "", ErrPool},
		{"in a block of a disabled pool", want("10.2.0.9"), "", ErrPool},
		{"one good, one taken", want("10.1.0.5 10.1.0.0"), "", ErrTaken},
		{"had before", Request{Had: addrs("10.1.0.2 2001:db8::7"), V4: true, V6: true}, "10.1.0.2 2001:db8::7", nil},
		{"had before, another is wanted", Request{Want: addrs("10.1.0.5"), Had: addrs("10.1.0.2"), V4: true}, "10.1.0.5", nil},
		{"had before, of a family that is not wanted now", Request{Had: addrs("10.1.0.2 2001:db8::7"), V4: true}, "10.1.0.2", nil},
		{"had before, taken since", Request{Had: addrs("10.1.0.0"), V4: true}, "10.1.0.1", nil},
		{"had before, reserved since", Request{Had: addrs("10.1.0.9"), V4: true}, "10.1.0.1", nil},
		{"had before, the pool is disabled since", Request{Had: addrs("10.2.0.9"), V4: true}, "10.1.0.1", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t)
			r.expect(cfg, 0, v4, "10.1.0.0", nil)
			enabled := cfg
			enabled.Pools = slices.Clone(cfg.Pools)
			enabled.Pools[1].Disabled = false
			r.expect(enabled, 1, want("10.2.0.1"), "10.2.0.1", nil)
			r.expect(cfg, 2, want("10.1.0.2"), "10.1.0.2", nil)
			r.release(2)
			before := r.blocks()
			r.expect(cfg, 5, test.req, test.want, test.err)
			if test.err != nil {
				if after := r.blocks(); !slices.Equal(before, after) {
					t.Errorf("a refused request left blocks %v", after)
				}
				return
			}
			r.expect(cfg, 5, test.req, test.want, nil)
			r.expect(cfg, 5, v4, test.want, nil) // what it holds, whatever it asks for now
			r.release(5)
			r.expect(cfg, 6, Request{Want: addrs(test.want)}, test.want, nil)
		})
	}
}

func TestReservations(t *testing.T) {
	pools := []api.IPPool{pool("10.1.0.0/28", 30)}
	for _, test := range []struct {
		name     string
		reserved []netip.Prefix
		want     string // in this order, then exhausted
	}{
		{"first and last", prefixes("10.1.0.0/32", "10.1.0.15/32"), "10.1.0.1 10.1.0.2 10.1.0.3 10.1.0.4 10.1.0.5 10.1.0.6 10.1.0.7 10.1.0.8 10.1.0.9 10.1.0.10 10.1.0.11 10.1.0.12 10.1.0.13 10.1.0.14"},
		{"whole blocks", prefixes("10.1.0.0/29", "10.1.0.12/30"), "10.1.0.8 10.1.0.9 10.1.0.10 10.1.0.11"},
		{"a block in pieces, overlapping", prefixes("10.1.0.0/31", "10.1.0.2/31", "10.1.0.2/32", "10.1.0.8/29"), "10.1.0.4 10.1.0.5 10.1.0.6 10.1.0.7"},
		{"host bits", prefixes("10.1.0.7/29", "10.1.0.14/31"), "10.1.0.8 10.1.0.9 10.1.0.10 10.1.0.11 10.1.0.12 10.1.0.13"},
		{"all", prefixes("10.0.0.0/8"), ""},
		{"everything", prefixes("0.0.0.0/0", "::/0"), ""},
		{"all but one", prefixes("10.1.0.0/29", "10.1.0.8/30", "10.1.0.12/31", "10.1.0.15/32"), "10.1.0.14"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, cfg := newRig(t), Config{Pools: pools, Reservations: test.reserved}
			n := 0
			for _, a := range addrs(test.want) {
				r.expect(cfg, n, v4, a.String(), nil)
				n++
			}
			r.expect(cfg, n, v4, "", ErrExhausted)
			for _, b := range r.blocks() {
				for _, reserved := range test.reserved {
					if p := netip.MustParsePrefix(b); reserved.Bits() <= p.Bits() && reserved.Contains(p.Addr()) {
						t.Errorf("claimed %s, of which all is reserved", b)
					}
				}
			}
			// No reservation lasts for ever: then all of the pool can be had.
			for ; n < 16; n++ {
				if _, err := r.assign(Config{Pools: pools}, Request{Key: key(n), V4: true}); err != nil {
					t.Fatalf("address %d without the reservation: %v", n, err)
				}
			}
			r.expect(Config{Pools: pools}, n, v4, "", ErrExhausted)
			// Reserved while it is held: it stays, and is not given out again.
			r.release(0)
			if _, err := r.assign(Config{Pools: pools, Reservations: prefixes("10.1.0.0/28")}, Request{Key: key(50), V4: true}); !errors.Is(err, ErrExhausted) {
				t.Errorf("a reserved address was given out again: %v", err)
			}
		})
	}
}

// A reservation of 2^57 blocks is stepped over in one step.
func TestVastReservation(t *testing.T) {
	r := newRig(t)
	cfg := Config{Pools: []api.IPPool{pool("2001:db8::/64", 0)}, Reservations: prefixes("2001:db8::/65", "2001:db8:0:0:8000::/128")}
	r.expect(cfg, 0, v6, "2001:db8::8000:0:0:1", nil)
	cfg.Reservations = prefixes("2001:db8::/64")
	r.expect(cfg, 1, v6, "", ErrExhausted)
	cfg = Config{Pools: []api.IPPool{pool("255.255.0.0/17", 0)}, Reservations: prefixes("255.255.0.0/16")}
	r.expect(cfg, 1, v4, "", ErrExhausted)
}

func TestNetworksShareAPool(t *testing.T) {
	shared := pool("10.1.0.0/29", 30)
	a := Config{Pools: []api.IPPool{shared}, Reservations: prefixes("10.1.0.0/30")}
	b := Config{Pools: []api.IPPool{shared}}
	r := newRig(t)
	other := node.Key{Network: "other", ContainerID: "c0", IfName: "eth0"}
	r.expect(a, 0, v4, "10.1.0.4", nil)
	got, err := r.assign(b, Request{Key: other, V4: true})
	if err != nil || got[0].String() != "10.1.0.5" {
		t.Fatalf("%v, %v", got, err)
	}
	r.release(0) // the same container and interface of another network keeps its own
	r.db.View(func(tx *node.Tx) error {
		if held, err := tx.Held(other); err != nil || len(held) != 1 {
			t.Errorf("the other network's holds %v, %v", held, err)
		}
		return nil
	})
	for i := 1; i < 8; i++ {
		if _, err := r.assign(b, Request{Key: key(i), V4: true}); err != nil {
			t.Fatalf("address %d: %v", i, err)
		}
	}
	r.expect(b, 8, v4, "", ErrExhausted)

	overlapping := Config{Pools: []api.IPPool{pool("10.1.0.0/28", 30)}}
	resized := Config{Pools: []api.IPPool{pool("10.1.0.0/29", 31)}}
	r.expect(overlapping, 9, v4, "", ErrPool)
	r.expect(resized, 9, v4, "", ErrPool)
	for i := range 8 {
		r.release(i)
	}
	r.expect(resized, 9, v4, "", ErrPool) // one is still held
	if err := r.db.Update(func(tx *node.Tx) error { _, err := Release(tx, other); return err }); err != nil {
		t.Fatal(err)
	}
	r.expect(resized, 9, v4, "10.1.0.0", nil) // empty blocks give way
	r.release(9)
	r.expect(overlapping, 9, want("10.1.0.13"), "10.1.0.13", nil)
	if got := r.blocks(); !slices.Equal(got, []string{"10.1.0.12/30"}) {
		t.Errorf("blocks %v", got)
	}
}

func TestDisabledPool(t *testing.T) {
	r := newRig(t)
	p, spare := pool("10.1.0.0/30", 31), pool("10.2.0.0/31", 31)
	on, off := Config{Pools: []api.IPPool{p, spare}}, Config{Pools: []api.IPPool{disabled(p), spare}}
	r.expect(on, 0, v4, "10.1.0.0", nil)
	r.expect(on, 1, v4, "10.1.0.1", nil)
	r.expect(off, 2, v4, "10.2.0.0", nil)
	r.release(0)
	r.expect(off, 3, v4, "10.2.0.1", nil)
	r.expect(off, 4, v4, "", ErrExhausted)
	r.expect(off, 1, v4, "10.1.0.1", nil) // what it holds is its own
	r.expect(on, 4, v4, "10.1.0.0", nil)
	r.expect(Config{Pools: []api.IPPool{disabled(p)}}, 5, v4, "", ErrExhausted)
}

func TestDeleteBlock(t *testing.T) {
	cfg, r := Config{Pools: []api.IPPool{pool("10.1.0.0/24", 30)}}, newRig(t)
	cidr := netip.MustParsePrefix("10.1.0.0/30")
	remove := func() error { return r.db.Update(func(tx *node.Tx) error { return tx.DeleteBlock(cidr) }) }
	if err := remove(); !errors.Is(err, node.ErrNotFound) {
		t.Errorf("no block: %v", err)
	}
	for i := range 5 {
		r.expect(cfg, i, v4, fmt.Sprint("10.1.0.", i), nil)
	}
	if err := remove(); err == nil {
		t.Error("a block in use was given up")
	}
	r.release(0, 1, 2, 4, 3)
	if err := remove(); err != nil {
		t.Fatal(err)
	}
	r.check()
	if got := r.blocks(); !slices.Equal(got, []string{"10.1.0.4/30"}) {
		t.Errorf("blocks %v", got)
	}
	for i := 5; i < 8; i++ {
		r.expect(cfg, i, v4, fmt.Sprint("10.1.0.", i), nil)
	}
	r.expect(cfg, 8, v4, "10.1.0.4", nil) // freed, in the block that is left
	r.expect(cfg, 9, v4, "10.1.0.0", nil) // claimed anew
}

func TestCheckFinds(t *testing.T) {
	cfg := Config{Pools: []api.IPPool{pool("10.1.0.0/24", 30)}}
	a := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, 0, byte(n)}) }
	cidr := netip.MustParsePrefix("10.1.0.0/30")
	for kind, spoil := range map[string]func(*node.Tx) error{
		"leaked":     func(tx *node.Tx) error { return tx.DeleteEndpoint(key(0)) },
		"unrecorded": func(tx *node.Tx) error { _, err := tx.Release(key(0)); return err },
		"double":     func(tx *node.Tx) error { return tx.Free(a(0)) },
		"stray":      func(tx *node.Tx) error { return tx.Free(a(77)) },
		"lost": func(tx *node.Tx) error {
			return tx.PutBlock(node.Block{CIDR: cidr, Pool: cfg.Pools[0].CIDR, Next: 3, Used: 1})
		},
		"miscounted": func(tx *node.Tx) error {
			return tx.PutBlock(node.Block{CIDR: cidr, Pool: cfg.Pools[0].CIDR, Next: 1, Used: 3})
		},
	} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t)
			err := r.db.Update(func(tx *node.Tx) error {
				got, err := Assign(tx, cfg, Request{Key: key(0), V4: true})
				if err != nil {
					return err
				}
				if err := tx.PutEndpoint(node.Endpoint{Key: key(0), Addrs: got, IPAM: Name}); err != nil {
					return err
				}
				if report, err := Check(tx, nil); err != nil || len(report.Problems) > 0 {
					t.Errorf("before: %+v, %v", report, err)
				}
				if err := spoil(tx); err != nil {
					return err
				}
				report, err := Check(tx, nil)
				if !slices.ContainsFunc(report.Problems, func(p Problem) bool { return p.Kind == kind }) {
					t.Errorf("found only %+v", report.Problems)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}
