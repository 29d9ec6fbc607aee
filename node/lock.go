package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/caracal-net/caracal/internal/holder"
	"github.com/caracal-net/caracal/internal/turn"
)

// Lock is the node lock: who writes kernel maps holds it, for the writing only.
type Lock struct {
	file *os.File
}

// LockNode takes the node lock of a state directory, waiting at most 30 s or as long as ctx allows. ErrLocked then.
func LockNode(ctx context.Context, dir string) (*Lock, error) {
	return lockFile(ctx, filepath.Join(dir, "lock"), true, 30*time.Second)
}

// TryLock takes a lock of another name in a state directory without waiting. ErrLocked when another process holds it.
func TryLock(dir, name string) (*Lock, error) {
	return lockFile(context.Background(), filepath.Join(dir, name), true, 0)
}

// lockFile locks a file for this process, exclusively or with other readers; who only reads never makes the file.
func lockFile(ctx context.Context, path string, write bool, wait time.Duration) (*Lock, error) {
	f, err := turn.Wait(ctx, path, write, wait)
	switch {
	case err == nil:
		return &Lock{file: f}, nil
	case errors.Is(err, turn.ErrTimeout) && wait == 0:
		// Not naming the holder: reading /proc/locks waits for an RCU grace period, 10 to 20 ms.
		return nil, fmt.Errorf("%s: %w", path, ErrLocked)
	case errors.Is(err, turn.ErrTimeout), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return nil, fmt.Errorf("%s: %w%s", path, ErrLocked, holder.By(holder.Lock(path)))
	}
	return nil, classify(path, err)
}

// Unlock gives the lock back.
func (l *Lock) Unlock() error { return l.file.Close() }
