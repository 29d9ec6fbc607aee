package dataplane

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

func (n *node) churn() maps.Churn {
	n.t.Helper()
	c, err := n.maps.Churn()
	if err != nil {
		n.t.Fatal(err)
	}
	return c
}

// sweepAll sweeps the table by pieces.
func (n *node) sweepAll(piece uint32) (removed int) {
	n.t.Helper()
	for first := uint32(0); first < n.state().MaxFlows; first += piece {
		gone, err := n.maps.SweepFlows(first, piece)
		if err != nil {
			n.t.Fatal(err)
		}
		removed += gone
	}
	return removed
}

// A sweep removes what is expired and nothing else, gives back what it was charged, and tells how many went.
func TestSweep(t *testing.T) {
	const life = time.Second // longer than a loaded machine takes between two packets
	b := newBench(t, loader.Config{MaxFlows: 200, Timeouts: loader.Timeouts{UDP: life, Opening: life, ICMP: time.Hour}})
	x, y := b.a.v4, b.b.v4
	for id := range uint16(30) { // which stay
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
		f = echo(b.b, y, x, id, true)
		check(t, f, b.fromB(f), "forward_pod")
	}
	for port := range uint16(60) {
		if there, back := b.talk(1000 + port); there != "forward_pod" || back != "forward_pod" {
			t.Fatalf("flow %d: %s, %s", port, there, back)
		}
	}
	half := udp(b.a, at(x, 999), at(y, 53), 1) // never answered
	check(t, half, b.fromA(half), "forward_pod")
	if removed := b.sweepAll(64); removed > 60 {
		t.Errorf("%d flows were swept, of 60 that may have expired", removed)
	}
	until(t, "flows to expire", func() bool {
		f, ok := b.flow("udp", at(x, 999), at(y, 53))
		return !ok || f.Idle > life+8*time.Millisecond
	})
	b.sweepAll(64)
	c := b.churn()
	if s := b.state(); s.Flows != 30 || b.held(t, b.a) != 30 {
		t.Errorf("%d flows stay, %d charged to a; want 30", s.Flows, b.held(t, b.a))
	}
	if c.Opened != 91 || c.Confirmed != 90 || c.Swept+c.Reclaimed != 60 || c.Opening != 0 || c.Displaced != 0 || c.MaxOpens != 16384 {
		t.Errorf("churn %+v", c)
	}
	for id := range uint16(30) {
		f := echo(b.a, x, y, id, false)
		check(t, f, b.fromA(f), "forward_pod")
	}
	if removed := b.sweepAll(1000); removed != 0 {
		t.Errorf("%d flows were swept that are alive", removed)
	}
	if again := b.churn(); again.Opened != c.Opened {
		t.Errorf("churn %+v, after packets of open flows; before %+v", again, c)
	}
	b.purge(t)
	if c := b.churn(); c.Opening != 0 || c.Displaced != 0 {
		t.Errorf("churn %+v after purge", c)
	}
}

// Real connections end as TCP ends them, and their ports can be used again at once.
func TestConnectionsEnd(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	listener := b.socket(t, unix.SOCK_STREAM, 7, false)
	if err := unix.Listen(listener, 8); err != nil {
		t.Fatal(err)
	}
	x, y := at(a.v4, 5000), at(b.v4, 7)
	state := func(want string) {
		t.Helper()
		until(t, "state "+want, func() bool {
			f, ok := n.flow("tcp", x, y)
			return ok && f.State == want
		})
	}
	meet := func() (client, server int) {
		t.Helper()
		client = a.socket(t, unix.SOCK_STREAM, 5000, false)
		if err := connectTo(client, sockaddr(b.v4, 7)); err != nil {
			t.Fatal(err)
		}
		server, err := acceptFrom(listener)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(server) })
		state("open")
		return client, server
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	hangUp := func(fd int) { // the number stays taken, for who closes it at the end
		t.Helper()
		if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
	}
	// By RST, of either side; each time the same ports again.
	for _, byServer := range []bool{false, true} {
		client, server := meet()
		if byServer {
			client, server = server, client
		}
		if err := unix.SetsockoptLinger(client, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			t.Fatal(err)
		}
		hangUp(client)
		state("closed")
		if _, err := readFrom(server, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("after the reset: %v", err)
		}
		hangUp(server)
	}
	// By FIN, first of one side, then of both.
	client, server := meet()
	if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	if k, err := readFrom(server, make([]byte, 1)); k != 0 || err != nil {
		t.Fatalf("read %d bytes, %v", k, err)
	}
	state("open")
	pass(t, server, client) // half closed
	hangUp(server)
	state("closing")
	if k, err := readFrom(client, make([]byte, 1)); k != 0 || err != nil {
		t.Fatalf("read %d bytes, %v", k, err)
	}
	// Nobody listens: the flow is over before it was confirmed.
	refused := a.socket(t, unix.SOCK_STREAM, 5001, false)
	x, y = at(a.v4, 5001), at(b.v4, 9)
	if err := connectTo(refused, sockaddr(b.v4, 9)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect: %v", err)
	}
	state("closed")
	if s := n.state(); s.Flows != 1 {
		t.Errorf("%d confirmed flows, want one, of three connections on the same ports", s.Flows)
	}
}
