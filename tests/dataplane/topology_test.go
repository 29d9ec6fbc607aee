package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
)

var serial atomic.Int64

const patience = 10 * time.Second

// socket makes a socket in the pod, bound to its address of the destination's family.
func (p *pod) socket(t testing.TB, kind, port int, v6 bool) int {
	t.Helper()
	var fd int
	err := p.ns.Do(func() (err error) {
		family := unix.AF_INET
		if v6 {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(patience))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		return unix.Bind(fd, sockaddr(p.addr(v6), port))
	})
	if err != nil {
		t.Fatalf("socket in pod %s: %v", p.name, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (p *pod) addr(v6 bool) netip.Addr {
	if v6 {
		return p.v6
	}
	return p.v4
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

// ttl makes a socket tell the TTL or hop limit of what it receives.
func wantTTL(t testing.TB, fd int, v6 bool) {
	t.Helper()
	level, option := unix.IPPROTO_IP, unix.IP_RECVTTL
	if v6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		t.Fatal(err)
	}
}

// receive reads one datagram: its payload, TTL and sender.
func receive(t testing.TB, fd int) (string, int, netip.AddrPort) {
	t.Helper()
	buf, oob := make([]byte, 65536), make([]byte, 128)
	var n, on int
	from, err := restarted(func() (from unix.Sockaddr, err error) {
		n, on, _, from, err = unix.Recvmsg(fd, buf, oob, 0)
		return from, err
	})
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	ttl := -1
	messages, err := syscall.ParseSocketControlMessage(oob[:on])
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		ttl = int(m.Data[0])
	}
	switch s := from.(type) {
	case *unix.SockaddrInet4:
		return string(buf[:n]), ttl, netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return string(buf[:n]), ttl, netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	t.Fatalf("sender %T", from)
	return "", 0, netip.AddrPort{}
}

func send(t testing.TB, fd int, payload string, to netip.Addr, port int) {
	t.Helper()
	if err := unix.Sendto(fd, []byte(payload), 0, sockaddr(to, port)); err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
}

// exchange sends a datagram from a to b and back and returns both TTLs.
func exchange(t testing.TB, a, b *pod, afd, bfd int, v6 bool, payload string) (int, int) {
	t.Helper()
	send(t, afd, payload, b.addr(v6), 7)
	got, there, from := receive(t, bfd)
	if got != payload || from.Addr() != a.addr(v6) {
		t.Fatalf("%s received %q from %s, want %q from %s", b.name, got, from, payload, a.addr(v6))
	}
	send(t, bfd, "re: "+payload, from.Addr(), int(from.Port()))
	got, back, from := receive(t, afd)
	if got != "re: "+payload || from.Addr() != b.addr(v6) {
		t.Fatalf("%s received %q from %s, want %q from %s", a.name, got, from, "re: "+payload, b.addr(v6))
	}
	return there, back
}

func modes(t *testing.T, fn func(t *testing.T, mode loader.Mode, v6 bool)) {
	for name, mode := range map[string]loader.Mode{"clsact": loader.Quick, "tcx": loader.TCX} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/v6=%t", name, v6), func(t *testing.T) { fn(t, mode, v6) })
		}
	}
}

// TTL goes down by one on the first packet and on the hundredth, and an established flow takes the established path.
func TestUDPBetweenPods(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 0, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		wantTTL(t, afd, v6)
		wantTTL(t, bfd, v6)
		before := n.counts()
		for i := range 100 {
			there, back := exchange(t, a, b, afd, bfd, v6, fmt.Sprint("packet ", i))
			if there != 63 || back != 63 {
				t.Fatalf("packet %d: TTL %d there, %d back, want 63", i, there, back)
			}
		}
		if got := n.since(before)["from_pod forward_pod"]; got != 200 {
			t.Errorf("counted %d packets forwarded, want 200; all: %v", got, n.since(before))
		}
		for k := range n.since(before) {
			switch k {
			case "from_pod forward_pod", "from_pod control", "from_pod answer_arp", "from_pod answer_nd", "to_pod stack_arp":
			default:
				t.Errorf("unexpected count %s", k)
			}
		}
	})
}

// restarted calls fn until no signal interrupts it: of a socket with a timeout the kernel does not begin again by itself.
func restarted[T any](fn func() (T, error)) (T, error) {
	for {
		v, err := fn()
		if !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}

func readFrom(fd int, b []byte) (int, error) {
	return restarted(func() (int, error) { return unix.Read(fd, b) })
}

func writeTo(fd int, b []byte) (int, error) {
	return restarted(func() (int, error) { return unix.Write(fd, b) })
}

func connectTo(fd int, to unix.Sockaddr) error {
	_, err := restarted(func() (struct{}, error) { return struct{}{}, unix.Connect(fd, to) })
	return err
}

func acceptFrom(fd int) (int, error) {
	return restarted(func() (int, error) {
		conn, _, err := unix.Accept(fd)
		return conn, err
	})
}

func TestTCPBetweenPods(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		client, server := connect(t, a, b, v6)
		payload := make([]byte, 1<<20)
		for i := range payload {
			payload[i] = byte(i * 7)
		}
		go writeAll(client, payload)
		got := 0
		buf := make([]byte, 65536)
		for got < len(payload) {
			k, err := readFrom(server, buf)
			if err != nil || k == 0 {
				t.Fatalf("read after %d bytes: %d, %v", got, k, err)
			}
			for i := range k {
				if buf[i] != byte((got+i)*7) {
					t.Fatalf("byte %d is %d", got+i, buf[i])
				}
			}
			got += k
		}
		flows, err := n.maps.Flows()
		if err != nil {
			t.Fatal(err)
		}
		if len(flows) != 1 || flows[0].State != "open" || !flows[0].Confirmed || flows[0].Opener.Addr() != a.addr(v6) {
			t.Fatalf("flows %+v, want one, open, confirmed, opened by %s", flows, a.addr(v6))
		}
	})
}

// writeAll writes all of b: a signal, which the Go runtime sends now and then, makes a blocking write return early.
func writeAll(fd int, b []byte) {
	for len(b) > 0 {
		n, err := writeTo(fd, b)
		if err != nil {
			return
		}
		b = b[n:]
	}
}

// connect opens a TCP connection from a to b's port 7.
func connect(t testing.TB, a, b *pod, v6 bool) (client, server int) {
	t.Helper()
	listener := b.socket(t, unix.SOCK_STREAM, 7, v6)
	if err := unix.Listen(listener, 8); err != nil {
		t.Fatal(err)
	}
	client = a.socket(t, unix.SOCK_STREAM, 0, v6)
	if err := connectTo(client, sockaddr(b.addr(v6), 7)); err != nil {
		t.Fatalf("connect: %v", err)
	}
	server, err := acceptFrom(listener)
	if err != nil {
		t.Fatalf("accept: %v", err)
	}
	t.Cleanup(func() { unix.Close(server) })
	tv := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// A host's own process reaches a pod and is answered, through the host's stack both ways.
func TestHostToPod(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		if v6 {
			t.Skip("the node has no IPv6 address")
		}
		n := newNode(t, loader.Config{})
		a := n.addPod("a", 1, mode)
		afd := a.socket(t, unix.SOCK_DGRAM, 7, v6)
		var conn net.PacketConn
		n.do(func() (err error) {
			conn, err = net.ListenPacket("udp4", "192.0.2.1:0")
			return err
		})
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		for range 3 {
			if _, err := conn.WriteTo([]byte("probe"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.v4, 7))); err != nil {
				t.Fatal(err)
			}
			got, _, from := receive(t, afd)
			if got != "probe" || from.Addr() != outside {
				t.Fatalf("pod received %q from %s", got, from)
			}
			send(t, afd, "healthy", from.Addr(), int(from.Port()))
			buf := make([]byte, 100)
			k, who, err := conn.ReadFrom(buf)
			if err != nil || string(buf[:k]) != "healthy" {
				t.Fatalf("host received %q from %v: %v", buf[:k], who, err)
			}
		}
		flows, err := n.maps.Flows()
		if err != nil || len(flows) != 1 || flows[0].Entered != "host" {
			t.Fatalf("flows %+v (%v), want one that entered by the host", flows, err)
		}
	})
}

// A port nobody listens on: the ICMP error finds its way back.
func TestPortUnreachable(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		afd := a.socket(t, unix.SOCK_DGRAM, 0, v6)
		if err := connectTo(afd, sockaddr(b.addr(v6), 9)); err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(afd, []byte("anyone?")); err != nil {
			t.Fatal(err)
		}
		if _, err := readFrom(afd, make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("read: %v, want connection refused", err)
		}
	})
}

// Datagrams larger than the MTU go in fragments, and the ones behind follow the first.
func TestFragments(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 0, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		big := make([]byte, 6000)
		for i := range big {
			big[i] = byte(i)
		}
		for range 3 {
			exchange(t, a, b, afd, bfd, v6, string(big))
		}
	})
}

// A pod behind a smaller MTU: the sender learns it from the host's stack.
func TestPathMTU(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode, withMTU(1400))
		client, server := connect(t, a, b, v6)
		payload := make([]byte, 100_000)
		go writeAll(client, payload)
		got := 0
		buf := make([]byte, 65536)
		for got < len(payload) {
			k, err := readFrom(server, buf)
			if err != nil || k == 0 {
				t.Fatalf("read after %d bytes: %d, %v; counts %v", got, k, err, n.counts())
			}
			got += k
		}
	})
}
