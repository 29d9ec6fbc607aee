package bgp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// dropConnections shuts our connections to all peers as the death of the process would: without BGP's Cease, upon which
// peers would forget our routes. GoBGP has no call for it and does not give its sockets away, so they are looked for
// among the process's own. Called with admin held.
func (s *Speaker) dropConnections() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("find connections to peers: %w", err)
	}
	var errs []error
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || !s.isConnection(fd) {
			continue
		}
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
			errs = append(errs, fmt.Errorf("shut connection: %w", err))
		}
	}
	return errors.Join(errs...)
}

// isConnection tells whether fd is a connection between us and a peer, at BGP's port of either side.
func (s *Speaker) isConnection(fd int) bool {
	remote, err := unix.Getpeername(fd)
	if err != nil {
		return false
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		return false
	}
	to := socketAddr(remote)
	p, ok := s.wanted[to.Addr()]
	return ok && (int(to.Port()) == p.port() || int(socketAddr(local).Port()) == s.config.ListenPort)
}

func socketAddr(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}
