// Package nl holds what every user of rtnetlink needs: dumps that are repeated when the kernel says they were interrupted.
package nl

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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

// Name returns the name of an interface of this thread's network namespace by its index; unix.ENODEV when there is none.
// It asks by ioctl (netdevice(7)): a netlink question would wait for the kernel's network lock, which whoever removes an
// interface holds for tens of milliseconds.
func Name(index int) (string, error) {
	r, err := ask("", uint32(index), unix.SIOCGIFNAME)
	if err != nil {
		return "", fmt.Errorf("name of interface %d: %w", index, err)
	}
	return r.Name(), nil
}

// Index returns the index of an interface by its name, likewise.
func Index(name string) (int, error) {
	r, err := ask(name, 0, unix.SIOCGIFINDEX)
	if err != nil {
		return 0, fmt.Errorf("index of interface %s: %w", name, err)
	}
	return int(r.Uint32()), nil
}

func ask(name string, index uint32, request uint) (*unix.Ifreq, error) {
	r, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	r.SetUint32(index)
	return r, unix.IoctlIfreq(fd, request, r)
}

// Net is a prefix as netlink's functions want it.
func Net(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Prefix is the inverse of Net; false for nil and for what is none.
func Prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if a = a.Unmap(); !ok || size != a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}

// IsNotFound tells whether err means that a link does not exist.
func IsNotFound(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}
