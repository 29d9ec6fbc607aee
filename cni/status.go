package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containernetworking/cni/pkg/invoke"

	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// status tells whether an ADD would be served now: nil, or an error with code 50 or 51.
func (p *Plugin) status(ctx context.Context, env *Env, c *Config) error {
	if err := prepareBPFFS(c.BPFFSDir); err != nil {
		return unavailable(err)
	}
	// What is pinned must be what ADD can use; with nothing pinned the kernel must have what loading takes.
	_, err := os.Stat(c.BPFFSDir)
	if errors.Is(err, fs.ErrNotExist) {
		err = loader.Probe()
	} else if err == nil {
		err = loader.Ensure(c.loaderConfig())
	}
	if err != nil {
		return unavailable(err)
	}
	if c.ownIPAM() {
		return p.ipamStatus(ctx, c)
	}
	if err := invoke.DelegateStatus(ctx, c.IPAM.Type, c.raw, p.delegate()); err != nil {
		return fmt.Errorf("ipam %s: %w", c.IPAM.Type, err)
	}
	return nil
}

func (p *Plugin) ipamStatus(ctx context.Context, c *Config) error {
	cfg, err := c.pools()
	if err != nil {
		return err
	}
	db, err := node.Open(ctx, c.StateDir, c.nodeOptions())
	if err != nil {
		return unavailable(err)
	}
	defer db.Close()
	err = db.View(func(tx *node.Tx) error {
		v4, v6, err := c.families(tx, cfg)
		if err != nil {
			return err
		}
		return ipam.Status(tx, cfg, v4, v6)
	})
	if err != nil {
		return unavailable(err)
	}
	return nil
}

// unavailable gives an error the code that STATUS wants (specification section 5): no ADD can be served.
func unavailable(err error) error {
	return &Error{Code: codeUnavailable, Msg: "an ADD can't be served now", Details: err.Error()}
}
