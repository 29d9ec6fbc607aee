package node

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
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

func key(i int) Key { return Key{"net", fmt.Sprint("c", i), "eth0"} }

// bootFile is a boot id that the test can change.
func bootFile(t testing.TB, id string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "boot_id")
	write(t, file, []byte(id))
	return file
}

func write(t testing.TB, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func mustOpen(t testing.TB, dir string, opts Options) *DB {
	t.Helper()
	db, err := Open(context.Background(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func closeDB(t testing.TB, db *DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// update runs fn in one opening of the database, as a plugin does.
func update(t testing.TB, dir string, opts Options, fn func(*Tx) error) {
	t.Helper()
	db := mustOpen(t, dir, opts)
	defer closeDB(t, db)
	if err := db.Update(fn); err != nil {
		t.Fatal(err)
	}
}

func endpoint(i int) Endpoint {
	return Endpoint{
		Key: key(i), HostIfName: fmt.Sprintf("cali%011x", i), Netns: fmt.Sprint("/run/netns/c", i), NetnsID: fmt.Sprint("4:", i),
		MAC: "02:00:00:00:00:01", HostMAC: "ee:ee:ee:ee:ee:ee", Addrs: []netip.Addr{block.At(i % 64)}, MTU: 1500,
		PodName: fmt.Sprint("pod-", i), PodNamespace: "default", Labels: map[string]string{"app": "web", "n": fmt.Sprint(i)},
		IPAM: "caracal", Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
}

var block = Block{CIDR: netip.MustParsePrefix("10.1.0.0/26"), Pool: netip.MustParsePrefix("10.1.0.0/16")}

// fill makes a database with n endpoints that hold an address each, some freed ones and a setting.
func fill(t testing.TB, dir string, opts Options, n int) {
	t.Helper()
	update(t, dir, opts, func(tx *Tx) error {
		if err := tx.PutBlock(Block{CIDR: block.CIDR, Pool: block.Pool, Next: min(n, 64)}); err != nil {
			return err
		}
		for i := range n {
			if i < 64 {
				if err := tx.Hold(key(i), block.At(i), block.CIDR); err != nil {
					return err
				}
			}
			if err := tx.PutEndpoint(endpoint(i)); err != nil {
				return err
			}
		}
		return tx.PutSetting("node-id", "7")
	})
}

func TestEndpoints(t *testing.T) {
	db := mustOpen(t, t.TempDir(), Options{})
	defer closeDB(t, db)
	do := func(fn func(*Tx) error) {
		t.Helper()
		if err := db.Update(fn); err != nil {
			t.Fatal(err)
		}
	}
	do(func(tx *Tx) error {
		for _, i := range []int{2, 0, 1} {
			if err := tx.PutEndpoint(endpoint(i)); err != nil {
				return err
			}
		}
		return nil
	})
	do(func(tx *Tx) error {
		got, err := tx.Endpoint(key(1))
		if err != nil {
			return err
		}
		if d := cmp.Diff(endpoint(1), got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Error(d)
		}
		var keys []Key
		err = tx.Endpoints(func(e Endpoint) error { keys = append(keys, e.Key); return nil })
		if want := []Key{key(0), key(1), key(2)}; !slices.Equal(keys, want) {
			t.Errorf("endpoints %v, want %v", keys, want)
		}
		return err
	})

	// The index follows a changed host interface, and a new owner of one keeps it when the old one goes.
	moved, taker := endpoint(0), endpoint(1)
	moved.HostIfName, taker.HostIfName = "cali-new", endpoint(2).HostIfName
	do(func(tx *Tx) error { return errors.Join(tx.PutEndpoint(moved), tx.PutEndpoint(taker)) })
	do(func(tx *Tx) error { return tx.DeleteEndpoint(key(2)) })
	do(func(tx *Tx) error { return tx.DeleteEndpoint(key(2)) })
	do(func(tx *Tx) error {
		for name, want := range map[string]Key{
			"cali-new": key(0), endpoint(0).HostIfName: {}, endpoint(1).HostIfName: {}, endpoint(2).HostIfName: key(1), "": {}, "eth0": {},
		} {
			e, err := tx.EndpointByHostIfName(name)
			if e.Key != want || (want == Key{}) != errors.Is(err, ErrNotFound) {
				t.Errorf("owner of %q: %v, %v, want %v", name, e.Key, err, want)
			}
		}
		if _, err := tx.Endpoint(key(2)); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted endpoint: %v", err)
		}
		return nil
	})
	for _, k := range []Key{{}, {"net", "c", ""}, {"net", "", "eth0"}, {"", "c", "eth0"}, {"a/b", "c", "d"}, {"net", "c", "\xff"}} {
		if err := db.Update(func(tx *Tx) error { return tx.PutEndpoint(Endpoint{Key: k}) }); err == nil {
			t.Errorf("key %q was accepted", k)
		}
		if err := db.Update(func(tx *Tx) error { return tx.DeleteEndpoint(k) }); err != nil {
			t.Errorf("delete %q: %v", k, err)
		}
	}
}

func TestSettings(t *testing.T) {
	db := mustOpen(t, t.TempDir(), Options{})
	defer closeDB(t, db)
	err := db.Update(func(tx *Tx) error {
		return errors.Join(tx.PutSetting("sysctl/b", "2"), tx.PutSetting("sysctl/a", "1"), tx.PutSetting("node", "x"), tx.PutSetting("gone", "x"),
			tx.PutSetting("gone", ""), tx.PutSetting("never", ""))
	})
	if err != nil {
		t.Fatal(err)
	}
	err = db.View(func(tx *Tx) error {
		var got []string
		err := tx.Settings("sysctl/", func(name, value string) error { got = append(got, name+"="+value); return nil })
		if want := []string{"sysctl/a=1", "sysctl/b=2"}; !slices.Equal(got, want) {
			t.Errorf("settings %q, want %q", got, want)
		}
		if tx.Setting("gone") != "" || tx.Setting("node") != "x" || tx.Setting("") != "" {
			t.Error("wrong settings")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A failed transaction changes nothing and returns the caller's own error; a panic of the caller's stays one.
func TestUpdateIsAllOrNothing(t *testing.T) {
	db := mustOpen(t, t.TempDir(), Options{})
	own := errors.New("own")
	if err := db.Update(func(tx *Tx) error { return errors.Join(tx.PutSetting("a", "1"), own) }); !errors.Is(err, own) || errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v", err)
	}
	func() {
		defer func() {
			if r := recover(); r != "mine" {
				t.Errorf("recovered %v", r)
			}
		}()
		db.Update(func(tx *Tx) error {
			if err := tx.PutSetting("a", "1"); err != nil {
				return err
			}
			panic("mine")
		})
	}()
	closeDB(t, db)
	db = mustOpen(t, filepath.Dir(db.path), Options{})
	defer closeDB(t, db)
	db.View(func(tx *Tx) error {
		if got := tx.Setting("a"); got != "" {
			t.Errorf("a is %q", got)
		}
		return nil
	})
	if err := db.View(func(tx *Tx) error { return tx.PutSetting("a", "1") }); err == nil {
		t.Error("a view wrote")
	}
}

// Whatever a record says, an address that another attachment holds is never touched.
func TestReleaseLeavesOthersAlone(t *testing.T) {
	db := mustOpen(t, t.TempDir(), Options{})
	defer closeDB(t, db)
	err := db.Update(func(tx *Tx) error {
		if err := errors.Join(tx.PutBlock(Block{CIDR: block.CIDR, Pool: block.Pool, Next: 2}),
			tx.Hold(key(1), block.At(0), block.CIDR), tx.Hold(key(2), block.At(1), block.CIDR)); err != nil {
			return err
		}
		if err := tx.Hold(key(3), block.At(1), block.CIDR); err == nil {
			t.Error("an address was held twice")
		}
		claims := []Holding{{block.At(0), block.CIDR}, {block.At(1), block.CIDR}}
		if err := put(tx, bucketHoldings, key(1).String(), claims); err != nil {
			return err
		}
		if _, err := tx.Release(key(1)); err != nil {
			return err
		}
		if owner, err := tx.Owner(block.At(1)); err != nil || owner != key(2) {
			t.Errorf("its owner is %v, %v", owner, err)
		}
		if b, err := tx.Block(block.CIDR); err != nil || b.Used != 1 {
			t.Errorf("%+v, %v", b, err)
		}
		for range 2 { // nothing held: no error
			if got, err := tx.Release(key(1)); err != nil || len(got) > 0 {
				t.Errorf("released %v, %v", got, err)
			}
		}
		// A block that is gone does not keep DEL from ending.
		if err := tx.bolt.Bucket(bucketBlocks).Delete([]byte(block.CIDR.String())); err != nil {
			return err
		}
		_, err := tx.Release(key(2))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRebootReleasesEverything(t *testing.T) {
	dir, boot := t.TempDir(), bootFile(t, "boot-1\n")
	opts := Options{BootIDFile: boot}
	fill(t, dir, opts, 10)
	count := func(tx *Tx) (endpoints, held, waiting int) {
		err := errors.Join(
			tx.Endpoints(func(Endpoint) error { endpoints++; return nil }),
			tx.Owners(func(netip.Addr, Key) error { held++; return nil }),
			tx.Freed(func(netip.Addr) error { waiting++; return nil }))
		if err != nil {
			t.Error(err)
		}
		return
	}
	before := read(t, filepath.Join(dir, fileName))
	closeDB(t, mustOpen(t, dir, opts))
	if !slices.Equal(before, read(t, filepath.Join(dir, fileName))) {
		t.Error("opening in the same boot wrote")
	}

	write(t, boot, []byte("boot-2\n"))
	ro, err := OpenReadOnly(context.Background(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	ro.View(func(tx *Tx) error {
		if e, h, _ := count(tx); e != 10 || h != 10 || tx.Boot() != "boot-1" {
			t.Errorf("read-only after a reboot: %d endpoints, %d addresses, %s", e, h, tx.Boot())
		}
		return nil
	})
	closeDB(t, ro)
	if !slices.Equal(before, read(t, filepath.Join(dir, fileName))) {
		t.Error("opening read-only wrote")
	}

	db := mustOpen(t, dir, opts)
	defer closeDB(t, db)
	db.View(func(tx *Tx) error {
		b, err := tx.Block(block.CIDR)
		if err != nil || b.Used != 0 || b.Next != 10 || tx.Setting("node-id") != "7" || tx.Boot() != "boot-2" {
			t.Errorf("after the reboot: %+v, %v, node-id %q, %s", b, err, tx.Setting("node-id"), tx.Boot())
		}
		if e, h, w := count(tx); e != 0 || h != 0 || w != 10 {
			t.Errorf("after the reboot: %d endpoints, %d held, %d waiting", e, h, w)
		}
		if _, err := tx.EndpointByHostIfName(endpoint(3).HostIfName); !errors.Is(err, ErrNotFound) {
			t.Errorf("host interface of an earlier boot: %v", err)
		}
		return nil
	})

	write(t, boot, []byte("\n"))
	if _, err := Open(context.Background(), t.TempDir(), opts); err == nil {
		t.Error("an empty boot id was accepted")
	}
	if _, err := Open(context.Background(), t.TempDir(), Options{BootIDFile: boot + ".none"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no boot id: %v", err)
	}
}

func TestOpenReadOnly(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "state")
	if _, err := OpenReadOnly(ctx, dir, Options{}); !errors.Is(err, ErrNoDatabase) {
		t.Fatalf("no directory: %v", err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Fatalf("read-only opening made the directory: %v", err)
	}
	fill(t, dir, Options{}, 3)
	var open []*DB
	for range 3 {
		db, err := OpenReadOnly(ctx, dir, Options{Wait: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, db)
	}
	if err := open[0].Update(func(tx *Tx) error { return tx.PutSetting("a", "b") }); !errors.Is(err, ErrReadOnly) {
		t.Errorf("update: %v", err)
	}
	if _, err := Open(ctx, dir, Options{Wait: 10 * time.Millisecond}); !errors.Is(err, ErrLocked) {
		t.Errorf("writing beside readers: %v", err)
	}
	for _, db := range open {
		closeDB(t, db)
	}
	if err := os.Remove(filepath.Join(dir, "node.db.lock")); err != nil {
		t.Fatal(err)
	}
	db, err := OpenReadOnly(ctx, dir, Options{})
	if err != nil {
		t.Fatalf("a copy without a lock: %v", err)
	}
	closeDB(t, db)
	if names, _ := filepath.Glob(filepath.Join(dir, "*")); len(names) != 2 { // with node.boot
		t.Errorf("reading left %q", names)
	}
}

func TestLocks(t *testing.T) {
	ctx, dir := context.Background(), t.TempDir()
	db := mustOpen(t, dir, Options{})
	pid := fmt.Sprint("by process ", os.Getpid())
	locked := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), pid) {
			t.Errorf("%s: %v, want ErrLocked %s", what, err, pid)
		}
	}
	_, err := Open(ctx, dir, Options{Wait: 20 * time.Millisecond})
	locked("open", err)
	_, err = OpenReadOnly(ctx, dir, Options{Wait: 20 * time.Millisecond})
	locked("open for reading", err)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	_, err = Open(short, dir, Options{})
	cancel()
	locked("open with a deadline", err)
	gone, cancel := context.WithCancel(ctx)
	cancel()
	_, err = Open(gone, dir, Options{})
	locked("open, given up", err)

	// Who waits gets it as soon as it is free.
	opened := make(chan error, 1)
	go func() {
		db, err := Open(ctx, dir, Options{Wait: 10 * time.Second})
		if err == nil {
			err = db.Close()
		}
		opened <- err
	}()
	closeDB(t, db)
	if err := <-opened; err != nil {
		t.Errorf("waiting: %v", err)
	}

	// Another program, which knows nothing of our queue, has the file.
	f, err := os.Open(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = Open(ctx, dir, Options{Wait: 20 * time.Millisecond})
	locked("file of another program", err)
	f.Close()

	node, err := LockNode(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
	_, err = LockNode(short, dir)
	cancel()
	locked("node lock", err)
	if err := node.Unlock(); err != nil {
		t.Fatal(err)
	}

	// A TryLock that was refused must not get the lock later and hold it for a moment.
	for range 200 {
		l, err := TryLock(dir, "settle.lock")
		if err != nil {
			t.Fatal(err)
		}
		if _, err = TryLock(dir, "settle.lock"); !errors.Is(err, ErrLocked) {
			t.Fatalf("try: %v", err)
		}
		if err := l.Unlock(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := LockNode(ctx, filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("lock in no directory: %v", err)
	}
}

func TestNewerSchema(t *testing.T) {
	dir := t.TempDir()
	fill(t, dir, Options{}, 1)
	path := filepath.Join(dir, fileName)
	change := func(fn func(*bbolt.Tx) error) []byte {
		t.Helper()
		raw, err := bbolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(raw.Update(fn), raw.Close()); err != nil {
			t.Fatal(err)
		}
		return read(t, path)
	}
	expect := func(what string, want error, before []byte) {
		t.Helper()
		if db, err := Open(context.Background(), dir, Options{}); !errors.Is(err, want) {
			t.Errorf("%s: %v, %v, want %v", what, db, err, want)
		}
		if db, err := OpenReadOnly(context.Background(), dir, Options{}); !errors.Is(err, want) {
			t.Errorf("%s, read-only: %v, %v, want %v", what, db, err, want)
		}
		if !slices.Equal(before, read(t, path)) {
			t.Errorf("%s: the file was changed", what)
		}
	}
	version := func(v string) func(*bbolt.Tx) error {
		return func(tx *bbolt.Tx) error { return tx.Bucket(bucketMeta).Put([]byte("version"), []byte(v)) }
	}
	expect("newer", ErrVersion, change(version("2")))
	expect("no number", ErrCorrupt, change(version("x")))
	expect("zero", ErrCorrupt, change(version("0")))
	change(version("1"))
	expect("no owners", ErrCorrupt, change(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketOwners) }))
	expect("another program's", ErrCorrupt, change(func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucketMeta) }))
}
