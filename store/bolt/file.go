package bolt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/boltfile"
	"github.com/caracal-net/caracal/internal/turn"
	"github.com/caracal-net/caracal/store"
)

// create makes the store's file.
func create(path string) error {
	return boltfile.Create(path, func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketMeta, bucketKeys, bucketLog} {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		return errors.Join(putNumber(meta, nameVersion, schemaVersion), putNumber(meta, nameRevision, 0),
			putNumber(meta, nameGone, 0), putNumber(meta, nameLogSize, 0))
	}, nil)
}

func open(path string, write bool) (*boltfile.File, error) {
	return boltfile.Open(path, boltfile.Options{
		Timeout:  time.Second, // the turn is ours, who else has it open is not of this program
		ReadOnly: !write,
		Check:    checkFile,
	})
}

func checkFile(f *os.File) error {
	st, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return invalid("not a file but %s", st.Mode().Type())
	case st.Size() == 0:
		return invalid("it is empty")
	}
	return nil
}

// runTx runs fn in a transaction. own is fn's error, err the library's or that of a file that can't be read.
func runTx(f *boltfile.File, write bool, fn func(*tx) error) (own, err error) {
	checked := false
	own, err = f.Run(write, func(b *bbolt.Tx) error {
		t, err := check(f, b)
		if err != nil {
			return err
		}
		checked = true
		return fn(t)
	})
	if !checked {
		return nil, errors.Join(own, err)
	}
	return own, err
}

// check makes sure that this is a store of a version that this program knows, and all of it.
func check(f *boltfile.File, b *bbolt.Tx) (*tx, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size < b.Size() {
		return nil, invalid("%d bytes long, not %d", size, b.Size())
	}
	t := &tx{meta: b.Bucket(bucketMeta), keys: b.Bucket(bucketKeys), log: b.Bucket(bucketLog)}
	if t.meta == nil || t.keys == nil || t.log == nil {
		return nil, invalid("it is no store")
	}
	if v := number(t.meta, nameVersion); v != schemaVersion {
		return nil, fmt.Errorf("version %d of a store, this program knows %d; use the program that wrote it", v, schemaVersion)
	}
	return t, nil
}

func invalid(format string, args ...any) error { return boltfile.Invalid(format, args...) }

// classify gives an error its sentinel.
func classify(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case boltfile.IsCorrupt(err):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrCorrupt, err)
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%s: %w: another program holds it open", path, store.ErrUnavailable)
	case boltfile.IsErrno(err, unix.ENOSPC), boltfile.IsErrno(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrNoSpace, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrDenied, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// lock waits for this process's turn to open the file, beside other readers if it only reads. The turn is a lock on a
// file of its own, because the library would poll for the store's every 50 ms. Closing it ends the turn.
func (s *Store) lock(ctx context.Context, write bool) (*os.File, error) {
	path := s.path + ".lock"
	f, err := turn.Wait(ctx, path, write, s.wait)
	if errors.Is(err, fs.ErrNotExist) && !write {
		path = s.path // a copy that nobody writes
		f, err = turn.Wait(ctx, path, write, s.wait)
	}
	switch {
	case err == nil:
		return f, nil
	case errors.Is(err, turn.ErrTimeout):
		return nil, fmt.Errorf("%s: %w: another process has held it for %s", path, store.ErrUnavailable, s.wait)
	case ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return nil, err
	}
	return nil, classify(path, err)
}
