package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

const port = 7

// asked is what came of questions.
type asked struct {
	by   netip.AddrPort // as the server saw it, the last time
	ttls []int          // TTL (hop limit) of every answer
}

// askOften sends n datagrams from client to server's address and has each answered.
func askOften(client, server lab.Namespace, to netip.Addr, n int) (got asked, err error) {
	ask, err := socket(client, netip.AddrPortFrom(unspecified(to), 0))
	if err != nil {
		return got, err
	}
	defer unix.Close(ask)
	answer, err := socket(server, netip.AddrPortFrom(to, port))
	if err != nil {
		return got, err
	}
	defer unix.Close(answer)
	for i := range n {
		question := fmt.Sprint("question ", i)
		if err := unix.Sendto(ask, []byte(question), 0, sockaddr(netip.AddrPortFrom(to, port))); err != nil {
			return got, fmt.Errorf("send to %s: %w", to, err)
		}
		_, from, err := expect(answer, question)
		if err != nil {
			return got, fmt.Errorf("at %s: %w", to, err)
		}
		if err := unix.Sendto(answer, []byte("answer to "+question), 0, from); err != nil {
			return got, fmt.Errorf("answer %s: %w", addrPort(from), err)
		}
		ttl, _, err := expect(ask, "answer to "+question)
		if err != nil {
			return got, fmt.Errorf("where %s was asked: %w", to, err)
		}
		got.by, got.ttls = addrPort(from), append(got.ttls, ttl)
	}
	return got, nil
}

// askHundred asks a hundred times, and wants every answer with the same TTL.
func askHundred(client, server lab.Namespace, to netip.Addr, ttl int) error {
	begin := time.Now()
	got, err := askOften(client, server, to, 100)
	if err != nil {
		return err
	}
	fmt.Printf("to %-18s TTL of answer 1: %d, of answer 100: %d, mean round trip %s\n", to, got.ttls[0], got.ttls[99], (time.Since(begin) / 100).Round(time.Microsecond))
	if i := slices.IndexFunc(got.ttls, func(t int) bool { return t != ttl }); i >= 0 {
		return fmt.Errorf("answer %d has TTL %d", i+1, got.ttls[i])
	}
	return nil
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// socket makes a UDP socket in a namespace that tells the TTL of what it receives and waits at most three seconds for it.
func socket(ns lab.Namespace, at netip.AddrPort) (fd int, err error) {
	family, level, option := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVTTL
	if at.Addr().Is6() {
		family, level, option = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT
	}
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("socket in %s: %w", ns.Netns, err)
	}
	wait := unix.Timeval{Sec: 3}
	for _, err := range []error{
		unix.SetsockoptInt(fd, level, option, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.Bind(fd, sockaddr(at)),
	} {
		if err != nil {
			unix.Close(fd)
			return 0, fmt.Errorf("socket in %s: %w", ns.Netns, err)
		}
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPort{}
}

// expect receives one datagram, which must say what is wanted, and returns its TTL and sender.
func expect(fd int, want string) (ttl int, from unix.Sockaddr, err error) {
	buf, oob := make([]byte, 2048), make([]byte, 64)
	n, on, _, from, err := unix.Recvmsg(fd, buf, oob, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("wait for %q: %w", want, err)
	}
	if got := string(buf[:n]); got != want {
		return 0, nil, fmt.Errorf("received %q, not %q", got, want)
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return 0, nil, fmt.Errorf("read the datagram's TTL: %w", err)
	}
	if len(messages) == 0 || len(messages[0].Data) == 0 {
		return 0, nil, errors.New("no TTL with the datagram")
	}
	return int(messages[0].Data[0]), from, nil
}
