package measure

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/tools/podbench/stats"
)

// Protocols that can be measured; Bulk only with two processes, First only inline.
const (
	UDP   = "udp"   // one datagram there, one back
	TCP   = "tcp"   // the same over one established connection
	First = "first" // as UDP, each from another port: the first packets of a flow
	CRR   = "crr"   // connect, request, response, close
	Bulk  = "bulk"  // one TCP stream as fast as it goes
)

// MinSize is the smallest payload: it has to hold who sent it and its number.
const MinSize = 16

// MaxSize is the largest payload that fits a UDP datagram over IPv4.
const MaxSize = 65507

// Path is one datapath to measure, with a pod at each end.
type Path struct {
	Name     string
	A, B     End
	Programs []*ebpf.Program // that its packets meet, whose run time Inline reports; may be nil
	// Forget empties the table of flows between the pods, if there is one: many flows are opened here that nobody closes.
	Forget func() error
}

// maxOpened is how many flows may be opened before they are to be forgotten: less than the ports that First has, and than
// any table's room for one pod.
const maxOpened = 20_000

// InlineOptions of Inline.
type InlineOptions struct {
	Protocols []string // of UDP, TCP, First, CRR
	Size      int      // bytes of payload, MinSize..MaxSize
	Rounds    int      // how often every path is visited
	Batch     int      // round trips per visit, at most MaxBatch
	CPU       int      // where both sides run; negative: the last one allowed
	Progress  func(done, total int, what string)
}

// Series is what one path gave for one protocol, a value per round: entry i of every path was measured in round i.
type Series struct {
	Path, Protocol string
	Medians, Means []float64 // ns
	Trips          int       // round trips timed in all rounds
	Waits          int       // polls that found nothing yet; much above zero means that a softirq ran elsewhere
	// What the path's programs took in a round, by the kernel's statistics, ns per round trip; and how often they ran
	// in one. It is of trips of their own, that are not in the values above. Empty without programs.
	Programs []float64
	Runs     float64
}

// LastCPU returns the highest CPU this process may use; interrupts tend to arrive on the lowest.
func LastCPU() (int, error) {
	cpus, err := allowedCPUs()
	if err != nil {
		return 0, err
	}
	return cpus[len(cpus)-1], nil
}

// MaxBatch is the most trips per visit.
const MaxBatch = maxOpened / 2

// Inline measures round trips with one thread that owns sockets in both pods and plays both sides, so that a trip is
// the kernel's way and nothing else: no wake-up, no scheduler. In each round every path has its turn, in an order
// that changes from round to round; ratios within one round are what to look at. The payload of every packet is
// compared with what the other side sent.
func Inline(ctx context.Context, paths []Path, opts InlineOptions) ([]Series, error) {
	if opts.Size < MinSize || opts.Size > MaxSize {
		return nil, fmt.Errorf("payload of %d bytes: must be %d to %d", opts.Size, MinSize, MaxSize)
	}
	if opts.Rounds < 1 || opts.Batch < 1 || opts.Batch > MaxBatch {
		return nil, fmt.Errorf("%d rounds of %d trips: both must be at least 1, and the trips at most %d", opts.Rounds, opts.Batch, MaxBatch)
	}
	if opts.CPU < 0 {
		var err error
		if opts.CPU, err = LastCPU(); err != nil {
			return nil, err
		}
	}
	var out []Series
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its affinity and namespace
		err := pin(opts.CPU)
		if err == nil {
			out, err = inline(ctx, paths, opts)
		}
		done <- err
	}()
	err := <-done
	return out, err
}

func inline(ctx context.Context, paths []Path, opts InlineOptions) (out []Series, err error) {
	trips := make([]trip, 0, len(paths)*len(opts.Protocols))
	defer func() {
		for _, t := range trips {
			err = errors.Join(err, t.Close())
		}
	}()
	for _, proto := range opts.Protocols {
		for _, p := range paths {
			t, err := newTrip(proto, p, opts.Size)
			if err != nil {
				return nil, fmt.Errorf("prepare %s over %s: %w", proto, p.Name, err)
			}
			trips = append(trips, t)
			out = append(out, Series{Path: p.Name, Protocol: proto})
		}
	}
	took := make([]float64, opts.Batch)
	total := opts.Rounds * len(trips)
	count := 0
	opened := make([]int, len(paths))
	for round := range opts.Rounds {
		for proto := range opts.Protocols {
			for _, path := range order(len(paths), round) {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				i := proto*len(paths) + path
				if opts.Progress != nil {
					opts.Progress(count, total, out[i].Protocol+" over "+out[i].Path)
				}
				count++
				if trips[i].opens() {
					if opened[path] += visitTrips(opts.Batch, round); opened[path] > maxOpened {
						if err := paths[path].forget(); err != nil {
							return nil, err
						}
						opened[path] = visitTrips(opts.Batch, round)
					}
				}
				if err := batch(trips[i], warmTrips(opts.Batch, round), nil); err != nil {
					return nil, fmt.Errorf("%s over %s: %w", out[i].Protocol, out[i].Path, err)
				}
				if err := batch(trips[i], opts.Batch, took); err != nil {
					return nil, fmt.Errorf("%s over %s: %w", out[i].Protocol, out[i].Path, err)
				}
				out[i].Medians = append(out[i].Medians, stats.Median(took))
				out[i].Means = append(out[i].Means, stats.Mean(took))
				out[i].Trips += opts.Batch
				out[i].Waits = trips[i].waited()
				if len(paths[path].Programs) > 0 {
					n := programTrips(opts.Batch)
					took, runs, err := runStats(paths[path].Programs, func() error { return batch(trips[i], n, nil) })
					if err != nil {
						return nil, fmt.Errorf("%s over %s: %w", out[i].Protocol, out[i].Path, err)
					}
					out[i].Programs = append(out[i].Programs, float64(took.Nanoseconds())/float64(n))
					out[i].Runs = float64(runs) / float64(n)
				}
			}
		}
	}
	return out, nil
}

// warmTrips is how many trips go untimed before a visit: caches hold the previous path's code and data. The first
// visit also sees neighbour resolution, slow start and first flows.
func warmTrips(batch, round int) int {
	if round == 0 {
		return max(batch/2, 10)
	}
	return max(batch/20, 10)
}

// programTrips is how many trips of a visit go to the programs' run time.
func programTrips(batch int) int { return max(batch/2, 10) }

// visitTrips are all of a visit.
func visitTrips(batch, round int) int {
	return warmTrips(batch, round) + batch + programTrips(batch)
}

func (p Path) forget() error {
	if p.Forget == nil {
		return nil
	}
	return p.Forget()
}

// order visits n paths so that none is always first or always after the same one.
func order(n, round int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = (i + round) % n
	}
	if round%2 == 1 {
		slices.Reverse(out)
	}
	return out
}

// batch makes n trips and stores the duration of each in took, in ns, unless it is nil.
func batch(t trip, n int, took []float64) error {
	if err := t.prepare(n); err != nil {
		return err
	}
	base := time.Now()
	last := time.Since(base)
	for i := range n {
		if err := t.trip(); err != nil {
			return err
		}
		now := time.Since(base)
		if took != nil {
			took[i] = float64(now - last)
		}
		last = now
	}
	return nil
}

// trip is one kind of round trip over one path.
type trip interface {
	prepare(n int) error // what n calls of trip need, such as the thread in a pod's namespace
	trip() error
	opens() bool // each call of trip opens a flow
	waited() int
	Close() error
}

func newTrip(proto string, p Path, size int) (trip, error) {
	switch proto {
	case UDP:
		return newDatagram(p, size)
	case TCP:
		return newStream(p, size)
	case First:
		return newOpening(p, size)
	case CRR:
		return newConnect(p, size)
	}
	return nil, fmt.Errorf("protocol %q cannot be measured inline: known are %s, %s, %s, %s", proto, UDP, TCP, First, CRR)
}

// talk is what the kinds share: two connected sockets and what they say.
type talk struct {
	a, b             int // file descriptors, -1 when closed
	ask, answer, buf []byte
	number           uint64
	waits            int
}

func newTalk(size int) talk {
	t := talk{a: -1, b: -1, ask: make([]byte, size), answer: make([]byte, size), buf: make([]byte, size)}
	for i := range size {
		t.ask[i], t.answer[i] = byte(i), byte(255-i)
	}
	copy(t.ask, "pb A ask")
	copy(t.answer, "pb B ans")
	return t
}

// ErrWrongAnswer says that something else arrived than the other pod sent.
var ErrWrongAnswer = errors.New("wrong payload received")

func (t *talk) roundTrip() error {
	t.number++
	binary.BigEndian.PutUint64(t.ask[8:], t.number)
	binary.BigEndian.PutUint64(t.answer[8:], t.number)
	if err := transfer(t.a, t.b, t.ask, t.buf, &t.waits); err != nil {
		return fmt.Errorf("request %d: %w", t.number, err)
	}
	if !bytes.Equal(t.ask, t.buf) {
		return fmt.Errorf("request %d: %w: %x", t.number, ErrWrongAnswer, t.buf)
	}
	if err := transfer(t.b, t.a, t.answer, t.buf, &t.waits); err != nil {
		return fmt.Errorf("answer %d: %w", t.number, err)
	}
	if !bytes.Equal(t.answer, t.buf) {
		return fmt.Errorf("answer %d: %w: %x", t.number, ErrWrongAnswer, t.buf)
	}
	return nil
}

func (t *talk) prepare(int) error { return nil }
func (t *talk) trip() error       { return t.roundTrip() }
func (t *talk) opens() bool       { return false }
func (t *talk) waited() int       { return t.waits }

func (t *talk) Close() error {
	var errs []error
	for _, fd := range []*int{&t.a, &t.b} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

func newDatagram(p Path, size int) (trip, error) {
	t := newTalk(size)
	var atA, atB netip.AddrPort
	err := p.A.NS.Do(func() (err error) {
		t.a, atA, err = bound(netip.AddrPortFrom(p.A.Addr, 0), unix.SOCK_DGRAM, unix.SOCK_NONBLOCK)
		return err
	})
	if err == nil {
		t.b, atB, err = serve(p.B, unix.SOCK_DGRAM)
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	if err := errors.Join(unix.Connect(t.a, sockaddr(atB)), unix.Connect(t.b, sockaddr(atA))); err != nil {
		return nil, errors.Join(fmt.Errorf("connect datagram sockets: %w", err), t.Close())
	}
	return &t, nil
}

func newStream(p Path, size int) (trip, error) {
	t := newTalk(size)
	listener, at, err := serve(p.B, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	defer unix.Close(listener)
	err = p.A.NS.Do(func() (err error) {
		t.a, err = connectStream(at)
		return err
	})
	if err == nil {
		t.b, err = acceptStream(listener)
	}
	if err == nil {
		err = unix.SetsockoptInt(t.b, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return &t, nil
}

func serve(e End, kind int) (fd int, at netip.AddrPort, err error) {
	err = e.NS.Do(func() (err error) {
		fd, at, err = serving(e.Addr, kind, unix.SOCK_NONBLOCK)
		return err
	})
	return fd, at, err
}

// connect makes a TCP connection for every trip. The client closes first, as HTTP/1.0 clients did.
type connect struct {
	talk
	listener int
	at       netip.AddrPort
	client   *netns.NS
}

func newConnect(p Path, size int) (trip, error) {
	if err := PrepareClient(p.A.NS); err != nil {
		return nil, err
	}
	listener, at, err := serve(p.B, unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	return &connect{talk: newTalk(size), listener: listener, at: at, client: p.A.NS}, nil
}

func (c *connect) opens() bool { return true }

// prepare moves the thread into the client's namespace, where each trip opens a socket.
func (c *connect) prepare(int) error {
	if err := unix.Setns(c.client.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter client's namespace: %w", err)
	}
	return nil
}

func (c *connect) trip() (err error) {
	if c.a, err = connectStream(c.at); err != nil {
		return err
	}
	if c.b, err = acceptStream(c.listener); err != nil {
		return errors.Join(err, c.talk.Close())
	}
	if err := unix.SetsockoptInt(c.b, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return errors.Join(err, c.talk.Close())
	}
	return errors.Join(c.roundTrip(), c.talk.Close())
}

func (c *connect) Close() error { return errors.Join(c.talk.Close(), unix.Close(c.listener)) }
