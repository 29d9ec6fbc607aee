package ctl

import (
	"context"
	"errors"
	"os"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/config"
)

// DefaultConfigFile is where the store is said, if there is one; else calicoctl's is looked for.
const DefaultConfigFile = "/etc/caracal/caracalctl.cfg"

// withStore opens the store for one command.
func (g *globals) withStore(ctx context.Context, fn func(store.Store) error) error {
	s, err := OpenStore(ctx, g.config, g.stateDir)
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.Close())
}

// OpenStore opens the store that the environment or a file names; where neither does, the one of this machine alone, in
// its state directory.
func OpenStore(ctx context.Context, file, stateDir string) (store.Store, error) {
	c, err := storeConfig(file, stateDir)
	if err != nil {
		return nil, err
	}
	return config.Open(ctx, c)
}

// storeConfig is which store OpenStore opens.
func storeConfig(file, stateDir string) (config.Config, error) {
	if file == "" {
		for _, f := range []string{DefaultConfigFile, config.CalicoFile} {
			if _, err := os.Stat(f); err == nil {
				file = f
				break
			}
		}
	}
	c, err := config.Parse(os.Getenv, file)
	if err == nil && os.Getenv(config.Variable) == "" {
		c.Dir = stateDir
	}
	return c, err
}
