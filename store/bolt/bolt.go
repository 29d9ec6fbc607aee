// Package bolt keeps a store in a file of one machine, store.db. It is opened for one operation and closed again, never
// held, so that plugin, agent and CLI work side by side.
package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/caracal-net/caracal/store"
)

const (
	FileName      = "store.db" // in its directory
	schemaVersion = 1
)

// Options say how a store is opened. The zero value is good.
type Options struct {
	Prefix  string        // before every key; "": store.DefaultPrefix
	Wait    time.Duration // for other processes to close the file; 0: 30 s
	History int           // changes that a watch can begin from; 0: 1000
}

// Store is a store in a file. Of a process that has it open nothing is held but its watches.
type Store struct {
	path    string
	space   store.Space
	wait    time.Duration
	history int

	open  context.Context // until Close
	close context.CancelFunc
}

var _ store.Store = (*Store)(nil)

// Open makes a store of <dir>/store.db. Nothing is touched yet: the file and dir are made by the first change, and until
// then the store is an empty one.
func Open(dir string, opts Options) (*Store, error) {
	space, err := store.NewSpace(opts.Prefix)
	if err != nil {
		return nil, fmt.Errorf("prefix of the store: %w", err)
	}
	s := &Store{path: filepath.Join(dir, FileName), space: space, wait: opts.Wait, history: opts.History}
	s.open, s.close = context.WithCancel(context.Background())
	if s.wait == 0 {
		s.wait = 30 * time.Second
	}
	if s.history == 0 {
		s.history = 1000
	}
	return s, nil
}

// Close ends the store's watches.
func (s *Store) Close() error {
	s.close()
	return nil
}

// Get returns a key.
func (s *Store) Get(ctx context.Context, key string) (kv store.KV, err error) {
	if err := store.CheckKey(key); err != nil {
		return store.KV{}, err
	}
	err = s.view(ctx, func(tx *tx) error {
		value, revision := tx.get(s.space.Full(key))
		if revision == 0 {
			return missing(key)
		}
		kv = store.KV{Key: key, Value: value, Revision: revision}
		return nil
	})
	if errors.Is(err, errNoFile) {
		err = missing(key)
	}
	return kv, err
}

// List returns the keys that begin with prefix.
func (s *Store) List(ctx context.Context, prefix string) (kvs []store.KV, at store.Revision, err error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, 0, err
	}
	full := []byte(s.space.Covers(prefix))
	err = s.view(ctx, func(tx *tx) error {
		at = tx.revision()
		c := tx.keys.Cursor()
		for k, v := c.Seek(full); k != nil && bytes.HasPrefix(k, full); k, v = c.Next() {
			value, revision, err := record(v)
			if err != nil {
				return fmt.Errorf("key %s: %w", k, err)
			}
			kvs = append(kvs, store.KV{Key: s.space.Key(string(k)), Value: value, Revision: revision})
		}
		return nil
	})
	if err != nil && !errors.Is(err, errNoFile) {
		return nil, 0, err
	}
	return kvs, at, nil
}

// Create writes a key that is not there.
func (s *Store) Create(ctx context.Context, key string, value []byte) (store.Revision, error) {
	return s.write(ctx, key, value, func(there store.Revision) error {
		if there != 0 {
			return fmt.Errorf("%s: %w", key, store.ErrExists)
		}
		return nil
	})
}

// Update writes a key that is at revision was.
func (s *Store) Update(ctx context.Context, key string, value []byte, was store.Revision) (store.Revision, error) {
	if err := store.CheckRevision(was); err != nil {
		return 0, err
	}
	return s.write(ctx, key, value, func(there store.Revision) error { return compare(key, there, was) })
}

// compare says whether a key at revision there may be changed by somebody who saw it at was.
func compare(key string, there, was store.Revision) error {
	switch {
	case was == 0 || there == was:
		return nil
	case there == 0:
		return missing(key)
	}
	return fmt.Errorf("%s: %w (it is at revision %d, not %d)", key, store.ErrConflict, there, was)
}

func missing(key string) error { return fmt.Errorf("%s: %w", key, store.ErrNotFound) }

func (s *Store) write(ctx context.Context, key string, value []byte, may func(there store.Revision) error) (at store.Revision, err error) {
	if err := store.CheckWrite(key, value); err != nil {
		return 0, err
	}
	full := s.space.Full(key)
	err = s.update(ctx, func(tx *tx) error {
		_, there := tx.get(full)
		if err := may(there); err != nil {
			return err
		}
		at = tx.revision() + 1
		b := binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(value)), uint64(at))
		if err := tx.keys.Put([]byte(full), append(b, value...)); err != nil {
			return err
		}
		return tx.note(at, full, value, false, s.history)
	})
	if err != nil {
		return 0, err
	}
	return at, nil
}

// Delete removes a key that is at revision was.
func (s *Store) Delete(ctx context.Context, key string, was store.Revision) error {
	if err := errors.Join(store.CheckKey(key), store.CheckRevision(was)); err != nil {
		return err
	}
	full := s.space.Full(key)
	return s.update(ctx, func(tx *tx) error {
		_, there := tx.get(full)
		if there == 0 {
			return missing(key)
		}
		if err := compare(key, there, was); err != nil {
			return err
		}
		if err := tx.keys.Delete([]byte(full)); err != nil {
			return err
		}
		return tx.note(tx.revision()+1, full, nil, true, s.history)
	})
}

// errNoFile says that the store was never written: it is empty.
var errNoFile = errors.New("no file yet")

// view runs fn on a consistent view. errNoFile.
func (s *Store) view(ctx context.Context, fn func(*tx) error) error {
	return s.run(ctx, false, fn)
}

// update runs fn in one transaction that is on the disk when update returns nil. An error of fn changes nothing.
func (s *Store) update(ctx context.Context, fn func(*tx) error) error {
	return s.run(ctx, true, fn)
}

func (s *Store) run(ctx context.Context, write bool, fn func(*tx) error) error {
	if s.open.Err() != nil {
		return store.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if write {
		if err := os.MkdirAll(filepath.Dir(s.path), 0o700); err != nil {
			return classify(s.path, err)
		}
	}
	turn, err := s.lock(ctx, write)
	if errors.Is(err, os.ErrNotExist) && !write {
		return errNoFile
	}
	if err != nil {
		return err
	}
	defer turn.Close()
	if _, err := os.Stat(s.path); errors.Is(err, os.ErrNotExist) {
		if !write {
			return errNoFile
		}
		if err := create(s.path); err != nil {
			return classify(s.path, err)
		}
	}
	f, err := open(s.path, write)
	if err != nil {
		return classify(s.path, err)
	}
	own, err := runTx(f, write, fn)
	err = errors.Join(err, f.Close())
	if own != nil && err == nil {
		return own
	}
	return classify(s.path, err)
}

// tx is one transaction on the buckets.
type tx struct{ meta, keys, log *bbolt.Bucket }

// Buckets. Numbers are 8 bytes, big-endian, so that they sort.
var (
	bucketMeta   = []byte("meta") // of the names below
	bucketKeys   = []byte("keys") // key -> revision, value
	bucketLog    = []byte("log")  // revision -> change
	nameVersion  = []byte("version")
	nameRevision = []byte("revision")  // of the last change
	nameGone     = []byte("compacted") // the last change that is no longer in the log
	nameLogSize  = []byte("logsize")   // bytes
)

// maxLog bounds the log in bytes: large values make it shorter.
const maxLog = 32 << 20

func number(b *bbolt.Bucket, name []byte) uint64 {
	v := b.Get(name)
	if len(v) != 8 {
		panic(invalid("%s is not a number", name))
	}
	return binary.BigEndian.Uint64(v)
}

func putNumber(b *bbolt.Bucket, name []byte, n uint64) error {
	return b.Put(name, binary.BigEndian.AppendUint64(nil, n))
}

func (t *tx) revision() store.Revision  { return store.Revision(number(t.meta, nameRevision)) }
func (t *tx) compacted() store.Revision { return store.Revision(number(t.meta, nameGone)) }

// get reads a key of the file; revision 0 when it is not there.
func (t *tx) get(full string) ([]byte, store.Revision) {
	v := t.keys.Get([]byte(full))
	if v == nil {
		return nil, 0
	}
	value, revision, err := record(v)
	if err != nil {
		panic(err)
	}
	return value, revision
}

// record takes a revision and a value apart. The value is a copy.
func record(v []byte) ([]byte, store.Revision, error) {
	if len(v) < 8 || binary.BigEndian.Uint64(v) == 0 {
		return nil, 0, invalid("a record of %d bytes without a revision", len(v))
	}
	return append([]byte{}, v[8:]...), store.Revision(binary.BigEndian.Uint64(v)), nil
}

// note makes a change the last one and forgets the oldest.
func (t *tx) note(at store.Revision, full string, value []byte, deleted bool, history int) error {
	size := number(t.meta, nameLogSize)
	c := change{key: full, value: value, deleted: deleted}.marshal()
	if err := t.log.Put(binary.BigEndian.AppendUint64(nil, uint64(at)), c); err != nil {
		return err
	}
	size += uint64(len(c))
	gone := t.compacted()
	for cur := t.log.Cursor(); ; {
		k, v := cur.First()
		if k == nil || len(k) != 8 {
			return invalid("an empty log")
		}
		if int64(at-gone) <= int64(history) && size <= maxLog {
			break
		}
		gone = store.Revision(binary.BigEndian.Uint64(k))
		size -= uint64(len(v))
		if err := cur.Delete(); err != nil {
			return err
		}
	}
	return errors.Join(putNumber(t.meta, nameRevision, uint64(at)), putNumber(t.meta, nameGone, uint64(gone)),
		putNumber(t.meta, nameLogSize, size))
}

// change is what the log keeps of one.
type change struct {
	key     string
	value   []byte
	deleted bool
}

func (c change) marshal() []byte {
	kind := byte('=')
	if c.deleted {
		kind = '-'
	}
	b := append([]byte{kind}, c.key...)
	return append(append(b, 0), c.value...) // no key has a zero in it
}

func (c *change) unmarshal(b []byte) error {
	key, value, ok := bytes.Cut(b, []byte{0})
	if !ok || len(key) < 2 || !strings.ContainsRune("=-", rune(key[0])) {
		return invalid("a change that can't be read")
	}
	*c = change{key: string(key[1:]), deleted: key[0] == '-'}
	if !c.deleted {
		c.value = append([]byte{}, value...)
	}
	return nil
}
