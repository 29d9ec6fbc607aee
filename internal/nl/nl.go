// Package nl holds what every user of rtnetlink needs: dumps that are repeated when the kernel says they were interrupted.
package nl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

// attempts is how often an interrupted dump is repeated before its error is returned.
const attempts = 20

// Dump calls fn until its dump was not interrupted by a concurrent change (NLM_F_DUMP_INTR), at most 20 times.
// fn must be free of side effects. The last error is returned as it is.
func Dump[T any](fn func() (T, error)) (T, error) {
	var out T
	var err error
	for range attempts {
		if out, err = fn(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, fmt.Errorf("dump interrupted %d times: %w", attempts, err)
}

// IsNotFound tells whether err means that a link does not exist.
func IsNotFound(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}
