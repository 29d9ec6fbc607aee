package main

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/lab"
)

const port = 7

// askOften sends n datagrams from client to server's address, has each answered, and returns the TTL (hop limit) of
// every answer.
func askOften(client, server *lab.Pod, to netip.Addr, n int) ([]int, error) {
	ask, err := socket(client, netip.AddrPortFrom(unspecified(to), 0))
	if err != nil {
		return nil, err
	}
	defer unix.Close(ask)
	answer, err := socket(server, netip.AddrPortFrom(to, port))
	if err != nil {
		return nil, err
	}
	defer unix.Close(answer)
	var ttls []int
	for i := range n {
		question := fmt.Sprint("question ", i)
		if err := unix.Sendto(ask, []byte(question), 0, sockaddr(netip.AddrPortFrom(to, port))); err != nil {
			return nil, fmt.Errorf("send to %s: %w", to, err)
		}
		got, _, from, err := receive(answer)
		if err != nil {
			return nil, fmt.Errorf("%s waits for %q: %w", server.Name, question, err)
		}
		if got != question {
			return nil, fmt.Errorf("%s received %q, not %q", server.Name, got, question)
		}
		if err := unix.Sendto(answer, []byte("answer to "+got), 0, from); err != nil {
			return nil, err
		}
		got, ttl, _, err := receive(ask)
		if err != nil {
			return nil, fmt.Errorf("%s waits for %q: %w", client.Name, "answer to "+question, err)
		}
		if got != "answer to "+question {
			return nil, fmt.Errorf("%s received %q, not %q", client.Name, got, "answer to "+question)
		}
		ttls = append(ttls, ttl)
	}
	return ttls, nil
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// socket makes a UDP socket in the pod that tells the TTL of what it receives and waits at most three seconds for it.
func socket(p *lab.Pod, at netip.AddrPort) (fd int, err error) {
	family, level, option := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVTTL
	if at.Addr().Is6() {
		family, level, option = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT
	}
	err = p.Do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("socket in %s: %w", p.Name, err)
	}
	wait := unix.Timeval{Sec: 3}
	for _, err := range []error{
		unix.SetsockoptInt(fd, level, option, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.Bind(fd, sockaddr(at)),
	} {
		if err != nil {
			unix.Close(fd)
			return 0, fmt.Errorf("socket in %s: %w", p.Name, err)
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

func receive(fd int) (string, int, unix.Sockaddr, error) {
	buf, oob := make([]byte, 2048), make([]byte, 64)
	n, on, _, from, err := unix.Recvmsg(fd, buf, oob, 0)
	if err != nil {
		return "", 0, nil, err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return "", 0, nil, fmt.Errorf("read the datagram's TTL: %w", err)
	}
	if len(messages) == 0 || len(messages[0].Data) == 0 {
		return "", 0, nil, errors.New("no TTL with the datagram")
	}
	return string(buf[:n]), int(messages[0].Data[0]), from, nil
}
