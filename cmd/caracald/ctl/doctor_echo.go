package ctl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
)

// echoer asks one address for ICMP echoes, by a raw socket: a pod's namespace allows nobody the kernel's ping sockets.
// All it sends has DF set, whatever path MTU the kernel knows. Not safe for concurrent use.
type echoer struct {
	fd  int
	to  netip.Addr
	id  uint16
	seq uint16
}

// echo is what became of one echo request.
type echo struct {
	size  int // bytes of IP packet
	heard bool
	rtt   time.Duration
	ttl   int    // of the answer
	fault string // the ICMP error or the kernel's, "" when there was none
	mtu   int    // that the error says would pass; 0: it says none
}

// openEcho opens an echoer in the network namespace at path.
func openEcho(path string, from, to netip.Addr) (*echoer, error) {
	e := &echoer{fd: -1, to: to, id: uint16(rand.Uint32())}
	err := netns.Do(path, func() (err error) {
		if to.Is4() {
			e.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
		} else {
			e.fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMPV6)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open socket in the pod: %w", err)
	}
	if err := e.setUp(from); err != nil {
		e.close()
		return nil, err
	}
	return e, nil
}

func (e *echoer) setUp(from netip.Addr) error {
	if e.to.Is4() {
		return errors.Join(
			unix.SetsockoptInt(e.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE),
			unix.SetsockoptInt(e.fd, unix.IPPROTO_IP, unix.IP_RECVERR, 1),
			unix.Bind(e.fd, &unix.SockaddrInet4{Addr: from.As4()}),
			unix.Connect(e.fd, &unix.SockaddrInet4{Addr: e.to.As4()}),
		)
	}
	return errors.Join(
		unix.SetsockoptInt(e.fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE),
		unix.SetsockoptInt(e.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1),
		unix.SetsockoptInt(e.fd, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1),
		unix.Bind(e.fd, &unix.SockaddrInet6{Addr: from.As16()}),
		unix.Connect(e.fd, &unix.SockaddrInet6{Addr: e.to.As16()}),
	)
}

func (e *echoer) close() { unix.Close(e.fd) }

// ICMP numbers (RFC 792, RFC 4443).
const (
	echoReply4   = 0
	echoRequest4 = 8
	echoRequest6 = 128
	echoReply6   = 129
	icmpHeader   = 8
)

// headers is how many bytes of an echo packet are not its data.
func (e *echoer) headers() int {
	if e.to.Is4() {
		return 20 + icmpHeader
	}
	return 40 + icmpHeader
}

// ask sends an echo request of each size and waits until all are answered or refused, at most for the given time. The
// answers are in the order of the sizes.
func (e *echoer) ask(ctx context.Context, wait time.Duration, sizes ...int) ([]echo, error) {
	echoes := make([]echo, len(sizes))
	sent := make([]time.Time, len(sizes))
	first := e.seq
	e.seq += uint16(len(sizes))
	open := 0
	settle := func(seq uint16) *echo { // nil: none of ours, or known already
		i := int(seq - first)
		if i >= len(echoes) || echoes[i].heard || echoes[i].fault != "" {
			return nil
		}
		open--
		return &echoes[i]
	}
	for i, size := range sizes {
		echoes[i].size, sent[i] = size, time.Now()
		open++
		err := e.send(first+uint16(i), size)
		if err == nil {
			continue
		}
		if s := settle(first + uint16(i)); s != nil {
			s.fault = err.Error()
		}
	}
	deadline := time.Now().Add(wait)
	for open > 0 && ctx.Err() == nil {
		left := min(time.Until(deadline), 100*time.Millisecond) // so that an interrupt is seen
		if left <= 0 {
			break
		}
		fds := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("wait for echoes: %w", err)
		}
		for {
			seq, got, more := e.receive()
			if !more {
				break
			}
			if got == nil {
				continue
			}
			if s := settle(seq); s != nil {
				got.size, got.rtt = s.size, time.Since(sent[seq-first])
				*s = *got
			}
		}
	}
	return echoes, ctx.Err()
}

// send sends one request. An error that an earlier packet's ICMP error left on the socket is not this one's.
func (e *echoer) send(seq uint16, size int) error {
	b := make([]byte, max(icmpHeader, size-e.headers()+icmpHeader))
	b[0] = echoRequest6
	if e.to.Is4() {
		b[0] = echoRequest4
	}
	binary.BigEndian.PutUint16(b[4:], e.id)
	binary.BigEndian.PutUint16(b[6:], seq)
	if e.to.Is4() { // the kernel does it for ICMPv6
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	_, _ = unix.GetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	_, err := unix.Write(e.fd, b)
	return err
}

// receive takes one packet from the socket: an answer or an ICMP error to the request of that number, or nil for what is
// neither. more is false when there was none.
func (e *echoer) receive() (seq uint16, got *echo, more bool) {
	b, control := make([]byte, 1<<16), make([]byte, 512)
	n, cn, _, _, err := unix.Recvmsg(e.fd, b, control, unix.MSG_ERRQUEUE)
	if err == nil {
		seq, got = e.decodeFault(b[:n], control[:cn])
		return seq, got, true
	}
	n, cn, _, _, err = unix.Recvmsg(e.fd, b, control, 0)
	if err != nil { // nothing is there, or an ICMP error's number, and the error itself is in the queue by now
		return 0, nil, false
	}
	seq, got = e.decode(b[:n], control[:cn])
	return seq, got, true
}

// decode reads an answer.
func (e *echoer) decode(b, control []byte) (uint16, *echo) {
	got := &echo{heard: true}
	reply := byte(echoReply6)
	if e.to.Is4() { // a raw IPv4 socket gives the IP header too
		if len(b) < 20 || len(b) < int(b[0]&15)*4 {
			return 0, nil
		}
		got.ttl, reply = int(b[8]), echoReply4
		b = b[int(b[0]&15)*4:]
	} else if c := controlMessage(control, unix.IPPROTO_IPV6, unix.IPV6_HOPLIMIT); len(c) >= 4 {
		got.ttl = int(binary.NativeEndian.Uint32(c))
	}
	if len(b) < icmpHeader || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != e.id {
		return 0, nil
	}
	return binary.BigEndian.Uint16(b[6:]), got
}

// decodeFault reads an error from the socket's queue: b is the request that it is about, from its ICMP header on (ip(7),
// IP_RECVERR).
func (e *echoer) decodeFault(b, control []byte) (uint16, *echo) {
	c := controlMessage(control, unix.IPPROTO_IP, unix.IP_RECVERR)
	if !e.to.Is4() {
		c = controlMessage(control, unix.IPPROTO_IPV6, unix.IPV6_RECVERR)
	}
	const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
	if len(c) < size || len(b) < icmpHeader || binary.BigEndian.Uint16(b[4:]) != e.id {
		return 0, nil
	}
	x := (*unix.SockExtendedErr)(unsafe.Pointer(&c[0]))
	got := &echo{fault: unix.Errno(x.Errno).Error()}
	if errors.Is(unix.Errno(x.Errno), unix.EMSGSIZE) {
		got.mtu = int(x.Info)
	}
	if a, ok := offender(c[size:]); ok {
		got.fault += ", says " + a.String()
	}
	return binary.BigEndian.Uint16(b[6:]), got
}

// offender is the sender of an ICMP error, from the socket address behind sock_extended_err.
func offender(b []byte) (netip.Addr, bool) {
	if len(b) < 2 {
		return netip.Addr{}, false
	}
	switch family := binary.NativeEndian.Uint16(b); {
	case family == unix.AF_INET && len(b) >= 8:
		return netip.AddrFrom4([4]byte(b[4:8])), true
	case family == unix.AF_INET6 && len(b) >= 24:
		return netip.AddrFrom16([16]byte(b[8:24])), true
	}
	return netip.Addr{}, false
}

// controlMessage finds a control message's data.
func controlMessage(control []byte, level, kind int32) []byte {
	all, _ := unix.ParseSocketControlMessage(control)
	for _, m := range all {
		if m.Header.Level == level && m.Header.Type == kind {
			return m.Data
		}
	}
	return nil
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
