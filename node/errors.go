package node

import (
	"errors"
	"fmt"
	"io/fs"

	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/boltfile"
	"github.com/caracal-net/caracal/internal/holder"
)

var (
	// ErrLocked says that another process held the database longer than the caller would wait.
	ErrLocked = errors.New("node database is locked")
	// ErrCorrupt says that the database can't be read. It is never overwritten: move it away and the next ADD starts
	// an empty one; addresses of pods that run then may be given out again, so restart them too.
	ErrCorrupt = errors.New("node database is corrupt; move it away to start an empty one, and restart this node's pods")
	// ErrReadOnly says that the database can't be written where it lies.
	ErrReadOnly = errors.New("node database can't be written; make its directory writable, or name another (state_dir in the conflist, --state-dir of caracald)")
	// ErrNoSpace says that the file system is full.
	ErrNoSpace = errors.New("no space left for the node database")
	// ErrVersion says that a newer Caracal wrote the database.
	ErrVersion = errors.New("node database has a newer schema")
	// ErrNotFound says that there is no such record.
	ErrNotFound = errors.New("no such record")
	// ErrNoDatabase says that this node has no database yet: no pod was added.
	ErrNoDatabase = errors.New("no node database")
)

// classify gives an error its sentinel.
func classify(path string, err error) error {
	switch {
	case err == nil, errors.Is(err, ErrCorrupt):
		return err
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%s: %w%s", path, ErrLocked, holder.By(holder.Lock(path)))
	case boltfile.IsCorrupt(err):
		return fmt.Errorf("%s: %w (%w)", path, ErrCorrupt, err)
	case boltfile.IsErrno(err, unix.ENOSPC), boltfile.IsErrno(err, unix.EDQUOT):
		return fmt.Errorf("%s: %w (%w)", path, ErrNoSpace, err)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.ENOTDIR), errors.Is(err, fs.ErrPermission),
		errors.Is(err, bolterrors.ErrDatabaseReadOnly):
		return fmt.Errorf("%s: %w (%w)", path, ErrReadOnly, err)
	}
	return fmt.Errorf("%s: %w", path, err)
}
