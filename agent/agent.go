// Package agent is what caracald does: it makes one node equal to what the cluster's store says. It claims blocks for the
// node, speaks BGP, writes learned routes into the kernel maps and the kernel's own table, publishes the node's pods and puts
// policy in force. It only ever writes differences, and nothing that it does not know stops: a pod runs, and a new one starts, while it is away.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	stdmaps "maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/capability"
	"github.com/caracal-net/caracal/internal/holder"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// Config is what an agent is told.
type Config struct {
	Node       string // this node's name in the store
	StateDir   string
	BPFFSDir   string
	BootIDFile string // "": the kernel's
	Socket     string // where caracalctl asks; "": nowhere
	Health     string // address of /health, /liveness and /readiness, see DefaultHealth; "": nowhere
	Metrics    string // address of /metrics, see DefaultMetrics; "": nowhere
	Network    string // where a DeferredNetwork is put once pods can be added; "": nowhere

	IPv4, IPv6 netip.Prefix      // this node's addresses for its peers; zero: those of the interface with the default route
	Labels     map[string]string // of this node, beside those that others gave it
	Uplinks    []string          // interfaces that other hosts are behind, as path.Match patterns; none: found by route
	BGPPort    int               // 0: the BGPConfiguration's, or 179; -1: listen nowhere
	NATPorts   maps.Ports        // that masqueraded flows leave from; zero: cni.MasqueradePorts
	VXLANPort  int               // UDP port that encapsulated packets go to, 4789 by RFC 7348
	VXLANVNI   int               // network id, 24 bits
	PodWait    time.Duration     // for Kubernetes to tell of a new pod; 0: DefaultPodWait; below 0: not at all

	Kubernetes  Kubernetes     // what there is of a cluster of Kubernetes's beside the store; nil: it is none
	PodCIDRs    bool           // true: the node's blocks are those that Kubernetes has given it, and it claims no others
	Pools       []api.Resource // IPPools that are made where the store has none of their family
	LeakedAfter time.Duration  // how long a pod must be gone before its address is taken back; 0: DefaultLeakedAfter

	Log *slog.Logger

	Step func(name string) error // injects faults; nil: none
}

// Where an agent answers others; the ports are those of Calico's.
const (
	DefaultHealth  = "127.0.0.1:9099"
	DefaultMetrics = "127.0.0.1:9091"
)

const (
	settleFor  = 50 * time.Millisecond // changes that come together are looked at together
	retryFrom  = 500 * time.Millisecond
	retryTo    = 15 * time.Second
	localLook  = 100 * time.Millisecond // how often node.db is looked at for what ADD and DEL did
	rescan     = 10 * time.Second       // compare everything, whatever was missed
	missingFor = time.Minute            // how long an address of this node may be away
)

// Agent is one node's reconciler.
type Agent struct {
	Config
	store     store.Store
	cluster   *cluster
	policies  *policies
	services  *services
	maps      *maps.Maps
	speaker   *bgp.Speaker
	spoken    bgp.Config // the speaker's
	taken     takenPort  // where the speaker was to listen
	routes    *routes
	mark      string         // this host's own, see instance
	self      *api.Node      // as registered last
	uplinks   map[string]int // name -> ifindex, as attached
	underlay  map[string]int // of these, those that other hosts are behind
	inherited bool           // what an earlier agent left on others was taken off
	tunnel    tunnel
	idle      map[netip.Prefix]time.Time // since when a block has had no pod
	fresh     map[netip.Prefix]bool      // blocks that this agent has claimed and node.db does not know yet
	found     [2]netip.Prefix            // this node's addresses for its peers, IPv4 and IPv6, where none are configured
	missing   time.Time                  // since when one of them is not there

	networkPlaced bool // the deferred network, by this agent or an earlier one

	wake    chan struct{}
	journal *journal

	mu          sync.Mutex
	problems    map[string]Problem // by what they are about
	ready       bool
	own         []netip.Prefix // blocks of this node, as announced
	uplinkNames []string
	speaking    *bgp.Speaker // speaker, for those who ask
	displaced   uint64       // flows, as last told
	collected   uint64       // leaked addresses that were taken back
}

// Problem is something that is not as it should be. It goes when it is over.
type Problem struct {
	About string    `json:"about"`
	Text  string    `json:"text"`
	Since time.Time `json:"since"`
	Input bool      `json:"input,omitempty"` // people have to do something, and the node is as well as it can be

	told map[string]bool // texts that the log has; those of one problem may change to and fro
}

// inputError is about what people have to do: what they wrote can't be put in force, or the loaded programs are of an earlier build. The
// node is ready all the same: one bad policy must not hold up an upgrade of all nodes, which the programs' comes after.
type inputError struct{ error }

func (e inputError) Unwrap() error { return e.error }

// hard is what is wrong with a node, whose own trouble, if it has any, makes what people wrote a part of it.
func hard(own error, written []error) error {
	switch {
	case len(written) == 0:
		return own
	case own == nil:
		return inputError{errors.Join(written...)}
	}
	return errors.New(errors.Join(append(written, own)...).Error())
}

// mostTold is how many texts of one problem are logged; more are variations.
const mostTold = 5

// Run works until ctx ends; then it lets go of its peers without taking its routes back. The error says what kept it from
// starting.
func Run(ctx context.Context, c Config, s store.Store) error {
	if err := c.capable(); err != nil {
		return err
	}
	a := &Agent{
		Config: c, store: s, uplinks: make(map[string]int), fresh: make(map[netip.Prefix]bool), wake: make(chan struct{}, 1), problems: make(map[string]Problem),
		journal: newJournal(maxDrops),
	}
	if a.Log == nil {
		a.Log = slog.New(slog.DiscardHandler)
	}
	lock, err := alone(c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if err := adopted(); err != nil {
		return err
	}
	if err := a.prepare(); err != nil {
		return err
	}
	defer a.maps.Close()
	a.routes = newRoutes(a)
	a.cluster = newCluster(a)
	a.policies = newPolicies(a)
	a.services = newServices(a)
	stop, err := a.serve(ctx)
	if stop != nil {
		defer stop()
	}
	if err != nil {
		return err
	}
	keep, err := aloneAtMaps(c.BPFFSDir)
	if err != nil {
		return err
	}
	defer keep.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { a.policies.run(ctx) })
	wg.Go(func() { a.policies.publisher(ctx) })
	if a.Kubernetes != nil {
		wg.Go(func() { a.policies.report(ctx) })
		wg.Go(func() { a.Kubernetes.WatchSelf(ctx, a.changed) })
		wg.Go(func() { a.collect(ctx) })
	}
	wg.Go(func() { a.services.run(ctx) })
	wg.Go(func() { a.cluster.follow(ctx) })
	wg.Go(func() { a.cluster.remember(ctx) })
	wg.Go(func() { a.watchLocal(ctx) })
	wg.Go(func() { a.watchLinks(ctx) })
	wg.Go(func() { a.watchEvents(ctx) })
	wg.Go(func() { a.tendFlows(ctx) })
	wg.Go(func() { giveBack(ctx) })
	a.loop(ctx)
	if a.speaker != nil {
		return a.speaker.Close(true)
	}
	return nil
}

// alone makes sure that this is the node's only agent, until the lock is given back.
func alone(dir string) (*node.Lock, error) {
	const name = "agent.lock"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w; make it possible, or name another (--state-dir)", err)
	}
	lock, err := node.TryLock(dir, name)
	if errors.Is(err, node.ErrLocked) {
		return nil, another(filepath.Join(dir, name))
	}
	return lock, err
}

// aloneAtMaps makes sure of it where the agents have two state directories: who has no pods recorded takes those of the other one out
// of the maps. It lasts until the directory is closed.
func aloneAtMaps(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock the maps: %w", err)
	}
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, another(dir)
	}
	return nil, fmt.Errorf("lock %s: %w", dir, err)
}

func another(locked string) error {
	return fmt.Errorf("another agent of this node runs%s: it has locked %s; one runs on a node", paren(holder.Lock(locked)), locked)
}

// adopted makes sure that no pod here is Calico's: programs on the uplinks drop what comes for addresses of this node's blocks
// that no recorded pod has.
func adopted() error {
	pods, err := cni.Unadopted()
	if err != nil {
		return err
	}
	if len(pods) > 0 {
		return fmt.Errorf("%s: pods of Calico's, which an agent would cut off from other hosts: run caracalctl adopt first, or remove what is left of them (ip link del)", strings.Join(pods, ", "))
	}
	return nil
}

// capable says what this process lacks for its work.
func (c Config) capable() error {
	needed := []capability.Capability{capability.BPF, capability.NetAdmin, capability.Perfmon}
	if c.BGPPort == 0 || c.BGPPort > 0 && c.BGPPort < 1024 {
		needed = append(needed, capability.NetBindService)
	}
	return capability.Need("caracald", needed...)
}

// prepare makes sure that the programs are loaded, so that there are maps to write.
func (a *Agent) prepare() error {
	if a.Node == "" {
		return errors.New("this node has no name; give one (--node-name)")
	}
	if err := loader.Ensure(loader.Config{Dir: a.BPFFSDir, NodeID: a.Node[:min(len(a.Node), loader.MaxNodeID)]}); err != nil {
		return err
	}
	var err error
	a.maps, err = maps.Open(a.BPFFSDir)
	return err
}

// changed asks for a look at everything.
func (a *Agent) changed() { signal(a.wake) }

// signal wakes who waits, or will.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// loop reconciles until ctx ends: when something changed, again after an error, and now and then.
func (a *Agent) loop(ctx context.Context) {
	retry := retryFrom
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.wake:
			select { // what comes together is done together
			case <-time.After(settleFor):
			case <-ctx.Done():
				return
			}
		case <-timer.C:
			a.routes.lookAgain()
		}
		next := rescan
		if err := a.reconcile(ctx); err != nil && ctx.Err() == nil {
			a.Log.Debug("reconcile", "error", err, "again in", retry)
			next, retry = retry, min(2*retry, retryTo)
		} else {
			retry = retryFrom
		}
		timer.Reset(next)
	}
}

// reconcile compares everything with what it should be. Each part does what it can, whatever another's trouble is.
func (a *Agent) reconcile(ctx context.Context) error {
	v, known := a.cluster.view()
	if !known { // the store was never heard: what is there stays as it is, and other nodes' agents are told so
		return a.goOn(ctx)
	}
	var errs []error
	part := func(about string, err error) {
		if ctx.Err() != nil { // what this agent does not wait for any more is no problem
			return
		}
		a.problem(about, err)
		if err != nil && !errors.As(err, new(inputError)) {
			errs = append(errs, fmt.Errorf("%s: %w", about, err))
		}
	}
	self, wrote, err := a.register(ctx, v)
	if errors.Is(err, ErrNotHeard) {
		if a.self == nil {
			return a.goOn(ctx)
		}
		return nil
	}
	part("node", err)
	registered := err == nil
	a.policies.claimed(registered)
	switch {
	case registered:
		a.self = self
	case errors.Is(err, ErrNoNode) && a.self != nil: // it was deleted: what its pods have stays theirs, and nothing new comes
		self, v.usable = a.self, nil
	case errors.Is(err, ErrNoNode), errors.Is(err, errTaken):
		part("blocks", a.suspend(ctx))
		return errors.Join(errs...)
	default:
		return errors.Join(errs...)
	}
	if wrote {
		v, _ = a.cluster.view() // by the labels that the node has now
	}
	part("pools", a.makePools(ctx, v))
	own, surplus, err := a.claim(ctx, v)
	part("blocks", err)
	claimed := err == nil || errors.As(err, new(inputError))
	part("network", a.placeNetwork(len(own)))
	part("tunnel", a.setTunnel(ctx, v, self))
	part("uplinks", a.attachUplinks(v, self))
	unrouted := a.setNode(ctx)
	part("node routes", unrouted)
	if a.Kubernetes != nil && registered && claimed && unrouted == nil {
		part("kubernetes", a.reportAvailable(ctx))
	}
	part("masquerade", a.masquerade(ctx, v, self))
	if own != nil { // else what an earlier agent announced stays
		announced, err := a.peer(ctx, v, self, own)
		part("bgp", err)
		if unrouted == nil && announced {
			part("surplus blocks", a.release(ctx, surplus))
		}
	}
	part("routes", a.routes.sync(ctx, v, own, a.tunnel))
	a.show(own, len(errs) == 0)
	return errors.Join(errs...)
}

// show has the agent's status say what a look at everything came to.
func (a *Agent) show(own []netip.Prefix, ready bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ready, a.own, a.speaking = ready, own, a.speaker
	a.uplinkNames = slices.Sorted(stdmaps.Keys(a.uplinks))
}

// problem notes what is wrong about something; nil: nothing any more. The log has it when it begins, when it has become another,
// and when it is over.
func (a *Agent) problem(about string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p, had := a.problems[about]
	if err == nil {
		if had {
			delete(a.problems, about)
			a.Log.Info("over", "about", about, "was", p.Text, "for", time.Since(p.Since).Round(time.Millisecond).String())
		}
		return
	}
	if !had {
		p = Problem{About: about, Since: time.Now(), told: make(map[string]bool)}
	}
	p.Text = err.Error()
	p.Input = errors.As(err, new(inputError))
	a.problems[about] = p
	level := slog.LevelDebug
	if !p.told[p.Text] && len(p.told) < mostTold {
		p.told[p.Text], level = true, slog.LevelWarn
	}
	a.Log.Log(context.Background(), level, "problem", "about", about, "error", err)
}

// watchLocal asks for a look whenever an ADD or a DEL wrote node.db.
func (a *Agent) watchLocal(ctx context.Context) {
	var last time.Time
	tick := time.NewTicker(localLook)
	defer tick.Stop()
	for {
		if t, err := node.Changed(a.StateDir); err == nil && !t.Equal(last) {
			last = t
			a.changed()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (a *Agent) step(name string) error {
	if a.Step == nil {
		return nil
	}
	return a.Step(name)
}

func (a *Agent) nodeOptions() node.Options { return node.Options{BootIDFile: a.BootIDFile} }
