package measure

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Ports that opening asks from: more than are used before the flows are forgotten, and none that the kernel chooses.
const (
	firstAsking = 1024
	lastAsking  = 32767
)

// opening opens a flow in every trip: it asks from a port that was not used since flows were forgotten, by a socket that is
// there before the trip begins.
type opening struct {
	talk
	client End
	server netip.AddrPort
	port   uint16 // the last one used
	ready  []asker
	used   int // of them
}

type asker struct {
	fd int
	at unix.Sockaddr
}

func newOpening(p Path, size int) (trip, error) {
	o := &opening{talk: newTalk(size), client: p.A, port: lastAsking}
	var err error
	if o.b, o.server, err = serve(p.B, unix.SOCK_DGRAM); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *opening) opens() bool { return true }

// prepare opens the sockets of n trips.
func (o *opening) prepare(n int) error {
	if err := o.done(); err != nil {
		return err
	}
	return o.client.NS.Do(func() error {
		for len(o.ready) < n {
			if o.port++; o.port > lastAsking {
				o.port = firstAsking
			}
			fd, at, err := bound(netip.AddrPortFrom(o.client.Addr, o.port), unix.SOCK_DGRAM, unix.SOCK_NONBLOCK)
			if errors.Is(err, unix.EADDRINUSE) {
				continue
			}
			if err != nil {
				return err
			}
			o.ready = append(o.ready, asker{fd, sockaddr(at)})
			if err := unix.Connect(fd, sockaddr(o.server)); err != nil {
				return fmt.Errorf("connect datagram socket: %w", err)
			}
		}
		return nil
	})
}

func (o *opening) trip() error {
	next := o.ready[o.used]
	o.used++
	o.a = next.fd
	defer func() { o.a = -1 }()
	if err := unix.Connect(o.b, next.at); err != nil {
		return fmt.Errorf("connect datagram socket: %w", err)
	}
	return o.roundTrip()
}

// done closes the sockets.
func (o *opening) done() error {
	var errs []error
	for _, r := range o.ready {
		errs = append(errs, unix.Close(r.fd))
	}
	o.ready, o.used = o.ready[:0], 0
	return errors.Join(errs...)
}

func (o *opening) Close() error { return errors.Join(o.done(), o.talk.Close()) }
