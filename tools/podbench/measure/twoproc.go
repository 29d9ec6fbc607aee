package measure

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// TwoProcOptions of TwoProc.
type TwoProcOptions struct {
	Protocols []string      // of UDP, TCP, CRR, Bulk
	Size      int           // bytes of payload, MinSize..MaxSize
	Rounds    int           // how often every path is visited
	Duration  time.Duration // of one visit
	// Command makes a command that runs this program with the given arguments; Serve and Ask are what it must call.
	Command  func(ctx context.Context, args ...string) *exec.Cmd
	Progress func(done, total int, what string)
}

// Visit is what one client process saw in one round. Fields that do not belong to the protocol are zero.
type Visit struct {
	Count       int                `json:"count"`       // answered requests, or bytes of Bulk
	Lost        int                `json:"lost"`        // UDP requests without an answer in time
	Seconds     float64            `json:"seconds"`     // from the first request to the last answer
	Mean        float64            `json:"mean"`        // ns
	Percentiles map[string]float64 `json:"percentiles"` // "p50", "p90", "p99", "p99.9": ns
}

// VisitSeries is what one path gave for one protocol, entry i from round i.
type VisitSeries struct {
	Path, Protocol string
	Visits         []Visit
}

// TwoProc measures with a server process in pod B and a client process in pod A of each path, one path at a time, in
// an order that changes from round to round. Client and server are kept on a CPU of their own where there are two.
func TwoProc(ctx context.Context, paths []Path, opts TwoProcOptions) (out []VisitSeries, err error) {
	if opts.Size < MinSize || opts.Size > MaxSize {
		return nil, fmt.Errorf("payload of %d bytes: must be %d to %d", opts.Size, MinSize, MaxSize)
	}
	if opts.Rounds < 1 || opts.Duration <= 0 {
		return nil, fmt.Errorf("%d rounds of %v: both must be above zero", opts.Rounds, opts.Duration)
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	clientCPU, serverCPU := cpus[len(cpus)-1], cpus[max(len(cpus)-2, 0)]
	servers := make([]*server, 0, len(paths))
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.stop())
		}
	}()
	for _, p := range paths {
		if err := PrepareClient(p.A.NS); err != nil {
			return nil, err
		}
		s, err := startServer(ctx, p, serverCPU, opts)
		if err != nil {
			return nil, fmt.Errorf("start server in pod of %s: %w", p.Name, err)
		}
		servers = append(servers, s)
	}
	for _, proto := range opts.Protocols {
		for _, p := range paths {
			out = append(out, VisitSeries{Path: p.Name, Protocol: proto})
		}
	}
	count := 0
	for round := range opts.Rounds {
		for proto := range opts.Protocols {
			for _, path := range order(len(paths), round) {
				s := &out[proto*len(paths)+path]
				if opts.Progress != nil {
					opts.Progress(count, opts.Rounds*len(out), s.Protocol+" over "+s.Path)
				}
				count++
				if err := paths[path].forget(); err != nil {
					return nil, err
				}
				v, err := ask(ctx, paths[path], servers[path].at, s.Protocol, clientCPU, opts)
				if err != nil {
					return nil, fmt.Errorf("%s over %s: %w", s.Protocol, s.Path, err)
				}
				s.Visits = append(s.Visits, v)
			}
		}
	}
	return out, nil
}

// Ports tells where a server process listens.
type Ports struct {
	UDP  uint16 `json:"udp"`
	TCP  uint16 `json:"tcp"` // for TCP and CRR
	Bulk uint16 `json:"bulk"`
}

type server struct {
	cmd   *exec.Cmd
	stdin io.Closer
	at    Ports
}

func startServer(ctx context.Context, p Path, cpu int, opts TwoProcOptions) (*server, error) {
	cmd := opts.Command(ctx, "serve", p.B.Addr.String(), strconv.Itoa(opts.Size))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("open pipe: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("open pipe: %w", err)
	}
	if err := startIn(p.B, cpu, cmd); err != nil {
		return nil, err
	}
	s := &server{cmd: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s.at)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read server's ports: %w: %s", err, strings.TrimSpace(stderr.String())), s.stop())
	}
	return s, nil
}

// stop lets the server see the end of its input and waits for it.
func (s *server) stop() error {
	s.stdin.Close()
	kill := time.AfterFunc(patience, func() { s.cmd.Process.Kill() })
	defer kill.Stop()
	if err := s.cmd.Wait(); err != nil {
		return fmt.Errorf("stop server: %w", err)
	}
	return nil
}

// startIn starts cmd in the pod's namespace on one CPU: a process inherits both from the thread that starts it.
func startIn(e End, cpu int, cmd *exec.Cmd) error {
	return e.NS.Do(func() error {
		if err := pin(cpu); err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", cmd.Path, err)
		}
		return nil
	})
}

func ask(ctx context.Context, p Path, at Ports, proto string, cpu int, opts TwoProcOptions) (v Visit, err error) {
	ctx, cancel := context.WithTimeout(ctx, opts.Duration+10*time.Second)
	defer cancel()
	port := map[string]uint16{UDP: at.UDP, TCP: at.TCP, CRR: at.TCP, Bulk: at.Bulk}[proto]
	if port == 0 {
		return v, fmt.Errorf("protocol %q cannot be measured: known are %s, %s, %s, %s", proto, UDP, TCP, CRR, Bulk)
	}
	cmd := opts.Command(ctx, "ask", proto, netip.AddrPortFrom(p.B.Addr, port).String(), strconv.Itoa(opts.Size), opts.Duration.String())
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := startIn(p.A, cpu, cmd); err != nil {
		return v, err
	}
	if err := cmd.Wait(); err != nil {
		if ctxErr := context.Cause(ctx); ctxErr != nil {
			err = ctxErr
		}
		return v, fmt.Errorf("client: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	if err := json.Unmarshal(stdout.Bytes(), &v); err != nil {
		return v, fmt.Errorf("read client's report: %w", err)
	}
	return v, nil
}
