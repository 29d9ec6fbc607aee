package ctl

import (
	"context"
	"errors"
	"os"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/bolt"
)

// DefaultConfigFile is where the store is said, as for calicoctl.
const DefaultConfigFile = "/etc/caracal/caracalctl.cfg"

// withStore opens the store for one command.
func (g *globals) withStore(ctx context.Context, fn func(store.Store) error) error {
	s, err := OpenStore(ctx, g.config, g.stateDir)
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.Close())
}

// OpenStore opens the store of this machine alone.
func OpenStore(_ context.Context, file, stateDir string) (store.Store, error) {
	if file != "" || os.Getenv("ETCD_ENDPOINTS") != "" {
		return nil, errors.New("this version knows only the store of one machine; leave --config and ETCD_ENDPOINTS out")
	}
	return bolt.Open(stateDir, bolt.Options{})
}
