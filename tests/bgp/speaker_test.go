package bgp

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caracal-net/caracal/bgp"
)

// A speaker of ours is this test's binary started once more, in a router: GoBGP's sockets are made where its process is,
// and only a process can be killed.

const speakerVariable = "CARACAL_TEST_BGP_SPEAKER"

// request asks the speaker's process for one thing. The answer bears its ID.
type request struct {
	ID       int
	Start    *bgp.Config     `json:",omitempty"`
	SetPeers *[]bgp.Peer     `json:",omitempty"`
	Announce *[]netip.Prefix `json:",omitempty"`
	Close    *bool           `json:",omitempty"`
	Status   bool            `json:",omitempty"`
}

// message is an answer, or with ID 0 what the Sink was told.
type message struct {
	ID        int
	Err       string           `json:",omitempty"`
	Peers     []bgp.PeerStatus `json:",omitempty"`
	Routes    []bgp.Route      `json:",omitempty"`
	Learned   *bgp.Route       `json:",omitempty"`
	Withdrawn *netip.Prefix    `json:",omitempty"`
	Alarm     *bgp.Alarm       `json:",omitempty"`
	Synced    bool             `json:",omitempty"`
}

// writer is the Sink of the speaker's process.
type writer struct {
	mu  sync.Mutex
	out *json.Encoder
}

func (w *writer) write(m message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.out.Encode(m)
}

func (w *writer) Learned(r bgp.Route)      { w.write(message{Learned: &r}) }
func (w *writer) Withdrawn(p netip.Prefix) { w.write(message{Withdrawn: &p}) }
func (w *writer) Alarm(a bgp.Alarm)        { w.write(message{Alarm: &a}) }

// runSpeaker serves requests until there are no more.
func runSpeaker(in io.Reader, out io.Writer) int {
	w := &writer{out: json.NewEncoder(out)}
	var s *bgp.Speaker
	for d := json.NewDecoder(in); ; {
		var r request
		if err := d.Decode(&r); err != nil {
			return 0
		}
		answer := message{ID: r.ID}
		var err error
		switch {
		case r.Start != nil:
			r.Start.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
			if s, err = bgp.Start(context.Background(), *r.Start, w); err == nil {
				go func() {
					<-s.Synced()
					w.write(message{Synced: true})
				}()
			}
		case r.SetPeers != nil:
			err = s.SetPeers(*r.SetPeers)
		case r.Announce != nil:
			err = s.Announce(*r.Announce)
		case r.Close != nil:
			err = s.Close(*r.Close)
		case r.Status:
			answer.Peers, answer.Routes = s.Peers(), s.Routes()
		}
		if err != nil {
			answer.Err = err.Error()
		}
		w.write(answer)
	}
}

// speaker is such a process, and what its Sink was told.
type speaker struct {
	t *testing.T
	*daemon
	in   *json.Encoder
	next int

	mu      sync.Mutex
	answers map[int]message
	routes  map[netip.Prefix]bgp.Route
	calls   int
	alarms  []bgp.Alarm
	synced  bool
}

const (
	holdTime    = 9 * time.Second
	restartTime = 5 * time.Second
)

// speak starts a speaker of AS asn in the router, without peers.
func (r *router) speak(asn uint32) *speaker {
	t := r.net.t
	t.Helper()
	s := &speaker{t: t, answers: map[int]message{}, routes: map[netip.Prefix]bgp.Route{}}
	s.daemon = &daemon{cmd: exec.Command("/proc/self/exe"), log: &logBuffer{}, done: make(chan struct{})}
	s.cmd.Env = append(os.Environ(), speakerVariable+"=1")
	s.cmd.Stderr = s.log
	in, err := s.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.do(s.cmd.Start); err != nil {
		t.Fatal(err)
	}
	s.in = json.NewEncoder(in)
	go func() {
		s.read(out)
		_ = s.cmd.Wait()
		close(s.done)
	}()
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("speaker of router %d: alarms %v\n%s", r.n, s.alarms, s.log)
		}
	})
	s.ask(request{Start: &bgp.Config{
		ASN: asn, RouterID: r.v4, NextHop6: r.v6, HoldTime: holdTime, RestartTime: restartTime,
	}})
	return s
}

func (s *speaker) read(out io.Reader) {
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var m message
		if json.Unmarshal(line, &m) != nil {
			continue
		}
		s.mu.Lock()
		switch {
		case m.ID != 0:
			s.answers[m.ID] = m
		case m.Learned != nil:
			s.routes[m.Learned.Prefix] = *m.Learned
			s.calls++
		case m.Withdrawn != nil:
			delete(s.routes, *m.Withdrawn)
			s.calls++
		case m.Alarm != nil:
			s.alarms = append(s.alarms, *m.Alarm)
		case m.Synced:
			s.synced = true
		}
		s.mu.Unlock()
	}
}

// ask does a request and waits for its answer.
func (s *speaker) ask(r request) message {
	s.t.Helper()
	s.next++
	r.ID = s.next
	if err := s.in.Encode(r); err != nil {
		s.t.Fatalf("the speaker's process is gone: %v", err)
	}
	var m message
	eventually(s.t, "an answer of the speaker", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		var ok bool
		m, ok = s.answers[r.ID]
		return ok
	})
	if m.Err != "" {
		s.t.Fatal(m.Err)
	}
	return m
}

// An empty set is asked for as such: JSON's null would be no request.
func (s *speaker) setPeers(peers ...bgp.Peer) {
	s.t.Helper()
	peers = append([]bgp.Peer{}, peers...)
	s.ask(request{SetPeers: &peers})
}

func (s *speaker) announce(own ...netip.Prefix) {
	s.t.Helper()
	own = append([]netip.Prefix{}, own...)
	s.ask(request{Announce: &own})
}

func (s *speaker) close(graceful bool) { s.t.Helper(); s.ask(request{Close: &graceful}) }
func (s *speaker) status() message     { s.t.Helper(); return s.ask(request{Status: true}) }

// peer is the status of one peer.
func (s *speaker) peer(a netip.Addr) bgp.PeerStatus {
	s.t.Helper()
	for _, p := range s.status().Peers {
		if p.Address == a {
			return p
		}
	}
	return bgp.PeerStatus{}
}

func (s *speaker) up(a netip.Addr) bool { return s.peer(a).State == "up" }

// has tells whether the Sink knows all these prefixes.
func (s *speaker) has(prefixes ...netip.Prefix) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { _, ok := s.routes[p]; return !ok })
}

func (s *speaker) route(p netip.Prefix) bgp.Route {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.routes[p]
}

func (s *speaker) told() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

func (s *speaker) isSynced() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.synced
}

func (s *speaker) alarmed(kind bgp.AlarmKind, words ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.alarms, func(a bgp.Alarm) bool {
		return a.Kind == kind && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(a.Text, w) })
	})
}

func prefixes(all ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range all {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}
