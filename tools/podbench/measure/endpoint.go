package measure

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/podbench/stats"
)

// chunk is how much Bulk writes at once.
const chunk = 128 << 10

// Serve answers UDP, TCP and Bulk clients on addr until stdin ends, so that it never outlives who started it. It
// writes one line of JSON, Ports, to stdout when it is ready. A request is size bytes.
func Serve(addr netip.Addr, size int, stdin io.Reader, stdout io.Writer) error {
	var at Ports
	udp, udpAt, err := serving(addr, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	tcp, tcpAt, err := serving(addr, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	bulk, bulkAt, err := serving(addr, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	at.UDP, at.TCP, at.Bulk = udpAt.Port(), tcpAt.Port(), bulkAt.Port()
	fail := make(chan error, 3)
	go func() { fail <- echoDatagrams(udp, size) }()
	go func() { fail <- acceptAll(tcp, func(fd int) { echoStream(fd, size) }) }()
	go func() { fail <- acceptAll(bulk, sink) }()
	if err := json.NewEncoder(stdout).Encode(at); err != nil {
		return fmt.Errorf("write ports: %w", err)
	}
	go func() {
		_, err := io.Copy(io.Discard, stdin)
		fail <- err
	}()
	return <-fail
}

func echoDatagrams(fd, size int) error {
	buf := make([]byte, size)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return fmt.Errorf("receive datagram: %w", err)
		}
		_ = unix.Sendto(fd, buf[:n], 0, from) // a lost answer is the client's to notice
	}
}

func acceptAll(listener int, serve func(fd int)) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		} else if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		// One connection at a time: there is one client, and no goroutine switch in its way.
		serve(fd)
		unix.Close(fd)
	}
}

func echoStream(fd, size int) {
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	buf := make([]byte, size)
	for readFull(fd, buf) == nil && writeFull(fd, buf) == nil {
	}
}

// sink reads to the end and answers how many bytes there were.
func sink(fd int) {
	buf := make([]byte, chunk)
	var total uint64
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		total += uint64(n)
	}
	_ = writeFull(fd, binary.BigEndian.AppendUint64(nil, total)) // who does not get it says so
}

func readFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if errors.Is(err, unix.EAGAIN) {
			return ErrNoAnswer // SO_RCVTIMEO
		} else if err != nil {
			return err
		}
		if n == 0 {
			return io.EOF
		}
		b = b[n:]
	}
	return nil
}

func writeFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Ask is the client of Serve: it makes requests of size bytes for duration and writes a Visit as JSON to stdout. The
// first tenth of the time is not counted.
func Ask(proto string, to netip.AddrPort, size int, duration time.Duration, stdout io.Writer) error {
	var v Visit
	var err error
	switch proto {
	case UDP, TCP:
		v, err = askOpen(proto, to, size, duration)
	case CRR:
		v, err = timed(duration, func(n uint64, msg, buf []byte) error {
			fd, err := dial(unix.SOCK_STREAM, to)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return request(fd, msg, buf)
		}, size)
	case Bulk:
		v, err = pour(to, duration)
	default:
		err = fmt.Errorf("unknown protocol %q", proto)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(v)
}

// dial opens a blocking, connected socket whose reads give up after patience.
func dial(kind int, to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(family(to.Addr()), kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open socket: %w", err)
	}
	limit := unix.NsecToTimeval(int64(patience))
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
	if kind == unix.SOCK_STREAM {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	if err == nil {
		err = unix.Connect(fd, sockaddr(to))
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

func request(fd int, msg, buf []byte) error {
	if err := writeFull(fd, msg); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := readFull(fd, buf); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	if !bytes.Equal(msg, buf) {
		return fmt.Errorf("%w: %x", ErrWrongAnswer, buf)
	}
	return nil
}

func askOpen(proto string, to netip.AddrPort, size int, duration time.Duration) (Visit, error) {
	kind := unix.SOCK_STREAM
	if proto == UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := dial(kind, to)
	if err != nil {
		return Visit{}, err
	}
	defer unix.Close(fd)
	return timed(duration, func(n uint64, msg, buf []byte) error { return request(fd, msg, buf) }, size)
}

// timed calls fn, each time with another message, until duration is over.
func timed(duration time.Duration, fn func(n uint64, msg, buf []byte) error, size int) (Visit, error) {
	msg, buf := make([]byte, size), make([]byte, size)
	took := make([]float64, 0, 1<<17)
	var v Visit
	base := time.Now()
	begin, last := time.Duration(-1), time.Duration(0)
	for n := uint64(1); last < duration; n++ {
		binary.BigEndian.PutUint64(msg, n)
		err := fn(n, msg, buf)
		now := time.Since(base)
		switch {
		case errors.Is(err, ErrNoAnswer) && v.Lost < 3:
			v.Lost++
		case err != nil:
			return v, fmt.Errorf("request %d: %w", n, err)
		case begin >= 0:
			took = append(took, float64(now-last))
		case now > duration/10:
			begin = now
		}
		last = now
	}
	v.Count, v.Seconds, v.Mean = len(took), (last - max(begin, 0)).Seconds(), 0
	if len(took) == 0 {
		return v, fmt.Errorf("%w within %v", ErrNoAnswer, duration)
	}
	v.Mean = stats.Mean(took)
	slices.Sort(took)
	v.Percentiles = map[string]float64{
		"p50": stats.Percentile(took, 50), "p90": stats.Percentile(took, 90),
		"p99": stats.Percentile(took, 99), "p99.9": stats.Percentile(took, 99.9),
	}
	return v, nil
}

// pour sends one stream for duration; the time ends when the server has told how much arrived.
func pour(to netip.AddrPort, duration time.Duration) (Visit, error) {
	fd, err := dial(unix.SOCK_STREAM, to)
	if err != nil {
		return Visit{}, err
	}
	defer unix.Close(fd)
	buf := make([]byte, chunk)
	begin := time.Now()
	for time.Since(begin) < duration {
		if err := writeFull(fd, buf); err != nil {
			return Visit{}, fmt.Errorf("send: %w", err)
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return Visit{}, fmt.Errorf("end stream: %w", err)
	}
	var count [8]byte
	if err := readFull(fd, count[:]); err != nil {
		return Visit{}, fmt.Errorf("read server's count: %w", err)
	}
	return Visit{Count: int(binary.BigEndian.Uint64(count[:])), Seconds: time.Since(begin).Seconds()}, nil
}
