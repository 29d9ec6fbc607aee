package docker

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"strings"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/node"
)

const (
	lookEvery = 5 * time.Second
	wallEvery = 30 * time.Second
	grace     = 30 * time.Second // for which something must have been nobody's until it is collected
)

// lookSoon has Docker asked for what is new.
func (d *Drivers) lookSoon() {
	select {
	case d.look <- struct{}{}:
	default:
	}
}

// tend learns from Docker how things are called, and collects what nobody has any more, until ctx ends. The log has what goes wrong
// when it becomes another, not in each round.
func (d *Drivers) tend(ctx context.Context) {
	t := &tender{Drivers: d, since: make(map[string]time.Time)}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for said := ""; ; {
		text := ""
		if err := t.tendOnce(ctx); err != nil {
			text = err.Error()
		}
		if text != "" && text != said && ctx.Err() == nil { // once, not every round
			d.Log.Warn("docker", "error", text)
		}
		said = text
		select {
		case <-d.look:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// tender is what one goroutine knows.
type tender struct {
	*Drivers
	since   map[string]time.Time // since when something seems to be nobody's
	walled  time.Time            // when the firewall was looked at
	answers map[string]answer    // of Docker, in this round, by network id
}

type answer struct {
	network engineNetwork
	err     error
}

// holding is an address that Docker holds and that no recorded endpoint has.
type holding struct {
	key  node.Key
	addr netip.Addr
}

func (t *tender) tendOnce(ctx context.Context) error {
	t.answers = make(map[string]answer)
	endpoints, err := t.attacher.Endpoints(ctx)
	if err != nil {
		return err
	}
	seen := make(map[string]bool)
	var errs []error
	for _, e := range endpoints {
		if !t.tendEndpoint(ctx, e, &errs) {
			continue
		}
		seen[e.Key.String()] = true
		if t.expired(e.Key.String()) {
			freed, err := t.attacher.Forget(ctx, e.Key)
			if err == nil {
				err = t.attacher.Update(ctx, func(tx *node.Tx) error { return forgetMAC(tx, e.ContainerID) })
			}
			t.Log.Warn("collected an endpoint that docker has no more", "endpoint", e.ContainerID, "container", e.PodName, "addresses", freed, "error", err)
			errs = append(errs, err)
		}
	}
	if len(endpoints) > 0 && time.Since(t.walled) > wallEvery {
		t.walled = time.Now()
		added, err := allowForwarding(ctx)
		if len(added) > 0 {
			t.Log.Info("the firewall leaves containers to policy", "rules", added)
		}
		errs = append(errs, err)
	}
	errs = append(errs, t.tendHoldings(ctx, seen), t.tendNetworks(ctx, endpoints, seen))
	for key := range t.since {
		if !seen[key] {
			delete(t.since, key)
		}
	}
	return errors.Join(errs...)
}

// expired tells whether something has been nobody's for long enough.
func (t *tender) expired(what string) bool {
	since, ok := t.since[what]
	if !ok {
		t.since[what] = time.Now()
		return false
	}
	return time.Since(since) >= grace
}

// ask asks Docker for a network, once a round.
func (t *tender) ask(ctx context.Context, networkID string) (engineNetwork, error) {
	if t.engine == nil {
		return engineNetwork{}, errors.New("docker is not asked")
	}
	got, ok := t.answers[networkID]
	if !ok {
		got.network, got.err = t.engine.network(ctx, networkID)
		t.answers[networkID] = got
	}
	return got.network, got.err
}

// tendEndpoint learns what Docker knows of an endpoint, and tells whether the endpoint seems to be nobody's: then Docker does not
// know it, or can't be asked and the container's interface is gone; and nothing in a namespace has it up.
func (t *tender) tendEndpoint(ctx context.Context, e node.Endpoint, errs *[]error) (nobodys bool) {
	alive, err := t.attacher.Alive(e)
	if err != nil {
		*errs = append(*errs, err)
		return false
	}
	if alive && e.NetnsID == "" { // perhaps an agent before this one made it
		*errs = append(*errs, t.attacher.Complete(ctx, e))
	}
	network, err := t.ask(ctx, e.Docker.NetworkID)
	if err != nil && !errors.Is(err, errNoSuch) {
		there, err := cni.Exists(e)
		return err == nil && !there
	}
	for id, c := range network.Containers {
		if c.EndpointID == e.ContainerID {
			*errs = append(*errs, t.learn(ctx, e, network.Name, id, c.Name))
			return false
		}
	}
	return !alive
}

// learn records how people call an endpoint's container and network, and what labels it has.
func (t *tender) learn(ctx context.Context, e node.Endpoint, network, id, name string) error {
	if strings.HasPrefix(id, "ep-") || e.Docker.Container == id && e.PodName == name && e.Docker.Network == network {
		return nil
	}
	labels, err := t.engine.labels(ctx, id)
	if errors.Is(err, errNoSuch) {
		return nil // it went meanwhile
	}
	if err != nil {
		return err
	}
	return t.attacher.Update(ctx, func(tx *node.Tx) error {
		now, err := tx.Endpoint(e.Key)
		if errors.Is(err, node.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		now.PodName, now.Docker.Network, now.Docker.Container, now.Labels = name, network, id, ownLabels(labels)
		return tx.PutEndpoint(now)
	})
}

// calicoLabel is before the labels that Calico's libnetwork plugin takes for policy.
const calicoLabel = "org.projectcalico.label."

// ownLabels are an endpoint's by its container's.
func ownLabels(container map[string]string) map[string]string {
	labels := make(map[string]string)
	maps.Copy(labels, container)
	for key, value := range container {
		if short, ok := strings.CutPrefix(key, calicoLabel); ok && short != "" {
			labels[short] = value
		}
	}
	return labels
}

// tendHoldings frees what Docker holds for nobody: it ended between two requests, or was not there to release it.
func (t *tender) tendHoldings(ctx context.Context, seen map[string]bool) error {
	var all []holding
	err := t.attacher.View(ctx, func(tx *node.Tx) error {
		return tx.Owners(func(a netip.Addr, k node.Key) error {
			if !ours(k) {
				return nil
			}
			_, err := tx.Endpoint(k)
			if errors.Is(err, node.ErrNotFound) {
				all, err = append(all, holding{k, a}), nil
			}
			return err
		})
	})
	errs := []error{err}
	for _, h := range all {
		what := h.addr.String() + " " + h.key.String()
		seen[what] = true
		if !t.expired(what) {
			continue
		}
		freed := false
		err := t.attacher.Update(ctx, func(tx *node.Tx) error {
			owner, err := tx.Owner(h.addr)
			if err != nil || owner != h.key {
				return nil
			}
			freed = true
			return errors.Join(release(tx, h.addr), forgetMAC(tx, h.key.ContainerID))
		})
		if freed {
			t.Log.Warn("collected an address that docker requested and did not use", "address", h.addr, "error", err)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// tendNetworks learns the names of networks, and removes the profiles of those that were this node's alone and are gone.
func (t *tender) tendNetworks(ctx context.Context, endpoints []node.Endpoint, seen map[string]bool) error {
	if t.engine == nil {
		return nil
	}
	profiles, err := t.networks(ctx)
	if err != nil {
		return err
	}
	used := make(map[string]bool)
	for _, e := range endpoints {
		used[e.Docker.NetworkID] = true
	}
	var errs []error
	for _, p := range profiles {
		notes := p.Metadata.Annotations
		id := notes[networkAnnotation]
		own := notes[nodeAnnotation] == t.Node && notes[scopeAnnotation] == "local"
		unnamed := notes[api.DockerNetworkAnnotation] == ""
		if !own && !unnamed {
			continue
		}
		network, err := t.ask(ctx, id)
		switch {
		case err == nil && unnamed:
			errs = append(errs, t.nameProfile(ctx, id, network.Name))
		case errors.Is(err, errNoSuch) && own && !used[id]:
			what := p.Key()
			if seen[what] = true; t.expired(what) {
				err := t.deleteProfile(ctx, id)
				t.Log.Warn("collected the profile of a network that docker has no more", "profile", p.Metadata.Name, "error", err)
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
