// Package measure times packets between two pods: inline, where one thread plays both sides, and with a process on
// either side.
package measure

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// End is one pod: where its sockets are opened and the address they use.
type End struct {
	NS   *netns.NS
	Addr netip.Addr
}

// Servers listen on a port between these: rules that are about other ports do not concern them.
const (
	FirstPort = 8080
	LastPort  = 8095
)

// patience is how long an answer may take before a measurement fails.
const patience = 2 * time.Second

// ErrNoAnswer says that a packet or its answer did not arrive in time.
var ErrNoAnswer = errors.New("no answer")

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: ap.Addr().As4(), Port: int(ap.Port())}
	}
	return &unix.SockaddrInet6{Addr: ap.Addr().As16(), Port: int(ap.Port())}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// bound opens a socket in the calling thread's namespace, bound to an address and port, 0: a free one. flags may hold
// unix.SOCK_NONBLOCK. A stream socket listens.
func bound(to netip.AddrPort, kind, flags int) (fd int, at netip.AddrPort, err error) {
	if fd, err = unix.Socket(family(to.Addr()), kind|flags|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, at, fmt.Errorf("open socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err = unix.Bind(fd, sockaddr(to)); err != nil {
		return -1, at, fmt.Errorf("bind to %s: %w", to, err)
	}
	if kind == unix.SOCK_STREAM {
		if err = unix.Listen(fd, 128); err != nil {
			return -1, at, fmt.Errorf("listen on %s: %w", to, err)
		}
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return -1, at, fmt.Errorf("read socket's name: %w", err)
	}
	return fd, addrPort(sa), nil
}

// serving opens a socket as bound does, on the first free port for servers.
func serving(addr netip.Addr, kind, flags int) (fd int, at netip.AddrPort, err error) {
	for port := uint16(FirstPort); port <= LastPort; port++ {
		if fd, at, err = bound(netip.AddrPortFrom(addr, port), kind, flags); !errors.Is(err, unix.EADDRINUSE) {
			return fd, at, err
		}
	}
	return fd, at, err
}

// connectStream opens a TCP connection from the calling thread's namespace, nonblocking, and does not wait for it.
func connectStream(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(family(to.Addr()), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// wait polls again and again for something that a softirq on this very CPU does: it yields, so that ksoftirqd can
// run here, and gives up after patience.
type wait struct {
	spins int
	until time.Time
}

func (w *wait) again() error {
	w.spins++
	if w.spins%8 == 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	if w.spins%256 != 0 {
		return nil
	}
	now := time.Now()
	if w.until.IsZero() {
		w.until = now.Add(patience)
	}
	if now.After(w.until) {
		return ErrNoAnswer
	}
	return nil
}

// acceptStream accepts a connection on a nonblocking listener.
func acceptStream(listener int) (int, error) {
	var w wait
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
			return fd, nil
		case unix.EAGAIN, unix.EINTR:
		default:
			return -1, fmt.Errorf("accept: %w", err)
		}
		if err := w.again(); err != nil {
			return -1, fmt.Errorf("accept: %w", err)
		}
	}
}

// write and read bypass the Go scheduler: the sockets never block.
func write(fd int, b []byte) (int, error) { return raw(unix.SYS_WRITE, fd, b) }
func read(fd int, b []byte) (int, error)  { return raw(unix.SYS_READ, fd, b) }

func raw(trap uintptr, fd int, b []byte) (int, error) {
	n, _, errno := unix.RawSyscall(trap, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	switch errno {
	case 0:
		return int(n), nil
	case unix.EAGAIN, unix.EINTR, unix.ENOTCONN: // ENOTCONN: the connection is still being opened
		return 0, nil
	}
	return 0, errno
}

// transfer sends msg from one nonblocking socket and receives it at another into buf, of the same length. It counts
// how often it had to wait.
func transfer(from, to int, msg, buf []byte, waits *int) error {
	var w wait
	sent, got := 0, 0
	for {
		if sent < len(msg) {
			n, err := write(from, msg[sent:])
			if err != nil {
				return fmt.Errorf("send: %w", err)
			}
			sent += n
		}
		if got < len(buf) && sent > 0 {
			n, err := read(to, buf[got:])
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			if got += n; got == len(buf) {
				*waits += w.spins
				return nil
			}
		}
		if err := w.again(); err != nil {
			return err
		}
	}
}

// PrepareClient lets a pod open many connections one after another: all ports, and those in TIME_WAIT again after a
// second. It writes sysctls of the pod's own namespace only.
func PrepareClient(ns *netns.NS) error {
	return ns.Do(func() error {
		for key, value := range map[string]string{"tcp_tw_reuse": "1", "ip_local_port_range": "1024 65535"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/"+key, []byte(value), 0); err != nil {
				return fmt.Errorf("set %s: %w", key, err)
			}
		}
		return nil
	})
}

// allowedCPUs lists the CPUs this thread may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	var out []int
	for cpu := range 8 * int(unsafe.Sizeof(set)) {
		if set.IsSet(cpu) {
			out = append(out, cpu)
		}
	}
	return out, nil
}

// pin keeps the calling thread on the given CPUs.
func pin(cpus ...int) error {
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPU %s: %w", strings.Trim(fmt.Sprint(cpus), "[]"), err)
	}
	return nil
}
