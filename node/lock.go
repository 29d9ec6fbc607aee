package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Lock is the node lock: who writes kernel maps holds it, for the writing only.
type Lock struct {
	file *os.File
}

// LockNode takes the node lock of a state directory, waiting at most 30 s or as long as ctx allows. ErrLocked then.
func LockNode(ctx context.Context, dir string) (*Lock, error) {
	return lockFile(ctx, filepath.Join(dir, "lock"), unix.LOCK_EX, 30*time.Second)
}

// TryLock takes a lock of another name in a state directory without waiting. ErrLocked when another process holds it.
func TryLock(dir, name string) (*Lock, error) {
	return lockFile(context.Background(), filepath.Join(dir, name), unix.LOCK_EX, 0)
}

// lockFile locks a file for this process, exclusively or with other readers; who only reads never makes the file.
func lockFile(ctx context.Context, path string, how int, wait time.Duration) (*Lock, error) {
	flags := os.O_RDWR | os.O_CREATE
	if how == unix.LOCK_SH {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, classify(path, err)
	}
	err = flock(f, how|unix.LOCK_NB)
	if err == nil {
		return &Lock{file: f}, nil
	}
	if !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	if wait == 0 {
		f.Close()
		// Not naming the holder: reading /proc/locks waits for an RCU grace period, 10 to 20 ms.
		return nil, fmt.Errorf("%s: %w", path, ErrLocked)
	}
	// The kernel's queue is fair and wakes the next one at once, but waits without a deadline: so on a goroutine.
	locked := make(chan error, 1)
	go func() { locked <- flock(f, how) }()
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	select {
	case err := <-locked:
		if err == nil {
			return &Lock{file: f}, nil
		}
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	case <-ctx.Done():
		err := fmt.Errorf("%s: %w%s", path, ErrLocked, holder(path))
		go func() {
			<-locked
			f.Close()
		}()
		return nil, err
	}
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Unlock gives the lock back.
func (l *Lock) Unlock() error { return l.file.Close() }
