package cni

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// valid is GC's list of attachments that live; false when the configuration has none, which must not be taken for an
// empty one.
func (c *Config) valid() (map[Attachment]bool, bool) {
	list := c.ValidAttachments
	if list == nil {
		list = c.LegacyValidAttachments
	}
	if list == nil {
		return nil, false
	}
	valid := make(map[Attachment]bool)
	for _, a := range *list {
		valid[a] = true
	}
	return valid, true
}

// gc removes the attachments of this network that the runtime does not list. It goes on after an error and returns all.
func (p *Plugin) gc(ctx context.Context, env *Env, c *Config) error {
	valid, ok := c.valid()
	if !ok {
		return nil
	}
	dead, err := p.stale(ctx, c, valid, true)
	errs := []error{err}
	for _, k := range dead {
		p.log.Debug("collect", "endpoint", k.String())
		if err := p.teardown(ctx, c, k); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", k, err))
			continue
		}
		p.swept++
	}
	p.about = node.Endpoint{} // of many
	errs = append(errs, p.releaseStale(ctx, c, valid), p.sweepPins(ctx, c))
	if !c.ownIPAM() {
		if err := invoke.DelegateGC(ctx, c.IPAM.Type, c.raw, p.delegate()); err != nil {
			errs = append(errs, fmt.Errorf("ipam %s: %w", c.IPAM.Type, err))
		}
	}
	return joined(errs)
}

// joined is errors.Join with the first error's code.
func joined(errs []error) error {
	err := errors.Join(errs...)
	if err == nil {
		return nil
	}
	e := *asError(err)
	e.Msg = err.Error()
	return &e
}

// stale lists the attachments of this network that are not valid: those with an endpoint, or those that only hold
// addresses.
func (p *Plugin) stale(ctx context.Context, c *Config, valid map[Attachment]bool, endpoints bool) ([]node.Key, error) {
	db, err := node.OpenReadOnly(ctx, c.StateDir, c.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var keys []node.Key
	add := func(k node.Key) {
		if k.Network == c.Name && !valid[Attachment{k.ContainerID, k.IfName}] {
			keys = append(keys, k)
		}
	}
	err = db.View(func(tx *node.Tx) error {
		if endpoints {
			return tx.Endpoints(func(e node.Endpoint) error {
				add(e.Key)
				return nil
			})
		}
		return tx.Holdings(func(k node.Key, _ []node.Holding) error {
			if _, err := tx.Endpoint(k); errors.Is(err, node.ErrNotFound) {
				add(k)
			}
			return nil
		})
	})
	return keys, err
}

// releaseStale releases addresses that attachments without an endpoint hold: those of another main plugin.
func (p *Plugin) releaseStale(ctx context.Context, c *Config, valid map[Attachment]bool) error {
	keys, err := p.stale(ctx, c, valid, false)
	if err != nil || len(keys) == 0 {
		return err
	}
	return p.update(ctx, c, func(tx *node.Tx) error {
		for _, k := range keys {
			if _, err := ipam.Release(tx, k); err != nil {
				return err
			}
		}
		return nil
	})
}

// sweepPins removes the pins of links whose interface is gone and that no record names: the others are their DEL's. While
// the database is read no ADD can record, so none attaches under such a name.
func (p *Plugin) sweepPins(ctx context.Context, c *Config) error {
	names, err := loader.Links(c.BPFFSDir)
	if err != nil || len(names) == 0 {
		return err
	}
	err = p.read(ctx, c, func(tx *node.Tx) error {
		var errs []error
		for _, name := range names {
			if _, err := tx.EndpointByHostIfName(name); errors.Is(err, node.ErrNotFound) && gone(name) {
				errs = append(errs, loader.Detach(c.BPFFSDir, name))
			}
		}
		return errors.Join(errs...)
	})
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	return err
}
