package ctl

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/bolt"
	"github.com/caracal-net/caracal/store/config"
)

// DefaultConfigFile is where the store is said, if there is one; else calicoctl's is looked for.
const DefaultConfigFile = "/etc/caracal/caracalctl.cfg"

// storeConfig is which store the command is to use: the Kubernetes API that the flags name; else what OpenStore would open; else, where
// that would be this machine's alone and it has none yet, the Kubernetes API by KUBECONFIG or of the cluster whose pod this is.
func (g *globals) storeConfig() (config.Config, error) {
	if g.kubeconfig != "" || g.context != "" {
		return config.Config{Type: config.Kubernetes, Kubernetes: g.kubernetes()}, nil
	}
	file := configFile(g.config)
	c, err := storeConfig(file, g.stateDir)
	if err != nil || c.Type != config.Bolt || file != "" || os.Getenv(config.Variable) != "" {
		return c, err
	}
	if _, err := os.Stat(filepath.Join(c.Dir, bolt.FileName)); err == nil {
		return c, nil
	}
	if os.Getenv("KUBECONFIG") != "" || os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		return config.Config{Type: config.Kubernetes}, nil
	}
	return c, nil
}

// kubernetes is the Kubernetes API that the flags name, else KUBECONFIG, else ~/.kube/config, else that of the pod's cluster.
func (g *globals) kubernetes() kube.Config {
	return kube.Config{Kubeconfig: g.kubeconfig, Context: g.context}
}

// cluster is the Kubernetes API that the store is; false: it is none.
func (g *globals) cluster() (kube.Config, bool) {
	c, err := g.storeConfig()
	return c.Kubernetes, err == nil && c.Type == config.Kubernetes
}

// withStore opens the store for one command.
func (g *globals) withStore(ctx context.Context, fn func(store.Store) error) error {
	c, err := g.storeConfig()
	if err != nil {
		return err
	}
	s, err := config.Open(ctx, c)
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.Close())
}

// OpenStore opens the store that the environment or a file names; where neither does, the one of this machine alone, in
// its state directory.
func OpenStore(ctx context.Context, file, stateDir string) (store.Store, error) {
	c, err := storeConfig(configFile(file), stateDir)
	if err != nil {
		return nil, err
	}
	return config.Open(ctx, c)
}

// configFile is a file, or where none is named the one that is usual, "" if there is none.
func configFile(file string) string {
	for _, usual := range []string{DefaultConfigFile, config.CalicoFile} {
		if _, err := os.Stat(usual); file == "" && err == nil {
			file = usual
		}
	}
	return file
}

// storeConfig is which store a file names, else the environment.
func storeConfig(file, stateDir string) (config.Config, error) {
	c, err := config.Parse(os.Getenv, file)
	if err == nil && os.Getenv(config.Variable) == "" {
		c.Dir = stateDir
	}
	return c, err
}
