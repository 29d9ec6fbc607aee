// Package bgp speaks BGP with the other routers: it announces this node's blocks and tells a Sink which prefixes the
// others have. It is the only user of GoBGP, whose types stay inside.
package bgp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	apipb "github.com/osrg/gobgp/v3/api"
	"github.com/osrg/gobgp/v3/pkg/server"
)

const (
	// DefaultPort is BGP's port.
	DefaultPort = 179
	// DefaultHoldTime is RFC 4271's suggestion: a dead peer is noticed in a minute and a half, and a pause of a busy node
	// is not taken for death.
	DefaultHoldTime = 90 * time.Second
	// DefaultRestartTime is how long routes outlive their speaker. It is BIRD's default too: long enough for an agent to be
	// replaced, image pull included, short enough that a node that burned down is not sent packets for long.
	DefaultRestartTime = 120 * time.Second
)

var (
	// ErrInvalid says that a configuration, a peer or a prefix can't be used as it is; the error names the field.
	ErrInvalid = errors.New("invalid BGP configuration")
	// ErrClosed says that the speaker was closed.
	ErrClosed = errors.New("BGP speaker is closed")
)

// Config is what a speaker is for its whole life.
type Config struct {
	ASN             uint32        // our autonomous system, 4 bytes
	RouterID        netip.Addr    // our BGP identifier: IPv4, different from every peer's
	NextHop6        netip.Addr    // next hop of our IPv6 prefixes; zero: our address of the session, and none of IPv6 over IPv4
	ListenAddresses []netip.Addr  // none: all
	ListenPort      int           // 0: DefaultPort; -1: listen nowhere
	HoldTime        time.Duration // 0: DefaultHoldTime

	// RestartTime is how long peers keep our routes when we are gone, and the longest that Synced takes. GoBGP lets a broken
	// session rest for 5 s, so less than 10 s does not bridge a break.
	RestartTime time.Duration // 0: DefaultRestartTime
	Log         *slog.Logger  // nil: slog.Default()
}

// Speaker is a running BGP speaker. Its methods may be called concurrently.
//
// The library's main loop can't be ended: a closed speaker leaves one idle goroutine behind.
type Speaker struct {
	config Config
	sink   Sink
	log    *slog.Logger
	server *server.BgpServer
	ctx    context.Context // of the watch; ends with Close
	cancel context.CancelFunc
	wake   chan struct{} // there is work
	notes  chan Alarm    // from GoBGP's log, which must not wait
	synced chan struct{} // closed once

	queue sync.Mutex
	work  []func() // run's; all that changes what is below mu, in order

	admin     sync.Mutex // one SetPeers, Announce or Close at a time; guards the next three
	wanted    map[netip.Addr]Peer
	announced map[netip.Prefix]bool // nil before the first Announce: until then there are no sessions
	closed    bool

	// What follows is written by run only, and with mu held; run reads it without.
	mu     sync.Mutex
	peers  map[netip.Addr]*peer
	own    blocks
	routes map[netip.Prefix]*destination

	refusals   uint64 // see checkPasswords; run's alone
	configured bool   // SetPeers was called; run's alone
}

// Start starts a speaker that has no peers and nothing to announce. Sessions begin when both SetPeers and Announce were
// called: End-of-RIB tells peers to forget whatever else they remember of us, so it must not come before our prefixes.
// When ctx ends the speaker is closed as by Close(true).
func Start(ctx context.Context, c Config, sink Sink) (*Speaker, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	if sink == nil {
		return nil, invalid("Sink is nil: somebody must be told the routes")
	}
	s := &Speaker{
		config: c, sink: sink, log: c.Log,
		wake: make(chan struct{}, 1), notes: make(chan Alarm, 256), synced: make(chan struct{}),
		wanted: map[netip.Addr]Peer{}, peers: map[netip.Addr]*peer{}, routes: map[netip.Prefix]*destination{}, refusals: unknownRefusals,
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.server = server.NewBgpServer(server.LoggerOption(&logger{s})) // no listen address for gRPC: none is served
	go s.server.Serve()
	if err := s.start(ctx); err != nil {
		s.cancel()
		return nil, err
	}
	go s.run()
	context.AfterFunc(ctx, func() {
		if err := s.Close(true); err != nil {
			s.log.Warn("BGP did not end as it should", "err", err)
		}
	})
	return s, nil
}

func (s *Speaker) start(ctx context.Context) error {
	global := &apipb.Global{
		Asn: s.config.ASN, RouterId: s.config.RouterID.String(), ListenPort: int32(s.config.ListenPort),
		GracefulRestart: &apipb.GracefulRestart{Enabled: true, RestartTime: seconds(s.config.RestartTime)},
	}
	for _, a := range s.config.ListenAddresses {
		global.ListenAddresses = append(global.ListenAddresses, a.String())
	}
	if err := withoutMPTCP(func() error { return s.server.StartBgp(ctx, &apipb.StartBgpRequest{Global: global}) }); err != nil {
		return fmt.Errorf("start BGP on port %d: %w", s.config.ListenPort, err)
	}
	err := s.setPolicies(nil, false)
	for _, direction := range []apipb.PolicyDirection{apipb.PolicyDirection_IMPORT, apipb.PolicyDirection_EXPORT} {
		if err == nil {
			err = s.server.SetPolicyAssignment(ctx, &apipb.SetPolicyAssignmentRequest{Assignment: &apipb.PolicyAssignment{
				Name: "global", Direction: direction, DefaultAction: apipb.RouteAction_ACCEPT,
				Policies: []*apipb.Policy{{Name: policyNames[direction]}},
			}})
		}
	}
	if err == nil {
		err = s.server.WatchEvent(s.ctx, &apipb.WatchEventRequest{
			Peer: &apipb.WatchEventRequest_Peer{},
			Table: &apipb.WatchEventRequest_Table{Filters: []*apipb.WatchEventRequest_Table_Filter{
				{Type: apipb.WatchEventRequest_Table_Filter_POST_POLICY},
				{Type: apipb.WatchEventRequest_Table_Filter_EOR},
			}},
		}, func(e *apipb.WatchEventResponse) { s.do(func() { s.event(e) }) })
	}
	if err != nil {
		_ = s.server.StopBgp(ctx, &apipb.StopBgpRequest{}) // gives the port back
		return fmt.Errorf("start BGP: %w", err)
	}
	return nil
}

// listening guards the environment while sockets are made.
var listening sync.Mutex

// withoutMPTCP calls fn with Go's listeners being plain TCP. On their default, MPTCP, the kernel takes neither a TTL nor an
// MD5 password, and GoBGP does not ask for anything else.
func withoutMPTCP(fn func() error) error {
	listening.Lock()
	defer listening.Unlock()
	before, set := os.LookupEnv("GODEBUG")
	if err := os.Setenv("GODEBUG", strings.TrimPrefix(before+",multipathtcp=0", ",")); err != nil {
		return fmt.Errorf("turn MPTCP off: %w", err)
	}
	defer func() {
		if set {
			_ = os.Setenv("GODEBUG", before)
		} else {
			_ = os.Unsetenv("GODEBUG")
		}
	}()
	return fn()
}

// do has run call fn after all that it was given before. It does not wait: a Sink may, for a caller of ours.
func (s *Speaker) do(fn func()) {
	s.queue.Lock()
	s.work = append(s.work, fn)
	s.queue.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// doWork does what there is to do.
func (s *Speaker) doWork() {
	s.queue.Lock()
	work := s.work
	s.work = nil
	s.queue.Unlock()
	for _, fn := range work {
		if s.ctx.Err() != nil {
			return
		}
		fn()
	}
}

// run is the only goroutine that tells the Sink anything.
func (s *Speaker) run() {
	deadline := time.NewTimer(s.config.RestartTime)
	defer deadline.Stop()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
			s.doWork()
		case a := <-s.notes:
			s.note(a)
		case <-tick.C:
			s.tick()
		case <-deadline.C:
			s.setSynced()
		}
	}
}

// Synced is closed when every peer that was configured has sent End-of-RIB for all its address families, or the restart
// time has gone by since Start. Until then routes that a former life of ours left in the kernel may still be good.
func (s *Speaker) Synced() <-chan struct{} { return s.synced }

// IsSynced says whether Synced is closed.
func (s *Speaker) IsSynced() bool {
	select {
	case <-s.synced:
		return true
	default:
		return false
	}
}

func (s *Speaker) setSynced() {
	select {
	case <-s.synced:
	default:
		close(s.synced)
	}
}

// Announce makes the set of our own prefixes equal to the given one. Their next hop is our address of each session, or
// NextHop6. Nothing is changed when a prefix is invalid.
func (s *Speaker) Announce(prefixes []netip.Prefix) error {
	want := map[netip.Prefix]bool{}
	for _, p := range prefixes {
		if err := checkPrefix("prefix to announce", p); err != nil {
			return err
		}
		if p.Bits() == 0 {
			return invalid("prefix to announce %s: a node is nobody's default route; announce its blocks", p)
		}
		want[p] = true
	}
	s.admin.Lock()
	defer s.admin.Unlock()
	if s.closed {
		return ErrClosed
	}
	first := s.announced == nil
	if first {
		s.announced = map[netip.Prefix]bool{}
	}
	own := newBlocks(want)
	s.do(func() { s.setOwn(own) }) // before peers hear of it: what comes back must find it known
	for p := range s.announced {
		if want[p] {
			continue
		}
		err := s.server.DeletePath(s.ctx, &apipb.DeletePathRequest{Family: family(p.Addr()), Path: s.ownPath(p)})
		if err != nil {
			return fmt.Errorf("withdraw %s: %w", p, err)
		}
		delete(s.announced, p)
	}
	for p := range want {
		if s.announced[p] {
			continue
		}
		if _, err := s.server.AddPath(s.ctx, &apipb.AddPathRequest{Path: s.ownPath(p)}); err != nil {
			return fmt.Errorf("announce %s: %w", p, err)
		}
		s.announced[p] = true
	}
	if !first {
		return nil
	}
	peers := slices.Collect(maps.Values(s.wanted))
	if err := s.setPolicies(peers, false); err != nil {
		return err
	}
	return s.begin(peers)
}

// Close ends the speaker; the Sink hears nothing any more. Graceful drops the connections without a word, so that peers
// keep our routes for the restart time; otherwise they are told to forget them at once. Closing twice is not an error.
func (s *Speaker) Close(graceful bool) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.cancel()
	var err error
	if graceful {
		err = s.dropConnections()
	}
	// GoBGP waits for every session to end. One that hangs must not keep an agent from going.
	stopped := make(chan error, 1)
	go func() { stopped <- s.server.StopBgp(context.Background(), &apipb.StopBgpRequest{}) }()
	select {
	case stopErr := <-stopped:
		return errors.Join(err, stopErr)
	case <-time.After(closePatience):
		return errors.Join(err, fmt.Errorf("stop BGP: sessions did not end in %s", closePatience))
	}
}

const closePatience = time.Second
