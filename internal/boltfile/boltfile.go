// Package boltfile opens bbolt's files so that whatever is in them, or becomes of the disk below, ends in an error: the
// library panics at what it can't read, faults where mapped memory can't be read, and may hold its locks afterwards.
package boltfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/turn"
)

// Options say how a file is opened.
type Options struct {
	Timeout  time.Duration        // for another program to close it; 0: none
	ReadOnly bool                 // beside other readers
	NoSync   bool                 // a transaction is not waited for to reach the disk
	Check    func(*os.File) error // looks at the file before the library does; ErrInvalid when it is none
}

// File is an open file.
type File struct {
	file   *os.File // the library's
	bolt   *bbolt.DB
	broken bool // the library gave up in the middle of something and may hold its own locks
}

// Open opens an existing file. Errors are the library's, ErrInvalid among them, or the system's.
func Open(path string, o Options) (*File, error) {
	f := &File{}
	err := guarded(func() (err error) {
		f.bolt, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout:      o.Timeout,
			ReadOnly:     o.ReadOnly,
			NoSync:       o.NoSync,
			FreelistType: bbolt.FreelistArrayType, // kept in the file: to rebuild it every page would be read again
			OpenFile: func(path string, flag int, _ os.FileMode) (*os.File, error) {
				return f.open(path, flag, o.Check)
			},
		})
		return err
	}, nil)
	if err != nil {
		return nil, errors.Join(err, f.abandon())
	}
	return f, nil
}

// open hands the library a file that is one: it would make a new one, and a database of an empty one.
func (f *File) open(path string, flag int, check func(*os.File) error) (*os.File, error) {
	file, err := os.OpenFile(path, flag&^os.O_CREATE|unix.O_NONBLOCK, 0) // not blocking: it may be a pipe
	if errors.Is(err, unix.EISDIR) {
		return nil, Invalid("not a file but a directory")
	}
	if err != nil {
		return nil, err
	}
	if err := check(file); err != nil {
		file.Close()
		return nil, err
	}
	f.file = file
	return file, nil
}

// Size is the file's length in bytes.
func (f *File) Size() (int64, error) {
	st, err := f.file.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Close closes the file.
func (f *File) Close() error {
	if f.broken {
		return f.abandon()
	}
	return f.bolt.Close()
}

// abandon lets go of a file that the library can't close any more. Its mapped memory stays, and would keep the lock with
// it. It does nothing where the library has closed the file.
func (f *File) abandon() error {
	if f.file == nil {
		return nil
	}
	err := turn.Release(f.file)
	if errors.Is(err, unix.EBADF) {
		return nil
	}
	return errors.Join(err, f.file.Close())
}

// Run runs fn in a transaction. own is an error of fn's, which changes nothing; err is the library's, or fn's when it says
// that the file is ErrInvalid.
func (f *File) Run(write bool, fn func(*bbolt.Tx) error) (own, err error) {
	if f.broken {
		return nil, Invalid("it broke in an earlier transaction")
	}
	begin := f.bolt.View
	if write {
		begin = f.bolt.Update
	}
	inside := false
	f.broken = true // until proven otherwise
	err = guarded(func() error {
		err := begin(func(tx *bbolt.Tx) error {
			inside = true
			own = fn(tx)
			inside = false
			return own
		})
		f.broken = false
		return err
	}, &inside)
	if err != nil && own != nil && !errors.Is(own, bolterrors.ErrInvalid) {
		return own, nil
	}
	return nil, err
}

// Create makes a file aside and moves it into its place, so that there never is half of one. before, if not nil, runs when
// it is whole but not in its place yet.
func Create(path string, fill func(*bbolt.Tx) error, before func() error) error {
	aside := path + ".new"
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	defer os.Remove(aside)
	bolt, err := bbolt.Open(aside, 0o600, nil)
	if err != nil {
		return err
	}
	err = bolt.Update(fill)
	if err := errors.Join(err, bolt.Close()); err != nil {
		return err
	}
	if before != nil {
		if err := before(); err != nil {
			return err
		}
	}
	if err := os.Rename(aside, path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes what was renamed in a directory outlive the machine.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// Invalid says what is wrong with a file; it is the library's ErrInvalid.
func Invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %w", bolterrors.ErrInvalid, fmt.Errorf(format, args...))
}

// IsCorrupt tells whether an error says that a file can't be read.
func IsCorrupt(err error) bool {
	return errors.Is(err, bolterrors.ErrInvalid) || errors.Is(err, bolterrors.ErrChecksum) || errors.Is(err, bolterrors.ErrVersionMismatch)
}

// IsErrno finds a system error also where the library kept only its text.
func IsErrno(err error, errno unix.Errno) bool {
	return errors.Is(err, errno) || strings.Contains(err.Error(), errno.Error())
}

// guarded runs fn and turns what the library does about a file that it can't read, or a panic with ErrInvalid, into
// ErrInvalid. Any other panic of the caller's own is none of that: inside, if not nil, tells when the caller's code runs,
// and may be what calls the library.
func guarded(fn func() error, inside *bool) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		said, isError := r.(error)
		if isError && errors.Is(said, bolterrors.ErrInvalid) {
			err = said
			return
		}
		if _, fault := r.(interface{ Addr() uintptr }); !fault && inside != nil && *inside && !byLibrary() {
			panic(r)
		}
		err = Invalid("%v", r)
	}()
	return fn()
}

// byLibrary tells, while a panic is being recovered from, whether the library's code panicked.
func byLibrary() bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for panicked := false; ; {
		f, more := frames.Next()
		module, _, _ := strings.Cut(f.Function, "/")
		switch {
		case f.Function == "runtime.gopanic":
			panicked = true
		case panicked && strings.HasPrefix(f.Function, "go.etcd.io/bbolt"):
			return true
		case panicked && strings.HasPrefix(f.Function, "main."), panicked && module != f.Function && strings.Contains(module, "."):
			return false // neither the library's nor the standard library's
		}
		if !more {
			return false
		}
	}
}
