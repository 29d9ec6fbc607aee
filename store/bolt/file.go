package bolt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
)

// file is the open file.
type file struct {
	path   string
	file   *os.File // the library's
	bolt   *bbolt.DB
	broken bool // the library gave up in the middle of something and may hold its own locks
}

// create makes a file aside and moves it into its place, so that there never is half of one.
func create(path string) error {
	aside := path + ".new"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	defer os.Remove(aside)
	db, err := bbolt.Open(aside, 0o600, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, b := range [][]byte{bucketMeta, bucketKeys, bucketLog} {
			if _, err := tx.CreateBucket(b); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		return errors.Join(putNumber(meta, nameVersion, schemaVersion), putNumber(meta, nameRevision, 0),
			putNumber(meta, nameGone, 0), putNumber(meta, nameLogSize, 0))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := os.Rename(aside, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func (f *file) open(write bool) error {
	f.broken = true // until proven otherwise
	err := guarded(func() (err error) {
		f.bolt, err = bbolt.Open(f.path, 0o600, &bbolt.Options{
			Timeout:      time.Second, // the turn is ours, who else has it open is not of this program
			ReadOnly:     !write,
			FreelistType: bbolt.FreelistArrayType,
			OpenFile:     f.openFile,
		})
		return err
	})
	if err != nil {
		return errors.Join(err, f.close())
	}
	f.broken = false
	return nil
}

// openFile hands the library a file that is one: it would make a new store of an empty file.
func (f *file) openFile(path string, flag int, _ os.FileMode) (*os.File, error) {
	file, err := os.OpenFile(path, flag&^os.O_CREATE|unix.O_NONBLOCK, 0) // not blocking: it may be a pipe
	if errors.Is(err, unix.EISDIR) {
		return nil, invalid("not a file but a directory")
	}
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = invalid("not a file but %s", st.Mode().Type())
	case st.Size() == 0:
		err = invalid("it is empty")
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	f.file = file
	return file, nil
}

// close closes the file. What the library can't close any more is let go of: its mapped memory stays, and would keep the
// lock with it.
func (f *file) close() error {
	if !f.broken {
		return f.bolt.Close()
	}
	if f.file == nil {
		return nil
	}
	err := unix.Flock(int(f.file.Fd()), unix.LOCK_UN)
	if errors.Is(err, unix.EBADF) { // the library has closed it
		return nil
	}
	return errors.Join(err, f.file.Close())
}

// run runs fn in a transaction. own is fn's error, err the library's or that of a file that can't be read.
func (f *file) run(write bool, fn func(*tx) error) (own, err error) {
	begin := f.bolt.View
	if write {
		begin = f.bolt.Update
	}
	f.broken = true // until proven otherwise
	err = guarded(func() error {
		err := begin(func(b *bbolt.Tx) error {
			t, err := f.check(b)
			if err != nil {
				return err
			}
			own = fn(t)
			return own
		})
		f.broken = false
		return err
	})
	if own != nil && !errors.Is(own, bolterrors.ErrInvalid) {
		return own, nil
	}
	return nil, err
}

// check makes sure that this is a store of a version that this program knows, and all of it.
func (f *file) check(b *bbolt.Tx) (*tx, error) {
	st, err := f.file.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() < b.Size() {
		return nil, invalid("%d bytes long, not %d", st.Size(), b.Size())
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

// guarded runs fn and turns what the library does about a file that it can't read (it panics, or faults where the disk
// fails under mapped memory) into ErrInvalid, which classify names ErrCorrupt.
func guarded(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case error:
			err = invalid("%w", r)
		default:
			err = invalid("%v", r)
		}
	}()
	return fn()
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", bolterrors.ErrInvalid, fmt.Errorf(format, args...))
}

// classify gives an error its sentinel.
func classify(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrCorrupt, err)
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%s: %w: another program holds it open", path, store.ErrUnavailable)
	case is(err, unix.ENOSPC), is(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrNoSpace, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w (%w)", path, store.ErrDenied, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// is finds a system error also where the library kept only its text.
func is(err error, errno unix.Errno) bool {
	return errors.Is(err, errno) || strings.Contains(err.Error(), errno.Error())
}

// lock waits for this process's turn to open the file, beside other readers if it only reads. The turn is a lock on a
// file of its own, because the library would poll for the store's every 50 ms. Closing it ends the turn.
func (s *Store) lock(ctx context.Context, write bool) (*os.File, error) {
	path, flags, how := s.path+".lock", os.O_RDONLY, unix.LOCK_SH
	if write {
		flags, how = os.O_RDWR|os.O_CREATE, unix.LOCK_EX
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if errors.Is(err, fs.ErrNotExist) && !write {
		path = s.path // a copy that nobody writes
		f, err = os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, classify(path, err)
	}
	if err := flock(f, how|unix.LOCK_NB); err == nil {
		return f, nil
	} else if !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// The kernel's queue is fair and wakes the next one at once, but waits without a deadline: so on a goroutine.
	locked := make(chan error, 1)
	go func() { locked <- flock(f, how) }()
	timeout := time.NewTimer(s.wait)
	defer timeout.Stop()
	select {
	case err := <-locked:
		if err == nil {
			return f, nil
		}
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	case <-ctx.Done():
		err = ctx.Err()
	case <-timeout.C:
		err = fmt.Errorf("%s: %w: another process has held it for %s", path, store.ErrUnavailable, s.wait)
	}
	go func() {
		<-locked
		f.Close()
	}()
	return nil, err
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
