package measure

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// Echo answers UDP datagrams in a pod until Close.
type Echo struct {
	conn *net.UDPConn
	done chan struct{}
}

// NewEcho starts answering on the pod's address.
func NewEcho(e End) (*Echo, error) {
	echo := &Echo{done: make(chan struct{})}
	err := e.NS.Do(func() (err error) {
		echo.conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(e.Addr, 0)))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in pod: %w", err)
	}
	go func() {
		defer close(echo.done)
		buf := make([]byte, 1500)
		for {
			n, from, err := echo.conn.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				_, _ = echo.conn.WriteToUDPAddrPort(buf[:n], from) // a lost answer is the client's to notice
			}
		}
	}()
	return echo, nil
}

// At is where the echo listens.
func (e *Echo) At() netip.AddrPort {
	at := e.conn.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// Close stops answering.
func (e *Echo) Close() error {
	err := e.conn.Close()
	<-e.done
	return err
}

// FirstAnswer sends a datagram from the namespace to an Echo every interval and returns when the first answer came.
// While the pod has no route yet, sending fails and is tried again. The error is ErrNoAnswer after within.
func FirstAnswer(ctx context.Context, ns *netns.NS, to netip.AddrPort, every, within time.Duration) (at time.Time, err error) {
	err = ns.Do(func() error {
		fd, err := unix.Socket(family(to.Addr()), unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(fd)
		token := uint64(time.Now().UnixNano())
		msg, buf := make([]byte, MinSize), make([]byte, MinSize)
		binary.BigEndian.PutUint64(msg, token)
		until := time.Now().Add(within)
		pause := unix.NsecToTimespec(int64(every))
		for n := uint64(1); ; n++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			if time.Now().After(until) {
				return fmt.Errorf("%w from %s within %v", ErrNoAnswer, to, within)
			}
			binary.BigEndian.PutUint64(msg[8:], n)
			sendErr := unix.Sendto(fd, msg, 0, sockaddr(to))
			if sendErr != nil && !transient(sendErr) {
				return fmt.Errorf("send to %s: %w", to, sendErr)
			}
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := unix.Ppoll(fds, &pause, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("poll: %w", err)
			}
			got, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil && got == len(buf) && binary.BigEndian.Uint64(buf) == token {
				at = time.Now()
				return nil
			}
		}
	})
	return at, err
}

// transient tells whether a send may work later: no route or address yet, or an ICMP error came back.
func transient(err error) bool {
	for _, e := range []unix.Errno{
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.ENETDOWN, unix.EADDRNOTAVAIL, unix.ECONNREFUSED, unix.EAGAIN,
		unix.ENOBUFS, unix.EPERM, unix.EINVAL, unix.EINTR,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
