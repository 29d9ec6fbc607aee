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
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// SchemaVersion is the version of the database's layout.
const SchemaVersion = 1

// BootIDFile is where the kernel says which boot this is.
const BootIDFile = "/proc/sys/kernel/random/boot_id"

const fileName = "node.db"

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

func (o Options) wait() time.Duration {
	if o.Wait == 0 {
		return 30 * time.Second
	}
	return o.Wait
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
	return strings.TrimSpace(string(b)), nil
}

// DB is an open node database. Close it soon: others wait.
type DB struct {
	bolt *bbolt.DB
	path string
	turn *Lock // whose turn it is to open the file: the library would poll for that every 50 ms
}

// Open opens <dir>/node.db for writing and creates it (and dir) when it is not there. When the machine was booted
// since it was written, all that earlier boots left is provably dead: endpoints and the addresses they held are
// released in one transaction. Claimed blocks and settings stay.
func Open(ctx context.Context, dir string, opts Options) (*DB, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, classify(filepath.Join(dir, fileName), err)
	}
	boot, err := opts.BootID()
	if err != nil {
		return nil, err
	}
	db, err := open(ctx, dir, opts, false)
	if err != nil {
		return nil, err
	}
	if err := db.fence(boot); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// OpenReadOnly opens <dir>/node.db for reading beside other readers. It changes nothing, not even after a reboot.
// ErrNoDatabase when there is none.
func OpenReadOnly(ctx context.Context, dir string, opts Options) (*DB, error) {
	db, err := open(ctx, dir, opts, true)
	if err != nil {
		return nil, err
	}
	err = db.View(func(tx *Tx) error {
		_, err := tx.version()
		return err
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func open(ctx context.Context, dir string, opts Options, readOnly bool) (*DB, error) {
	path := filepath.Join(dir, fileName)
	wait := opts.wait()
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, max(time.Millisecond, time.Until(deadline)))
	}
	if readOnly {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w: no pod was added on this node yet, or the state directory is another one", path, ErrNoDatabase)
		}
	}
	how := unix.LOCK_EX
	if readOnly {
		how = unix.LOCK_SH
	}
	turn, err := lockFile(ctx, path+".lock", how, wait)
	if err != nil {
		return nil, err
	}
	// The free list is rebuilt when the file is opened: it is small, and writing it costs a page a transaction.
	bolt, err := openBolt(path, &bbolt.Options{Timeout: wait, ReadOnly: readOnly, NoFreelistSync: true, FreelistType: bbolt.FreelistArrayType})
	if err != nil {
		turn.Unlock()
		return nil, classify(path, err)
	}
	db := &DB{bolt: bolt, path: path, turn: turn}
	if err := db.whole(); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// openBolt turns the library's panic on a corrupt file into an error.
func openBolt(path string, o *bbolt.Options) (db *bbolt.DB, err error) {
	defer recoverCorrupt(&err)
	return bbolt.Open(path, 0o600, o)
}

// recoverCorrupt turns a panic or a fault in mapped memory into ErrInvalid, which classify names ErrCorrupt.
func recoverCorrupt(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", bolterrors.ErrInvalid, r)
	}
}

// whole checks that the file is as long as its header says, before anything behind its end is touched.
func (db *DB) whole() error {
	return db.View(func(tx *Tx) error {
		st, err := os.Stat(db.path)
		if err != nil {
			return err
		}
		if st.Size() < tx.bolt.Size() {
			return fmt.Errorf("%d bytes long instead of %d: %w", st.Size(), tx.bolt.Size(), bolterrors.ErrInvalid)
		}
		return nil
	})
}

// Close closes the database.
func (db *DB) Close() error {
	defer db.turn.Unlock()
	if err := db.bolt.Close(); err != nil {
		return classify(db.path, err)
	}
	return nil
}

// Update runs fn in one transaction that is on disk when Update returns nil. An error of fn changes nothing and is
// returned as it is.
func (db *DB) Update(fn func(*Tx) error) error { return db.run(db.bolt.Update, fn) }

// View runs fn on a consistent view.
func (db *DB) View(fn func(*Tx) error) error { return db.run(db.bolt.View, fn) }

func (db *DB) run(begin func(func(*bbolt.Tx) error) error, fn func(*Tx) error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	var own error
	err = func() (err error) {
		defer recoverCorrupt(&err)
		return begin(func(tx *bbolt.Tx) error {
			own = fn(&Tx{bolt: tx})
			return own
		})
	}()
	if err != nil && own != nil && !errors.Is(own, bolterrors.ErrInvalid) {
		return own
	}
	return classify(db.path, err)
}

// fence makes a new database and releases what belongs to earlier boots. Only then does it write.
func (db *DB) fence(boot string) error {
	fresh := false
	err := db.View(func(tx *Tx) error {
		version, err := tx.version()
		fresh = version == 0 || tx.Boot() != boot
		return err
	})
	if err != nil || !fresh {
		return err
	}
	return db.Update(func(tx *Tx) error {
		for _, b := range buckets {
			if _, err := tx.bolt.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		if err := tx.releaseAll(); err != nil {
			return err
		}
		if err := tx.bolt.Bucket(bucketMeta).Put([]byte("version"), []byte(strconv.Itoa(SchemaVersion))); err != nil {
			return err
		}
		return tx.bolt.Bucket(bucketMeta).Put([]byte("boot"), []byte(boot))
	})
}
