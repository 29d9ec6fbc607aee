package dataplane

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stream sends from one socket to another, whether anything arrives or not.
type stream struct {
	sent    atomic.Uint64 // packets; counted before each is sent
	newest  atomic.Uint64 // number of the newest packet that arrived
	arrived atomic.Int64  // when something last arrived, ns since 1970; 0: never
	stop    chan struct{}
	done    sync.WaitGroup
}

// newStream begins to send, a packet every pace. ICMP header, if any, comes before each packet's number.
func newStream(t testing.TB, from, to int, header []byte, pace time.Duration) *stream {
	t.Helper()
	s := &stream{stop: make(chan struct{})}
	tv := unix.NsecToTimeval(int64(20 * time.Millisecond))
	if err := unix.SetsockoptTimeval(to, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	stopped := func() bool {
		select {
		case <-s.stop:
			return true
		default:
			return false
		}
	}
	s.done.Go(func() {
		for !stopped() {
			packet := binary.BigEndian.AppendUint64(bytes.Clone(header), s.sent.Add(1))
			if header != nil {
				binary.BigEndian.PutUint16(packet[2:], ^sum16(0, packet))
			}
			_ = unix.Sendto(from, packet, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, nil) // a full buffer is no failure here
			time.Sleep(pace)
		}
	})
	s.done.Go(func() {
		buf := make([]byte, 4096)
		for !stopped() {
			n, err := readFrom(to, buf)
			if err != nil || n < 8 {
				continue
			}
			got := buf[:n]
			if header != nil { // behind the IP header, of one of this stream's own
				if got = got[20:]; !bytes.Equal(got[4:8], header[4:8]) {
					continue
				}
			}
			s.arrived.Store(time.Now().UnixNano())
			s.newest.Store(max(s.newest.Load(), binary.BigEndian.Uint64(got[len(got)-8:])))
		}
	})
	t.Cleanup(s.end)
	return s
}

// end stops it. Repeating it is fine.
func (s *stream) end() {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	s.done.Wait()
}

// connection is what two pods say to each other over one flow.
type connection struct{ there, back *stream }

// talk opens a flow of a protocol ("udp", "tcp", "icmp") from one pod to another, both of which then send. TCP's packets have
// no numbers that mean anything.
func talk(t testing.TB, protocol string, a, b *pod, v6 bool, pace time.Duration) *connection {
	t.Helper()
	var x, y int
	var ping, pong []byte
	switch protocol {
	case "tcp":
		x, y = connect(t, a, b, v6)
		for _, fd := range []int{x, y} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
				t.Fatal(err)
			}
		}
	case "udp":
		x, y = a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		dial(t, x, b.addr(v6), 7)
		dial(t, y, a.addr(v6), 5000)
		pass(t, x, y)
		pass(t, y, x)
	case "icmp": // the kernel behind b answers as well
		x, y = rawICMP(t, a), rawICMP(t, b)
		dial(t, x, b.v4, 0)
		dial(t, y, a.v4, 0)
		ping, pong = []byte{8, 0, 0, 0, 0, 77, 0, 1}, []byte{0, 0, 0, 0, 0, 77, 0, 2}
	}
	return &connection{newStream(t, x, y, ping, pace), newStream(t, y, x, pong, pace)}
}

func dial(t testing.TB, fd int, to netip.Addr, port int) {
	t.Helper()
	if err := connectTo(fd, sockaddr(to, port)); err != nil {
		t.Fatal(err)
	}
}

// last is when something arrived last, at either end.
func (c *connection) last() time.Time {
	return time.Unix(0, max(c.there.arrived.Load(), c.back.arrived.Load()))
}

func (c *connection) end() {
	c.there.end()
	c.back.end()
}

func rawICMP(t testing.TB, p *pod) int {
	t.Helper()
	var fd int
	err := p.ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}
