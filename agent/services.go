package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

const servicesPrefix = "/services/"

// Labels of Services that a node's own proxy leaves alone (k8s.io/kubernetes/pkg/proxy).
var (
	labelsOfOtherProxies = []string{"service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"}
)

// services keeps caracal_service: what the node's proxy translates, as the store says. What it was told last stays while the store
// is away.
type services struct {
	a    *Agent
	wake chan struct{}

	mu    sync.Mutex
	heard map[string][]maps.Service // by key
	bad   map[string]error          // what could not be read
	known bool
}

func newServices(a *Agent) *services {
	return &services{a: a, wake: make(chan struct{}, 1), heard: make(map[string][]maps.Service), bad: make(map[string]error)}
}

// serviceKey tells the keys that list and hear are for.
func serviceKey(key string) bool { return strings.HasPrefix(key, servicesPrefix) }

// list takes all Services that the store holds.
func (s *services) list(kvs []store.KV) {
	s.mu.Lock()
	s.heard, s.bad, s.known = make(map[string][]maps.Service, len(kvs)), make(map[string]error), true
	for _, kv := range kvs {
		s.take(kv)
	}
	s.mu.Unlock()
	signal(s.wake)
}

// hear takes a change of one.
func (s *services) hear(e store.Event) {
	s.mu.Lock()
	delete(s.heard, e.Key)
	delete(s.bad, e.Key)
	if !e.Deleted {
		s.take(e.KV)
	}
	s.mu.Unlock()
	signal(s.wake)
}

func (s *services) take(kv store.KV) {
	var r api.Resource
	err := json.Unmarshal(kv.Value, &r)
	spec, is := r.Spec.(*api.Service)
	switch {
	case err != nil:
		s.bad[kv.Key] = err
	case !is || r.Key() != kv.Key:
		s.bad[kv.Key] = fmt.Errorf("%w: it is %s", api.ErrInvalid, r)
	default:
		ports, err := translated(r.Metadata, spec)
		if err != nil {
			s.bad[kv.Key] = err
		}
		if len(ports) > 0 {
			s.heard[kv.Key] = ports
		}
	}
}

// maxPerService is how many entries a Service may have: each of its ports at each of its addresses is one. Whoever may make a Service
// can write thousands of both, which Kubernetes takes.
const maxPerService = 8192

// translated is what a node's proxy translates of a Service. An error says that not all of it is there: node ports are first, then its
// addresses in their order, its cluster's before what people write into it.
func translated(meta api.Metadata, spec *api.Service) (all []maps.Service, err error) {
	for _, label := range labelsOfOtherProxies {
		if _, ok := meta.Labels[label]; ok {
			return nil, nil
		}
	}
	name := meta.Namespace + "/" + meta.Name
	add := func(a netip.Addr, protocol api.Protocol, port uint16) {
		if len(all) == maxPerService {
			err = fmt.Errorf("%d ports at %d addresses are more than %d, and to the rest nobody is let through as to a Service: make several of it, or have it name fewer", len(spec.Ports), len(spec.IPs), maxPerService)
			return
		}
		all = append(all, maps.Service{Address: a, Protocol: strings.ToLower(protocol.String()), Port: port, Name: name})
	}
	for _, p := range spec.Ports {
		if p.NodePort != 0 {
			add(netip.Addr{}, p.Protocol, p.NodePort)
		}
	}
	for _, a := range spec.IPs {
		if a.IsUnspecified() {
			continue // in the map it would be each of this host's own
		}
		for _, p := range spec.Ports {
			if add(a.Unmap().WithZone(""), p.Protocol, p.Port); err != nil {
				return all, err
			}
		}
	}
	return all, err
}

// run keeps the map until ctx ends; it stays then.
func (s *services) run(ctx context.Context) {
	tick := time.NewTicker(localLook)
	defer tick.Stop()
	var last time.Time // when node.db changed that was read
	again := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-tick.C:
			if t, err := node.Changed(s.a.StateDir); (err != nil || t.Equal(last)) && time.Now().Before(again) {
				continue
			}
		}
		changed, _ := node.Changed(s.a.StateDir)
		err := s.sync(ctx)
		if ctx.Err() != nil {
			return
		}
		s.a.problem("services", err)
		last, again = changed, time.Now().Add(rescan)
		if err != nil && !errors.As(err, new(inputError)) {
			again = time.Now().Add(retryFrom)
		}
	}
}

// sync makes the map equal to what was heard.
func (s *services) sync(ctx context.Context) error {
	s.mu.Lock()
	known := s.known
	var errs []error
	for _, key := range slices.Sorted(stdmaps.Keys(s.bad)) {
		errs = append(errs, fmt.Errorf("%s: %w", key, s.bad[key]))
	}
	var all []maps.Service
	for _, key := range slices.Sorted(stdmaps.Keys(s.heard)) {
		all = append(all, s.heard[key]...)
	}
	s.mu.Unlock()
	if !known {
		return nil
	}
	if len(errs) > 0 {
		all = append(all, maps.Others)
	}
	if len(all) > 0 { // else there is no Kubernetes, or nothing in it that anybody translates
		published, err := s.hostPorts(ctx)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		all = append(published, all...)
	} else if there, err := s.a.maps.Services(); errors.Is(err, maps.ErrNotLoaded) || err == nil && len(there) == 0 {
		return hard(nil, errs)
	}
	if len(all) > 0 { // before anything is left to the host's stack that may end at this host
		switch err := loader.AttachHost(s.a.BPFFSDir); {
		case errors.Is(err, loader.ErrNotLoaded):
			errs = append(errs, err)
		case err != nil:
			return errors.Join(append(errs, err)...)
		}
	}
	lock, err := node.LockNode(ctx, s.a.StateDir)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer lock.Unlock()
	came, went, err := commit.SetServices(s.a.maps, all)
	switch {
	case errors.Is(err, maps.ErrNotLoaded):
		errs = append(errs, fmt.Errorf("%w: the programs are of a build that knows no Services; run caracalctl upgrade", err))
	case errors.Is(err, maps.ErrFull): // of Services that people may delete
		errs = append(errs, err)
	case err != nil:
		return errors.Join(append(errs, err)...)
	}
	if came > 0 || went > 0 {
		s.a.Log.Debug("services", "came", came, "went", went)
	}
	return hard(nil, errs)
}

// hostPorts are the ports of this host that its pods are published at by a later plugin of the chain.
func (s *services) hostPorts(ctx context.Context) ([]maps.Service, error) {
	db, err := node.OpenReadOnly(ctx, s.a.StateDir, s.a.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var all []maps.Service
	err = db.View(func(tx *node.Tx) error {
		return tx.Endpoints(func(e node.Endpoint) error {
			for _, p := range e.Ports {
				at := p.IP.Unmap()
				if at.IsUnspecified() {
					at = netip.Addr{}
				}
				all = append(all, maps.Service{Address: at, Protocol: p.Protocol, Port: p.Port, Name: e.PodNamespace + "/" + e.PodName})
			}
			return nil
		})
	})
	return all, err
}
