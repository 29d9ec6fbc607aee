package nl

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestDump(t *testing.T) {
	other := errors.New("other")
	for _, c := range []struct {
		name        string
		interrupted int // calls that are interrupted first
		then        error
		want        error
		calls       int
	}{
		{"at once", 0, nil, nil, 1},
		{"after interruptions", 3, nil, nil, 4},
		{"other error at once", 0, other, other, 1},
		{"other error after an interruption", 1, other, other, 2},
		{"always interrupted", 1000, nil, netlink.ErrDumpInterrupted, attempts},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls := 0
			got, err := Dump(func() (int, error) {
				calls++
				if calls <= c.interrupted {
					return -1, netlink.ErrDumpInterrupted
				}
				return calls, c.then
			})
			if !errors.Is(err, c.want) || calls != c.calls {
				t.Errorf("error %v after %d calls, want %v after %d", err, calls, c.want, c.calls)
			}
			if err == nil && got != c.calls {
				t.Errorf("value %d is not that of the last call", got)
			}
		})
	}
}

func TestIsNotFound(t *testing.T) {
	_, err := netlink.LinkByName("no-such-link-00")
	if !IsNotFound(err) || !IsNotFound(fmt.Errorf("find: %w", err)) {
		t.Errorf("IsNotFound(%v) = false", err)
	}
	if IsNotFound(nil) || IsNotFound(errors.New("other")) {
		t.Error("IsNotFound is true for something else")
	}
}
