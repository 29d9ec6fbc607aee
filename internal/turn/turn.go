// Package turn lets processes take turns at something, by a lock on a file.
package turn

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrTimeout says that others held the lock for as long as the caller would wait.
var ErrTimeout = errors.New("still locked")

// Wait takes a lock on a file, for reading beside others or for writing alone. A reader never makes the file. The turn ends
// when the file is closed, or with this process.
//
// Errors: ErrTimeout after wait, at once when that is 0; ctx's; or what os.OpenFile says.
func Wait(ctx context.Context, path string, write bool, wait time.Duration) (*os.File, error) {
	flags, how := os.O_RDONLY, unix.LOCK_SH
	if write {
		flags, how = os.O_RDWR|os.O_CREATE, unix.LOCK_EX
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600) // not blocking: it may be a pipe
	if err != nil {
		return nil, err
	}
	err = flock(f, how|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if wait == 0 {
		f.Close()
		return nil, ErrTimeout
	}
	// The kernel's queue is fair and wakes the next one at once, but waits without a deadline: so on a goroutine.
	locked := make(chan error, 1)
	go func() { locked <- flock(f, how) }()
	timeout := time.NewTimer(wait)
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
		err = ErrTimeout
	}
	go func() {
		<-locked
		f.Close()
	}()
	return nil, err
}

// Release ends a turn at a file that can't be closed, or whose descriptor others have too.
func Release(f *os.File) error { return flock(f, unix.LOCK_UN) }

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
