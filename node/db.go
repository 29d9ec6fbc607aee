// Package node is node.db, what one node knows of itself: its endpoints, its addresses, its settings. It is opened for
// one operation and closed again, never held, so that plugin, agent and CLI work side by side.
package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/caracal-net/caracal/internal/boltfile"
)

// SchemaVersion is the version of the database's layout.
const SchemaVersion = 1

// BootIDFile is where the kernel says which boot this is.
const BootIDFile = "/proc/sys/kernel/random/boot_id"

const (
	fileName   = "node.db"
	bootName   = "node.boot"   // which boot the database was first written in, beside it
	brokenName = "node.broken" // one that a crash of the machine left unreadable
)

// Buckets. Keys are text, values JSON unless said otherwise.
var (
	bucketMeta      = []byte("meta")      // version, boot: plain text
	bucketSettings  = []byte("settings")  // name -> plain text
	bucketEndpoints = []byte("endpoints") // Key -> Endpoint
	bucketHostIfs   = []byte("hostifs")   // host interface -> Key, plain text
	bucketBlocks    = []byte("blocks")    // block -> Block
	bucketOwners    = []byte("owners")    // address -> Key, plain text
	bucketHoldings  = []byte("holdings")  // Key -> list of addresses
	bucketFreed     = []byte("freed")     // sequence number, 20 digits -> address, plain text: longest free first
	buckets         = [][]byte{bucketMeta, bucketSettings, bucketEndpoints, bucketHostIfs, bucketBlocks, bucketOwners, bucketHoldings, bucketFreed}
)

// Options say how a database is opened.
type Options struct {
	Wait       time.Duration // for another process to close it; 0: 30 s
	BootIDFile string        // "": BootIDFile; a simulated node has its own
}

func (o Options) wait(ctx context.Context) time.Duration {
	wait := o.Wait
	if wait == 0 {
		wait = 30 * time.Second
	}
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, max(time.Millisecond, time.Until(deadline)))
	}
	return wait
}

// BootID reads which boot this is.
func (o Options) BootID() (string, error) {
	file := o.BootIDFile
	if file == "" {
		file = BootIDFile
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if id == "" {
		return "", fmt.Errorf("read boot id: %s is empty", file)
	}
	return id, nil
}

// DB is an open node database. Close it soon: others wait.
type DB struct {
	file *boltfile.File
	path string
	turn *Lock // whose turn it is to open the file: the library would poll for that every 50 ms
	torn bool  // the last transaction may be missing
}

// Open opens <dir>/node.db for writing and creates it (and dir) when it is not there. When the machine was booted
// since it was written, all that earlier boots left is provably dead: endpoints and the addresses they held are
// released in one transaction. Claimed blocks and settings stay.
//
// A transaction outlives this process, but is not waited for to reach the disk: when the machine crashes its pods die, and
// nothing in the database is worth an ADD's wait for it. A file that such a crash spoilt, which the boot id beside it
// proves, is moved to node.broken and a new one begun.
func Open(ctx context.Context, dir string, opts Options) (*DB, error) {
	path := filepath.Join(dir, fileName)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, classify(path, err)
	}
	boot, err := opts.BootID()
	if err != nil {
		return nil, err
	}
	wait := opts.wait(ctx)
	turn, err := lockFile(ctx, path+".lock", true, wait)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := create(path, boot); err != nil {
			turn.Unlock()
			return nil, classify(path, err)
		}
	}
	db, err := openFenced(path, boot, turn, wait)
	if errors.Is(err, ErrCorrupt) && earlier(dir, boot) {
		err = os.Rename(path, filepath.Join(dir, brokenName))
		if err == nil {
			err = create(path, boot)
		}
		if err == nil {
			db, err = openFenced(path, boot, turn, wait)
		}
	}
	if err != nil {
		turn.Unlock()
		return nil, classify(path, err)
	}
	return db, nil
}

// openFenced opens a database for writing and releases what belongs to earlier boots. turn stays the caller's on an error.
func openFenced(path, boot string, turn *Lock, wait time.Duration) (*DB, error) {
	db, err := open(path, turn, wait, false)
	if err != nil {
		return nil, err
	}
	if err := db.fence(boot); err != nil {
		return nil, errors.Join(err, classify(path, db.file.Close()))
	}
	return db, nil
}

// earlier tells whether it is known that a database was last written in an earlier boot.
func earlier(dir, boot string) bool {
	b, err := os.ReadFile(filepath.Join(dir, bootName))
	return err == nil && len(b) > 0 && string(b) != boot
}

// OpenReadOnly opens <dir>/node.db for reading beside other readers. It changes nothing, not even after a reboot, and
// works where nothing can be written. ErrNoDatabase when there is none.
func OpenReadOnly(ctx context.Context, dir string, opts Options) (*DB, error) {
	path := filepath.Join(dir, fileName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: no pod was added on this node yet, or the state directory is another one", path, ErrNoDatabase)
	}
	queue := path + ".lock"
	if _, err := os.Stat(queue); errors.Is(err, fs.ErrNotExist) {
		queue = path // a copy that nobody writes
	}
	wait := opts.wait(ctx)
	turn, err := lockFile(ctx, queue, false, wait)
	if err != nil {
		return nil, err
	}
	db, err := open(path, turn, wait, true)
	if err != nil {
		turn.Unlock()
		if boot, berr := opts.BootID(); errors.Is(err, ErrCorrupt) && berr == nil && earlier(dir, boot) {
			return nil, fmt.Errorf("%w: it was spoilt when the machine went down, and the next ADD begins a new one (%w)", ErrNoDatabase, err)
		}
		return nil, err
	}
	err = db.View(func(tx *Tx) error {
		if err := tx.check(); err != nil {
			return err
		}
		if db.torn {
			return errTorn
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// Changed tells when <dir>/node.db was last written; the zero time when there is none. It takes no lock.
func Changed(dir string) (time.Time, error) {
	st, err := os.Stat(filepath.Join(dir, fileName))
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	return st.ModTime(), nil
}

// errTorn says that one of the file's two heads is broken. The older one still stands, but an address that was given
// out in the transaction after it would be given out again.
var errTorn = invalid("half of its head is broken, its last transaction may be missing")

// create makes a database.
func create(path, boot string) error {
	return boltfile.Create(path, func(tx *bbolt.Tx) error {
		for _, b := range buckets {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		return (&Tx{bolt: tx}).stamp(boot)
	}, func() error { return writeBoot(filepath.Dir(path), boot) })
}

// writeBoot notes, on disk, which boot a database is written in, before it is.
func writeBoot(dir, boot string) error {
	path := filepath.Join(dir, bootName)
	f, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	_, err = f.WriteString(boot)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return boltfile.SyncDir(dir)
}

// open opens an existing file. turn goes over to the database, unless there is an error.
func open(path string, turn *Lock, wait time.Duration, readOnly bool) (*DB, error) {
	db := &DB{path: path, turn: turn}
	var err error
	db.file, err = boltfile.Open(path, boltfile.Options{
		Timeout: wait, ReadOnly: readOnly, NoSync: true,
		Check: func(f *os.File) (err error) {
			db.torn, err = verify(f)
			return err
		},
	})
	if err != nil {
		return nil, classify(path, err)
	}
	return db, nil
}

// Close closes the database.
func (db *DB) Close() error {
	defer db.turn.Unlock()
	return classify(db.path, db.file.Close())
}

// Update runs fn in one transaction that outlives this process when Update returns nil. An error of fn changes nothing and
// is returned as it is.
func (db *DB) Update(fn func(*Tx) error) error { return db.run(true, fn) }

// View runs fn on a consistent view.
func (db *DB) View(fn func(*Tx) error) error { return db.run(false, fn) }

func (db *DB) run(write bool, fn func(*Tx) error) error {
	own, err := db.file.Run(write, func(tx *bbolt.Tx) error { return fn(&Tx{bolt: tx}) })
	if own != nil {
		return own
	}
	return classify(db.path, err)
}

// fence releases what belongs to earlier boots. Only then does it write.
func (db *DB) fence(boot string) error {
	same := false
	err := db.View(func(tx *Tx) error {
		same = tx.Boot() == boot
		return tx.check()
	})
	if err != nil {
		return err
	}
	if same {
		if db.torn {
			return classify(db.path, errTorn)
		}
		return nil
	}
	if err := writeBoot(filepath.Dir(db.path), boot); err != nil {
		return classify(db.path, err)
	}
	return db.Update(func(tx *Tx) error {
		if err := tx.releaseAll(); err != nil {
			return err
		}
		return tx.stamp(boot)
	})
}
