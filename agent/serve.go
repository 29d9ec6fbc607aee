package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/internal/holder"
	"github.com/caracal-net/caracal/internal/socket"
	"github.com/caracal-net/caracal/internal/trace"
)

// ServerName is what the health address calls itself, so that others can tell it from another program on its port.
const ServerName = "caracald"

// Status is what an agent says of itself, on its socket at /v1/status.
type Status struct {
	Node     string           `json:"node"`
	Ready    bool             `json:"ready"`
	Problems []Problem        `json:"problems"`
	Alarms   []Alarm          `json:"alarms"`
	Blocks   []netip.Prefix   `json:"blocks"`
	Uplinks  []string         `json:"uplinks"`
	Learned  int              `json:"learned"` // routes of other hosts
	Written  int              `json:"written"` // of these, in the maps and in the kernel's table
	Peers    []bgp.PeerStatus `json:"peers"`
	Synced   bool             `json:"synced"` // every peer has told all its routes once, or the restart time has gone by
	Policy   PolicyStatus     `json:"policy"`
}

func (a *Agent) status() Status {
	a.mu.Lock()
	s := Status{Node: a.Node, Ready: a.ready, Blocks: slices.Clone(a.own), Problems: []Problem{}, Uplinks: slices.Clone(a.uplinkNames), Peers: []bgp.PeerStatus{}}
	for _, about := range slices.Sorted(maps.Keys(a.problems)) {
		s.Problems = append(s.Problems, a.problems[about])
	}
	speaker := a.speaking
	s.Synced = speaker == nil
	a.mu.Unlock()
	a.routes.mu.Lock()
	s.Learned, s.Written = len(a.routes.learned), len(a.routes.written)-len(a.routes.stale)
	a.routes.mu.Unlock()
	s.Alarms = a.routes.recent()
	s.Policy = a.policies.status()
	if speaker != nil {
		s.Peers, s.Synced = speaker.Peers(), speaker.IsSynced()
	}
	return s
}

// serve answers on the socket, and on the health and metrics addresses as soon as they are free, until stop is called.
func (a *Agent) serve(ctx context.Context) (stop func(), err error) {
	web := []web{
		{"health address", "--health", "/health", a.Health, a.health()},
		{"metrics address", "--metrics", "/metrics", a.Metrics, a.metrics()},
	}
	for _, w := range web {
		if err := w.check(); err != nil {
			return nil, err
		}
	}
	var servers sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	stop = func() {
		cancel()
		servers.Wait()
	}
	if a.Socket != "" {
		l, err := socket.Listen(a.Socket)
		if errors.Is(err, socket.ErrInUse) {
			return stop, fmt.Errorf("%w; one agent runs on a node", err)
		}
		if err != nil {
			return stop, fmt.Errorf("%w; make that possible, or give another (--socket; agent_socket in the conflist, CARACAL_SOCKET for caracalctl)", err)
		}
		mux := http.NewServeMux()
		mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(a.status()) // who asks may be gone
		})
		a.policies.handle(mux)
		mux.HandleFunc("GET /v1/drops", a.serveDrops)
		mux.HandleFunc("POST /v1/pod", a.servePod)
		mux.HandleFunc("POST /v1/pods/denied", a.serveDenied)
		servers.Go(func() { a.answer(ctx, l, mux) })
	}
	for _, w := range web {
		if w.address != "" {
			servers.Go(func() { w.serve(ctx, a) })
		}
	}
	return stop, nil
}

// answer answers those who come until ctx ends.
func (a *Agent) answer(ctx context.Context, l net.Listener, h http.Handler) {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(a.Log.Handler(), slog.LevelDebug)}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })() // it goes, whatever it says
	_ = s.Serve(l)                                           // ends when it is closed
}

// web is an address on which the agent answers others than Caracal's own programs. It can do without them: a port that another
// program has is a problem, not the agent's end.
type web struct {
	about, flag, path, address string
	handler                    http.Handler
}

// check makes sure that the address can be meant.
func (w web) check() error {
	if w.address == "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(w.address); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return nil
		}
	}
	return fmt.Errorf("%s %q: write it as 127.0.0.1:9099, or as \"\" for nowhere", w.flag, w.address)
}

// serve serves on the address, as soon as it can be had, until ctx ends.
func (w web) serve(ctx context.Context, a *Agent) {
	for {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", w.address)
		if err == nil {
			a.problem(w.about, nil)
			a.answer(ctx, l, w.handler)
			return
		}
		if ctx.Err() != nil {
			return
		}
		a.problem(w.about, w.taken(err))
		select {
		case <-ctx.Done():
			return
		case <-time.After(rescan):
		}
	}
}

// taken says why an address can't be had, and the way out.
func (w web) taken(err error) error {
	_, port, _ := net.SplitHostPort(w.address)
	switch n, _ := strconv.Atoi(port); {
	case errors.Is(err, unix.EADDRINUSE):
		err = fmt.Errorf("%s: end that, or give the agent another (%s)", holder.Taken("tcp", n), w.flag)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		err = fmt.Errorf("%s is no address of this host: give the agent another (%s)", w.address, w.flag)
	case errors.Is(err, unix.EACCES):
		err = fmt.Errorf("port %d may not be listened on by this user: give the agent another (%s)", n, w.flag)
	}
	return fmt.Errorf("%s is not served: %w", w.path, err)
}

// traced logs what was done for a request since begin: that is of interest to whoever follows the trace that it belongs to.
func (a *Agent) traced(r *http.Request, done string, begin time.Time, failed error, attrs ...any) {
	attrs = append(attrs, "duration_ms", float64(time.Since(begin).Microseconds())/1000)
	if failed != nil {
		attrs = append(attrs, "error", failed)
	}
	caller, err := trace.Read(r.Header.Get)
	if err != nil {
		a.Log.Debug("a request's trace context is left out", "error", err)
	}
	level := slog.LevelDebug
	if caller.TraceID != "" {
		level = slog.LevelInfo
	}
	a.Log.Log(r.Context(), level, done, append(attrs, caller.Child().LogAttrs()...)...)
}

func paren(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// health answers like calico-node's: liveness is that we answer, readiness that the node is as the store wants it, as far as that can be
// had. What is wrong is in the body.
func (a *Agent) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /liveness", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	ready := func(w http.ResponseWriter, _ *http.Request) {
		s := a.status()
		switch hindered := slices.ContainsFunc(s.Problems, func(p Problem) bool { return !p.Input }); {
		case s.Ready && !hindered:
			fmt.Fprintln(w, "ok")
		case hindered:
			w.WriteHeader(http.StatusServiceUnavailable)
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, "not done yet")
		}
		for _, p := range s.Problems {
			fmt.Fprintf(w, "%s: %s\n", p.About, p.Text)
		}
	}
	mux.HandleFunc("GET /readiness", ready)
	mux.HandleFunc("GET /health", ready)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", ServerName)
		mux.ServeHTTP(w, r)
	})
}

// metrics writes what Prometheus reads (text format 0.0.4).
func (a *Agent) metrics() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		s := a.status()
		gauge := func(name, help string, value int) {
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s gauge\n%s %d\n", name, help, name, name, value)
		}
		counter := func(name, help string, value uint64) {
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s counter\n%s %d\n", name, help, name, name, value)
		}
		gauge("caracal_problems", "Things that are not as they should be.", len(s.Problems))
		gauge("caracal_alarms", "Alarms of the last minutes.", len(s.Alarms))
		gauge("caracal_blocks", "Blocks of this node.", len(s.Blocks))
		gauge("caracal_routes_learned", "Routes learned from other hosts.", s.Learned)
		gauge("caracal_routes_written", "Routes to other hosts in the maps and in the kernel's table.", s.Written)
		up := 0
		for _, p := range s.Peers {
			if p.Info == "Established" {
				up++
			}
		}
		gauge("caracal_bgp_peers", "BGP peers.", len(s.Peers))
		gauge("caracal_bgp_peers_established", "BGP peers with a session.", up)
		gauge("caracal_policies", "Policies in force, of all kinds.", s.Policy.Policies)
		gauge("caracal_policy_rules", "Rules of these that apply to a pod of this node.", s.Policy.Rules)
		gauge("caracal_policy_ids", "Policy ids that this node's pods have.", s.Policy.PolicyIDs)
		gauge("caracal_policy_rows", "Rows of caracal_policy.", s.Policy.Rows)
		gauge("caracal_policy_prefixes", "Prefixes of caracal_peers.", s.Policy.Prefixes)
		gauge("caracal_policy_identities", "Identities that these have.", s.Policy.Identities)
		gauge("caracal_policy_refused", "Resources about policy that are not in force as people want them.", len(s.Policy.Refused))
		fmt.Fprintf(w, "# HELP caracal_policy_commit_seconds How long the last change of policy took to be compiled and put in force.\n# TYPE caracal_policy_commit_seconds gauge\ncaracal_policy_commit_seconds %g\n", s.Policy.Took)
		fmt.Fprintf(w, "# HELP caracal_policy_commits_total Changes of policy that this agent put in force.\n# TYPE caracal_policy_commits_total counter\ncaracal_policy_commits_total %d\n", s.Policy.Commits)
		a.mu.Lock()
		collected := a.collected
		a.mu.Unlock()
		counter("caracal_leaked_addresses_total", "Addresses of pods without a DEL that this agent took back.", collected)
		a.flowMetrics(w)
		events, forgotten := a.journal.counts()
		fmt.Fprint(w, "# HELP caracal_events_total Events that the programs told of, by kind.\n# TYPE caracal_events_total counter\n")
		for _, kind := range slices.Sorted(maps.Keys(events)) {
			fmt.Fprintf(w, "caracal_events_total{kind=%q} %d\n", kind, events[kind])
		}
		counter("caracal_drops_forgotten_total", "Dropped packets that /v1/drops no longer lists.", forgotten)
		if lost, err := a.maps.EventsLost(); err == nil {
			counter("caracal_events_lost_total", "Events that the programs never told: too many in a second, or nobody read.", lost)
		}
		counts, err := a.maps.Counts()
		if err != nil {
			return
		}
		fmt.Fprint(w, "# HELP caracal_packets_total Packets by hook and verdict.\n# TYPE caracal_packets_total counter\n")
		for _, c := range counts {
			if c.Packets > 0 {
				fmt.Fprintf(w, "caracal_packets_total{hook=%q,verdict=%q} %d\n", c.Hook, strings.ToLower(c.Verdict), c.Packets)
			}
		}
	})
	return mux
}
