package node

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// What a reboot finds inconsistent it puts right: nobody holds anything any more, whoever is said to.
func TestRebootFreesWhatNobodyCouldRelease(t *testing.T) {
	for name, spoil := range map[string]func(*bbolt.Tx) error{
		"owner without holding": func(tx *bbolt.Tx) error { return tx.Bucket(bucketHoldings).Delete([]byte(key(3).String())) },
		"owner that is no key":  func(tx *bbolt.Tx) error { return tx.Bucket(bucketOwners).Put([]byte("10.1.0.3"), []byte("a/b/c/d")) },
		"another owner":         func(tx *bbolt.Tx) error { return tx.Bucket(bucketOwners).Put([]byte("10.1.0.3"), []byte("x/y/z")) },
		"address in no block":   func(tx *bbolt.Tx) error { return tx.Bucket(bucketOwners).Put([]byte("10.9.0.3"), []byte("x/y/z")) },
	} {
		dir, boot := t.TempDir(), bootFile(t, "boot-1")
		opts := Options{BootIDFile: boot}
		fill(t, dir, opts, 5)
		raw, err := bbolt.Open(filepath.Join(dir, fileName), 0o600, &bbolt.Options{Timeout: time.Second, NoFreelistSync: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(raw.Update(spoil), raw.Close()); err != nil {
			t.Fatal(err)
		}
		write(t, boot, []byte("boot-2"))
		update(t, dir, opts, func(tx *Tx) error {
			var waiting []string
			err := tx.Freed(func(a netip.Addr) error { waiting = append(waiting, a.String()); return nil })
			slices.Sort(waiting)
			if want := "[10.1.0.0 10.1.0.1 10.1.0.2 10.1.0.3 10.1.0.4]"; fmt.Sprint(waiting) != want {
				t.Errorf("%s: %v wait, want %s", name, waiting, want)
			}
			b, berr := tx.Block(block.CIDR)
			if b.Used != 0 {
				t.Errorf("%s: %d in use", name, b.Used)
			}
			return errors.Join(err, berr, tx.Owners(func(a netip.Addr, k Key) error {
				t.Errorf("%s: %s is held by %s", name, a, k)
				return nil
			}))
		})
	}
}
