package api

import (
	"net/netip"
	"testing"
)

func TestBlockKey(t *testing.T) {
	for cidr, want := range map[string][2]string{
		"10.244.0.64/26":           {"/blocks/10.244.0.64-26", "10.244.0.64-26"},
		"2001:db8::/122":           {"/blocks/2001.db8..-122", "2001-db8---122"},
		"2001:db8:1:2:3:4:5:0/112": {"/blocks/2001.db8.1.2.3.4.5.0-112", "2001-db8-1-2-3-4-5-0-112"},
		"fd00:0:0:1::/64":          {"/blocks/fd00.0.0.1..-64", "fd00-0-0-1---64"},
	} {
		p := netip.MustParsePrefix(cidr)
		if got := BlockKey(p); got != want[0] {
			t.Errorf("key of %s: %s", cidr, got)
		}
		if got := BlockObject(p); got != want[1] {
			t.Errorf("object of %s: %s", cidr, got)
		}
		if got, ok := BlockOfKey(want[0]); !ok || got != p {
			t.Errorf("block of %s: %s", want[0], got)
		}
		if got, ok := BlockOfObject(want[1]); !ok || got != p {
			t.Errorf("block of %s: %s", want[1], got)
		}
	}
}

// FuzzBlockOfKey: a key, or an object's name, is a block's or none.
func FuzzBlockOfKey(f *testing.F) {
	for _, s := range []string{"/blocks/10.244.0.64-26", "/blocks/2001.db8..-122", "/blocks/", "/blocks/-", "10.0.0.0-8", "2001-db8---122"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if p, ok := BlockOfKey(key); ok && BlockKey(p) != key {
			t.Fatalf("%q is said to be of %s", key, p)
		}
		if p, ok := BlockOfObject(key); ok && BlockObject(p) != key {
			t.Fatalf("%q is said to be called so of %s", key, p)
		}
	})
}
