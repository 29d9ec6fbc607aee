package node

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// use does with a database what plugin and CLI do with one.
func use(db *DB) error {
	err := db.View(func(tx *Tx) error {
		_, err := tx.Blocks()
		tx.EndpointByHostIfName("cali00000000001")
		return errors.Join(err,
			tx.Endpoints(func(e Endpoint) error { _, err := tx.Held(e.Key); return err }),
			tx.Holdings(func(Key, []Holding) error { return nil }),
			tx.Owners(func(netip.Addr, Key) error { return nil }),
			tx.Freed(func(netip.Addr) error { return nil }),
			tx.Settings("", func(string, string) error { return nil }))
	})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *Tx) error {
		if _, err := tx.Release(key(1)); err != nil {
			return err
		}
		if err := tx.DeleteEndpoint(key(1)); err != nil {
			return err
		}
		if err := tx.PutEndpoint(endpoint(500)); err != nil {
			return err
		}
		blocks, err := tx.Blocks()
		if err != nil || len(blocks) == 0 {
			return err
		}
		a, err := tx.TakeFreed(func(netip.Addr) bool { return true })
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil || !blocks[0].CIDR.Contains(a) {
			return err
		}
		if _, err := tx.Owner(a); err == nil {
			return nil
		}
		return tx.Hold(key(500), a, blocks[0].CIDR)
	})
	if errors.Is(err, ErrReadOnly) { // it was opened for reading
		return nil
	}
	return err
}

// damaged opens a file that may be broken, in both ways, and uses it. What is refused must be refused as corrupt and
// left as it was. It tells whether it was refused.
func damaged(t testing.TB, dir string, data []byte) bool {
	t.Helper()
	path := filepath.Join(dir, fileName)
	write(t, path, data)
	refused := false
	for _, open := range []func(context.Context, string, Options) (*DB, error){OpenReadOnly, Open} {
		db, err := open(context.Background(), dir, Options{BootIDFile: filepath.Join(dir, "boot_id")})
		if err == nil {
			err = errors.Join(use(db), db.Close())
		}
		if err == nil {
			continue
		}
		refused = true
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrVersion) {
			t.Fatalf("no sentinel: %v", err)
		}
		if !bytes.Equal(read(t, path), data) {
			t.Fatalf("the file was changed though it was refused: %v", err)
		}
	}
	return refused
}

// good is a database of many pages, with the boot id beside it.
func good(t testing.TB, endpoints int) (dir string, data []byte) {
	t.Helper()
	dir = t.TempDir()
	write(t, filepath.Join(dir, "boot_id"), []byte("boot-1"))
	opts := Options{BootIDFile: filepath.Join(dir, "boot_id")}
	fill(t, dir, opts, endpoints)
	update(t, dir, opts, func(tx *Tx) error { _, err := tx.Release(key(5)); return err })
	return dir, read(t, filepath.Join(dir, fileName))
}

func TestDamagedFile(t *testing.T) {
	dir, data := good(t, 100)
	page := os.Getpagesize()
	if damaged(t, dir, data) {
		t.Fatal("the good one was refused")
	}
	random := rand.New(rand.NewPCG(1, 2))
	garbage := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	must := func(name string, data []byte) {
		t.Helper()
		if !damaged(t, dir, data) {
			t.Errorf("%s: was accepted", name)
		}
	}
	must("empty", nil)
	must("text", []byte("hello\n"))
	must("garbage", garbage(8*page))
	must("zeros", make([]byte, 8*page))
	for _, n := range []int{1, 16, 80, page - 1, page, page + 1, 2 * page, 3 * page, 4*page - 1, 4 * page} {
		must(fmt.Sprint("cut at ", n), data[:n])
	}
	refused := 0
	for at := 0; at < len(data); at += page {
		for name, with := range map[string][]byte{"zeros": make([]byte, page), "random": garbage(page), "ones": bytes.Repeat([]byte{0xff}, page)} {
			bad := slices.Clone(data)
			copy(bad[at:], with)
			switch yes := damaged(t, dir, bad); {
			case yes:
				refused++
			case at < 2*page:
				t.Errorf("a head of %s was accepted", name)
			}
		}
		if at > 0 {
			damaged(t, dir, data[:at])
		}
	}
	if refused < len(data)/page {
		t.Errorf("only %d broken pages were refused", refused)
	}
	for _, name := range []string{"magic", "version", "checksum"} {
		at := map[string]int{"magic": 16, "version": 20, "checksum": 16 + 56}[name]
		bad := slices.Clone(data)
		bad[at]++
		bad[page+at]++
		must("wrong "+name, bad)
	}
	for range 300 { // single bits, also where only a value is hit
		bad := slices.Clone(data)
		bad[random.IntN(len(bad))] ^= 1 << random.IntN(8)
		damaged(t, dir, bad)
	}
}

// What garbage does not hit: pages that are well formed, and wrong.
func TestCraftedPages(t *testing.T) {
	dir, data := good(t, 100)
	page, ne := os.Getpagesize(), binary.NativeEndian
	list := data[pageHeader:] // of the head that counts
	if second := data[page+pageHeader:]; ne.Uint64(second[48:]) > ne.Uint64(list[48:]) {
		list = second
	}
	list = data[int(ne.Uint64(list[32:]))*page:]
	free := make(map[uint64]bool)
	for i := range int(ne.Uint16(list[10:])) {
		free[ne.Uint64(list[pageHeader+8*i:])] = true
	}
	branch := 0 // the endpoints' root
	for at := 2 * page; at < len(data); at += page {
		if id := uint64(at / page); ne.Uint16(data[at+8:]) == branchPage && ne.Uint64(data[at:]) == id && !free[id] {
			branch = at
		}
	}
	if branch == 0 {
		t.Fatal("no branch page")
	}
	first, second := branch+pageHeader, branch+pageHeader+element
	low, high := int(ne.Uint64(data[first+8:])), int(ne.Uint64(data[second+8:]))
	low, high = min(low, high), max(low, high)
	for name, change := range map[string]func([]byte){
		"a child twice":       func(b []byte) { copy(b[second+8:second+16], b[first+8:first+16]) },
		"itself as its child": func(b []byte) { ne.PutUint64(b[first+8:], uint64(branch/page)) },
		"a head as its child": func(b []byte) { ne.PutUint64(b[first+8:], 1) },
		"a child too far":     func(b []byte) { ne.PutUint64(b[first+8:], 1<<40) },
		"no children":         func(b []byte) { ne.PutUint16(b[branch+10:], 0) },
		"too many children":   func(b []byte) { ne.PutUint16(b[branch+10:], 0xffff) },
		"a key too far":       func(b []byte) { ne.PutUint32(b[first:], 1<<31) },
		"a key too long":      func(b []byte) { ne.PutUint32(b[first+4:], 1<<31) },
		"keys out of order":   func(b []byte) { copy(b[second:second+8], b[first:first+8]) },
		"a page too long":     func(b []byte) { ne.PutUint32(b[branch+12:], 1<<30) },
		"a page over another": func(b []byte) { ne.PutUint32(b[low*page+12:], uint32(high-low)) },
		"a key out of its page's range": func(b []byte) {
			child := b[ne.Uint64(b[first+8:])*uint64(page):]
			last := child[pageHeader+element*(int(ne.Uint16(child[10:]))-1):]
			last[ne.Uint32(last[4:])] = 0xff
		},
		"another type":   func(b []byte) { ne.PutUint16(b[branch+8:], leafPage) },
		"another number": func(b []byte) { ne.PutUint64(b[branch:], 2) },
	} {
		bad := slices.Clone(data)
		change(bad)
		if !damaged(t, dir, bad) {
			t.Errorf("%s: was accepted", name)
		}
	}
	place := len(data) - len(list)
	for name, change := range map[string]func(list []byte){
		"another type":      func(l []byte) { ne.PutUint16(l[8:], leafPage) },
		"a page in use":     func(l []byte) { ne.PutUint16(l[10:], 1); ne.PutUint64(l[pageHeader:], ne.Uint64(data[pageHeader+16:])) },
		"a head":            func(l []byte) { ne.PutUint16(l[10:], 1); ne.PutUint64(l[pageHeader:], 1) },
		"a page twice":      func(l []byte) { ne.PutUint16(l[10:], 2); copy(l[pageHeader+8:], l[pageHeader:pageHeader+8]) },
		"a page too far":    func(l []byte) { ne.PutUint16(l[10:], 1); ne.PutUint64(l[pageHeader:], 1<<40) },
		"longer than it is": func(l []byte) { ne.PutUint16(l[10:], 0xfffe) },
		"much longer":       func(l []byte) { ne.PutUint16(l[10:], 0xffff); ne.PutUint64(l[pageHeader:], 1<<61) },
	} {
		bad := slices.Clone(data)
		change(bad[place:])
		if !damaged(t, dir, bad) {
			t.Errorf("free list, %s: was accepted", name)
		}
	}
	for name, change := range map[string]func(head []byte){
		"a free list in a tree": func(h []byte) { ne.PutUint64(h[32:], ne.Uint64(h[16:])) },
		"page size 0":           func(h []byte) { ne.PutUint32(h[8:], 0) },
		"page size 3000":        func(h []byte) { ne.PutUint32(h[8:], 3000) },
		"a free list elsewhere": func(h []byte) { ne.PutUint64(h[32:], 2) },
		"too many pages":        func(h []byte) { ne.PutUint64(h[40:], 1<<50) },
		"too few pages":         func(h []byte) { ne.PutUint64(h[40:], 3) },
		"the last time":         func(h []byte) { ne.PutUint64(h[48:], ^uint64(0)) },
		"a root too far":        func(h []byte) { ne.PutUint64(h[16:], 1<<50) },
		"a root in the head":    func(h []byte) { ne.PutUint64(h[16:], 0) },
	} {
		bad := slices.Clone(data)
		for _, at := range []int{pageHeader, page + pageHeader} {
			h := bad[at : at+metaSize]
			change(h)
			sum := fnv.New64a()
			sum.Write(h[:metaSummed])
			ne.PutUint64(h[metaSummed:], sum.Sum64())
		}
		if !damaged(t, dir, bad) {
			t.Errorf("%s: was accepted", name)
		}
	}
}

// A broken head means that the last transaction may be missing. Within one boot its addresses are in use; after a
// reboot they are not.
func TestTornHead(t *testing.T) {
	dir, data := good(t, 5)
	page := os.Getpagesize()
	for head := range 2 {
		bad := slices.Clone(data)
		clear(bad[head*page : (head+1)*page])
		write(t, filepath.Join(dir, "boot_id"), []byte("boot-1"))
		write(t, filepath.Join(dir, bootName), []byte("boot-1"))
		if !damaged(t, dir, bad) {
			t.Errorf("head %d: was accepted in the same boot", head)
		}
		for _, open := range []func(context.Context, string, Options) (*DB, error){OpenReadOnly, Open} {
			if db, err := open(context.Background(), dir, Options{BootIDFile: filepath.Join(dir, "boot_id")}); !errors.Is(err, ErrCorrupt) {
				t.Errorf("head %d: %v, %v", head, db, err)
			}
		}
		write(t, filepath.Join(dir, "boot_id"), []byte("boot-2"))
		opts := Options{BootIDFile: filepath.Join(dir, "boot_id")}
		update(t, dir, opts, func(tx *Tx) error {
			if tx.Setting("node-id") != "7" {
				t.Errorf("head %d: settings are lost", head)
			}
			return tx.PutEndpoint(endpoint(1))
		})
		closeDB(t, mustOpen(t, dir, opts))
	}
}

// A crash of the machine may leave anything in the file, because nobody waits for the disk. All that was in it is dead.
func TestSpoiltByCrash(t *testing.T) {
	dir, data := good(t, 5)
	ctx, opts := context.Background(), Options{BootIDFile: filepath.Join(dir, "boot_id")}
	bad := slices.Clone(data)
	clear(bad[:2*os.Getpagesize()])
	for _, test := range []struct {
		name, boot, noted string
		starts            bool
	}{
		{"same boot", "boot-1", "boot-1", false},
		{"a boot that is not known", "boot-2", "", false},
		{"earlier boot", "boot-2", "boot-1", true},
	} {
		write(t, filepath.Join(dir, fileName), bad)
		write(t, filepath.Join(dir, bootName), []byte(test.noted))
		write(t, filepath.Join(dir, "boot_id"), []byte(test.boot))
		db, err := OpenReadOnly(ctx, dir, opts)
		if want := ErrCorrupt; !test.starts && !errors.Is(err, want) || test.starts && !errors.Is(err, ErrNoDatabase) {
			t.Errorf("%s, read-only: %v, %v", test.name, db, err)
		}
		if !test.starts {
			if db, err := Open(ctx, dir, opts); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: %v, %v", test.name, db, err)
			}
			continue
		}
		update(t, dir, opts, func(tx *Tx) error {
			if tx.Boot() != test.boot {
				t.Errorf("%s: new database of boot %s", test.name, tx.Boot())
			}
			return tx.PutEndpoint(endpoint(1))
		})
		kept, err := os.ReadFile(filepath.Join(dir, brokenName))
		if err != nil || !slices.Equal(kept, bad) {
			t.Errorf("%s: the broken file was not kept: %v", test.name, err)
		}
		write(t, filepath.Join(dir, fileName), bad)
		if db, err := Open(ctx, dir, opts); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s, spoilt again: %v, %v", test.name, db, err)
		}
	}
}

func TestNotAFile(t *testing.T) {
	for name, put := range map[string]func(string) error{
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"pipe":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"device":    func(p string) error { return os.Symlink("/dev/zero", p) },
	} {
		dir := t.TempDir()
		if err := put(filepath.Join(dir, fileName)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := Open(context.Background(), dir, Options{}); !errors.Is(err, ErrCorrupt) || strings.Count(err.Error(), ErrCorrupt.Error()) != 1 {
				t.Errorf("%s: %v", name, err)
			}
			if _, err := OpenReadOnly(context.Background(), dir, Options{}); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s, read-only: %v", name, err)
			}
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, nil)
	if _, err := Open(context.Background(), file, Options{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("a file for a directory: %v", err)
	}
}

// A creation that was killed leaves its file aside, which the next one replaces.
func TestKilledCreation(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "node.db.new"), []byte("half"))
	closeDB(t, mustOpen(t, dir, Options{}))
	if left, _ := filepath.Glob(filepath.Join(dir, "*.new")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

// tmpfs mounts a file system of a few pages; it needs root.
func tmpfs(t testing.TB, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("caracal-test", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	ctx := context.Background()
	full := func(t *testing.T, dir string) (more func()) {
		t.Helper()
		f, err := os.Create(filepath.Join(dir, "ballast"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 1<<12))
		}
		return func() { os.Remove(f.Name()) }
	}

	t.Run("creating", func(t *testing.T) {
		dir := tmpfs(t, "size=64k")
		more := full(t, dir)
		if _, err := Open(ctx, dir, Options{}); !errors.Is(err, ErrNoSpace) {
			t.Fatalf("%v, want ErrNoSpace", err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "node.db*")); len(left) > 1 {
			t.Errorf("left %q", left)
		}
		more()
		closeDB(t, mustOpen(t, dir, Options{}))
	})
	t.Run("writing", func(t *testing.T) {
		dir := tmpfs(t, "size=256k")
		fill(t, dir, Options{}, 5)
		more := full(t, dir)
		written, err := 5, error(nil)
		for err == nil && written < 10_000 {
			var db *DB
			if db, err = Open(ctx, dir, Options{}); err != nil {
				break
			}
			err = db.Update(func(tx *Tx) error { return tx.PutEndpoint(endpoint(written)) })
			if err == nil {
				written++
			}
			if after := db.View(func(tx *Tx) error { _, err := tx.Endpoint(key(0)); return err }); after != nil {
				t.Errorf("reading in the same opening: %v", after)
			}
			closeDB(t, db)
		}
		if !errors.Is(err, ErrNoSpace) {
			t.Fatalf("after %d: %v, want ErrNoSpace", written, err)
		}
		db, err := OpenReadOnly(ctx, dir, Options{})
		if err != nil {
			t.Fatalf("reading from a full disk: %v", err)
		}
		n := 0
		if err := db.View(func(tx *Tx) error { return tx.Endpoints(func(Endpoint) error { n++; return nil }) }); err != nil || n != written {
			t.Errorf("%d endpoints, %v, want %d", n, err, written)
		}
		closeDB(t, db)
		more()
		update(t, dir, Options{}, func(tx *Tx) error { return tx.PutEndpoint(endpoint(written)) })
	})
}

func TestReadOnlyMount(t *testing.T) {
	ctx, dir := context.Background(), tmpfs(t, "size=1m")
	fill(t, dir, Options{}, 5)
	remount := func() {
		t.Helper()
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount()
	if _, err := Open(ctx, dir, Options{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("open: %v", err)
	}
	if _, err := Open(ctx, filepath.Join(dir, "new"), Options{}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("create: %v", err)
	}
	if _, err := LockNode(ctx, filepath.Join(dir, "new")); err == nil {
		t.Error("locked")
	}
	if _, err := TryLock(dir, "other"); !errors.Is(err, ErrReadOnly) {
		t.Errorf("lock: %v", err)
	}
	read := func() {
		t.Helper()
		db, err := OpenReadOnly(ctx, dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer closeDB(t, db)
		if err := use(db); err != nil {
			t.Error(err)
		}
	}
	read()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "node.db.lock")); err != nil {
		t.Fatal(err)
	}
	remount()
	read()
}

func FuzzParseKey(f *testing.F) {
	for _, s := range []string{"net/c0/eth0", "//", "a/b/c/d", "", "a/b/\xff", "a/\x00/c", "a/b/c\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseKey(s)
		if err != nil {
			return
		}
		if k.String() != s || k.check() != nil {
			t.Fatalf("%q became %q", s, k)
		}
		data, err := json.Marshal(k)
		var again Key
		if err := errors.Join(err, json.Unmarshal(data, &again)); err != nil || again != k {
			t.Fatalf("%q became %q as JSON, %v", k, again, err)
		}
	})
}

func FuzzEndpointJSON(f *testing.F) {
	for i := range 2 {
		data, err := json.Marshal(endpoint(i))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"network":"a","containerID":"b","ifName":"c","addresses":["fe80::1%eth0","::ffff:1.2.3.4",""],"created":"0001-01-01T00:00:00Z"}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		var e Endpoint
		if err := decode(data, &e); err != nil {
			if err := classify("x", err); !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if e.Key.check() != nil || len(e.HostIfName) > 1000 || len(e.Key.String()) > 1000 {
			return
		}
		db := mustOpen(t, dir, Options{})
		defer closeDB(t, db)
		giveUp := errors.New("give up")
		err := db.Update(func(tx *Tx) error {
			if err := tx.PutEndpoint(e); err != nil {
				return err
			}
			got, err := tx.Endpoint(e.Key)
			if err != nil {
				t.Fatal(err)
			}
			want, _ := json.Marshal(e)
			have, _ := json.Marshal(got)
			if d := cmp.Diff(string(want), string(have)); d != "" {
				t.Fatal(d)
			}
			if e.HostIfName != "" {
				if by, err := tx.EndpointByHostIfName(e.HostIfName); err != nil || by.Key != e.Key {
					t.Fatalf("by host interface: %v, %v", by.Key, err)
				}
			}
			if err := tx.DeleteEndpoint(e.Key); err != nil {
				t.Fatal(err)
			}
			return giveUp
		})
		if !errors.Is(err, giveUp) {
			t.Fatal(err)
		}
	})
}

// FuzzOpen changes bytes of a good database, and mends the heads' checksums so that it is looked at behind them.
func FuzzOpen(f *testing.F) {
	dir, data := good(f, 12)
	page := os.Getpagesize()
	f.Add([]byte{})
	f.Add(data)
	f.Add(data[:3*page])
	random := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		bad := slices.Clone(data)
		for range 1 + random.IntN(4) {
			at := random.IntN(len(bad)/page)*page + random.IntN(200) // headers and elements are where it hurts
			bad[at] = []byte{0, 1, 0x7f, 0x80, 0xff, byte(random.Uint32())}[random.IntN(6)]
		}
		f.Add(bad)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<20 {
			return
		}
		data = slices.Clone(data)
		for _, head := range []int{0, page} {
			if b := data[min(head+16, len(data)):]; len(b) >= 64 {
				sum := fnv.New64a()
				sum.Write(b[:56])
				binary.NativeEndian.PutUint64(b[56:], sum.Sum64())
			}
		}
		damaged(t, dir, data)
	})
}

func BenchmarkOpenAndPutEndpoint(b *testing.B) {
	for _, n := range []int{10, 500} {
		b.Run(fmt.Sprint(n, "-endpoints"), func(b *testing.B) {
			dir := b.TempDir()
			fill(b, dir, Options{}, n)
			for b.Loop() {
				update(b, dir, Options{}, func(tx *Tx) error { return tx.PutEndpoint(endpoint(n)) })
			}
		})
	}
}
