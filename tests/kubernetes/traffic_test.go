//go:build cluster

package kubernetes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tests/testenv"
)

// every is how often a packet is sent.
const every = 10 * time.Millisecond

// traffic is a conversation of two pods: a datagram each 10 ms that is to be echoed, and so much on a TCP connection.
type traffic struct {
	name           string
	sent, answered [2]atomic.Int64 // datagrams, and rounds of the TCP connection
	broken         atomic.Pointer[string]
	stop           chan struct{}
	done           chan struct{}
}

// talk begins a conversation from one pod to another, whose network it listens in itself.
func talk(t testing.TB, from, to *pod) *traffic {
	t.Helper()
	tr := &traffic{name: fmt.Sprintf("%s to %s", from, to), stop: make(chan struct{}), done: make(chan struct{}, 2)}
	server, client := to.path(), from.path()
	var udp net.PacketConn
	var tcp net.Listener
	must(t, netns.Do(server, func() (err error) {
		if udp, err = net.ListenPacket("udp", "0.0.0.0:0"); err != nil {
			return err
		}
		tcp, err = net.Listen("tcp", "0.0.0.0:0")
		return err
	}))
	go echoPackets(udp)
	go testenv.Echo(tcp)
	var uc net.Conn
	must(t, netns.Do(client, func() (err error) {
		uc, err = net.Dial("udp", netip.AddrPortFrom(to.addrs[0], uint16(udp.LocalAddr().(*net.UDPAddr).Port)).String())
		return err
	}))
	tc, err := dialIn(client, to.addrs[0], tcp.Addr().(*net.TCPAddr).Port)
	must(t, err)
	go tr.packets(uc)
	go tr.stream(tc)
	t.Cleanup(func() {
		tr.end()
		for _, c := range []interface{ Close() error }{uc, tc, udp, tcp} {
			_ = c.Close()
		}
	})
	return tr
}

// dialIn connects from a network namespace.
func dialIn(path string, addr netip.Addr, port int) (c net.Conn, err error) {
	err = netns.Do(path, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "tcp")
		defer f.Close()
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: addr.As4(), Port: port}); err != nil {
			return err
		}
		c, err = net.FileConn(f)
		return err
	})
	return c, err
}

func echoPackets(c net.PacketConn) {
	buf := make([]byte, 64)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}

// packets sends and counts datagrams. The answers to the last ones are waited for.
func (tr *traffic) packets(c net.Conn) {
	defer func() { tr.done <- struct{}{} }()
	go func() {
		buf := make([]byte, 64)
		for {
			if _, err := c.Read(buf); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				tr.answered[0].Add(1)
			}
		}
	}()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tr.stop:
			for range 100 {
				if tr.answered[0].Load() == tr.sent[0].Load() {
					return
				}
				time.Sleep(every)
			}
			return
		case <-tick.C:
			tr.sent[0].Add(1)
			_, _ = c.Write([]byte("datagram"))
		}
	}
}

// stream sends on the connection, each time when the answer has come.
func (tr *traffic) stream(c net.Conn) {
	defer func() { tr.done <- struct{}{} }()
	tick := time.NewTicker(every)
	defer tick.Stop()
	buf := make([]byte, 64)
	for {
		select {
		case <-tr.stop:
			return
		case <-tick.C:
		}
		tr.sent[1].Add(1)
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("segment")); err != nil {
			tr.broke(err)
			return
		}
		if _, err := c.Read(buf); err != nil {
			tr.broke(err)
			return
		}
		tr.answered[1].Add(1)
	}
}

func (tr *traffic) broke(err error) {
	text := err.Error()
	tr.broken.CompareAndSwap(nil, &text)
}

func (tr *traffic) end() {
	select {
	case <-tr.stop:
		return
	default:
	}
	close(tr.stop)
	<-tr.done
	<-tr.done
}

// unharmed ends the conversation and makes sure that nothing of it was lost.
func (tr *traffic) unharmed(t testing.TB) {
	t.Helper()
	tr.end()
	t.Logf("%s: %d datagrams sent, %d answered; %d rounds of TCP", tr.name, tr.sent[0].Load(), tr.answered[0].Load(), tr.answered[1].Load())
	if lost := tr.sent[0].Load() - tr.answered[0].Load(); lost != 0 {
		t.Errorf("%s: %d of %d datagrams were lost", tr.name, lost, tr.sent[0].Load())
	}
	if b := tr.broken.Load(); b != nil {
		t.Errorf("%s: the connection broke: %s", tr.name, *b)
	}
}

// watcher asks an address for UDP servers, each time with a new flow, where policy lets none answer.
type watcher struct {
	addr       netip.Addr
	name       string
	asked, got atomic.Int64
	stop, done chan struct{}
	once       sync.Once
}

// watch begins to ask from a pod, about twice in a second while nobody answers.
func watch(t testing.TB, from *pod, addr netip.Addr, port int) *watcher {
	w := &watcher{addr: addr, name: fmt.Sprintf("%s to %s port %d", from, addr, port), stop: make(chan struct{}), done: make(chan struct{})}
	path := from.path()
	t.Cleanup(w.halt)
	go func() {
		defer close(w.done)
		buf := make([]byte, 64)
		for {
			select {
			case <-w.stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
			var u net.Conn
			err := netns.Do(path, func() (err error) {
				u, err = net.Dial("udp", netip.AddrPortFrom(addr, uint16(port)).String())
				return err
			})
			if err != nil {
				t.Error(err)
				return
			}
			w.asked.Add(1)
			_, _ = u.Write([]byte("hostname"))
			_ = u.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if _, err := u.Read(buf); err == nil {
				w.got.Add(1)
			}
			_ = u.Close()
		}
	}()
	return w
}

// halt ends the asking. It may be called again.
func (w *watcher) halt() {
	w.once.Do(func() { close(w.stop) })
	<-w.done
}

// end ends the asking and makes sure that it was never answered.
func (w *watcher) end(t testing.TB) {
	t.Helper()
	w.halt()
	t.Logf("%s: %d asked anew, %d answered", w.name, w.asked.Load(), w.got.Load())
	if w.asked.Load() == 0 || w.got.Load() != 0 {
		t.Errorf("%s: %d of %d answered", w.name, w.got.Load(), w.asked.Load())
	}
}
