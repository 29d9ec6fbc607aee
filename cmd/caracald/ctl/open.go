package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// patience is how long a reading command waits for a writer of node.db.
const patience = 10 * time.Second

func (g *globals) options() node.Options {
	return node.Options{Wait: patience, BootIDFile: g.bootIDFile}
}

// view runs fn on the node's database, which stays as it is.
func (g *globals) view(ctx context.Context, fn func(*node.Tx) error) error {
	db, err := node.OpenReadOnly(ctx, g.stateDir, g.options())
	if err != nil {
		return g.explainDB(err)
	}
	defer db.Close()
	return g.explainDB(db.View(fn))
}

// explainDB adds the way out to an error of node.db.
func (g *globals) explainDB(err error) error {
	switch {
	case errors.Is(err, node.ErrNoDatabase):
		return fmt.Errorf("%w in %s: no pod was added on this node yet, or --state-dir is another one", node.ErrNoDatabase, g.stateDir)
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return fmt.Errorf("%w; run caracalctl as root", err)
	}
	return err
}

// maps opens the node's kernel maps.
func (g *globals) maps() (*maps.Maps, error) {
	m, err := maps.Open(g.bpffsDir)
	if err == nil {
		if err = g.checkSchema(m); err == nil {
			return m, nil
		}
		m.Close()
	}
	return nil, g.explainBPF(err)
}

// checkSchema refuses maps of another layout.
func (g *globals) checkSchema(m *maps.Maps) error {
	s, err := m.State()
	if err != nil {
		return err
	}
	if s.Version != loader.SchemaVersion {
		return fmt.Errorf("%s: %w: %d, this caracalctl knows %d; use the one that belongs to the plugin", g.bpffsDir, loader.ErrVersion, s.Version, loader.SchemaVersion)
	}
	return nil
}

// explainBPF adds the way out to an error about the pinned maps and programs.
func (g *globals) explainBPF(err error) error {
	switch {
	case errors.Is(err, maps.ErrNotLoaded), errors.Is(err, loader.ErrNotLoaded):
		return g.notLoaded()
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if os.Geteuid() != 0 {
			return fmt.Errorf("%w; reading kernel maps takes root", err)
		}
	}
	return err
}

// notLoaded says why nothing is pinned where it was looked for.
func (g *globals) notLoaded() error {
	near := g.bpffsDir
	for near != "/" && near != "." {
		if _, err := os.Stat(near); err == nil {
			break
		}
		near = filepath.Dir(near)
	}
	if err := loader.CheckBPFFS(near); errors.Is(err, loader.ErrNotBPFFS) {
		return fmt.Errorf("%s is %w: mount one (mount -t bpf bpf /sys/fs/bpf), leave the private mount namespace (`ip netns exec` makes one; nsenter --net does not), or give --bpffs-dir", near, loader.ErrNotBPFFS)
	}
	return fmt.Errorf("%w: no programs are pinned in %s: no pod was added on this node yet, or --bpffs-dir is another one", errNotLoaded, g.bpffsDir)
}

var errNotLoaded = errors.New("nothing is loaded")
