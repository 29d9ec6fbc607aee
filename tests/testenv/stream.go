package testenv

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// Stream sends so many bytes by TCP from one network namespace to an IPv4 address in another, and returns how long it takes until
// they are read.
func Stream(t testing.TB, from, to string, addr netip.Addr, bytes int) time.Duration {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var l net.Listener
	must(netns.Do(to, func() (err error) {
		l, err = net.Listen("tcp4", "0.0.0.0:0")
		return err
	}))
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			var n int64
			n, err = io.Copy(io.Discard, c)
			c.Close()
			if err == nil && n != int64(bytes) {
				err = fmt.Errorf("%d bytes of %d", n, bytes)
			}
		}
		done <- err
	}()
	var fd int
	must(netns.Do(from, func() (err error) {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: addr.As4(), Port: l.Addr().(*net.TCPAddr).Port})
	}))
	begin := time.Now()
	block := make([]byte, 64<<10)
	for left := bytes; left > 0; {
		n, err := unix.Write(fd, block[:min(left, len(block))])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			unix.Close(fd)
			t.Fatal(err)
		}
		left -= n
	}
	unix.Close(fd)
	must(<-done)
	return time.Since(begin)
}

// Echo sends back what comes on each connection, until the listener is closed.
func Echo(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c) // until the other side closes
		}()
	}
}
