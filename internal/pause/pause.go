// Package pause waits.
package pause

import (
	"context"
	"time"
)

// For waits that long, or until ctx ends, and tells whether there is time left.
func For(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
