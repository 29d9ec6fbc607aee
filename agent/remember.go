package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// An agent that begins while the store is away can't leave the other nodes alone: their agents keep this node's routes only as long as a
// restart takes (120 s). So what the store said last of nodes, pools, blocks and BGP lies in the state directory, and by that it goes on
// announcing and learning routes, and writes nothing of its own into the store.

// rememberAfter is how long changes are collected before they are kept.
const rememberAfter = 2 * time.Second

// Picture is a file in the state directory with what the store said last: a JSON object, resources by their keys. Another is in its
// place as PictureNew first.
const (
	Picture    = "cluster.json"
	PictureNew = Picture + ".new"
)

// kept are the kinds of resources that are kept, beside blocks.
var kept = []string{"Node", "IPPool", "BGPConfiguration", "BGPPeer", "BGPFilter"}

// remember keeps the picture in the state directory, whenever it has changed, until ctx ends.
func (c *cluster) remember(ctx context.Context) {
	prefixes := []string{blocksPrefix}
	for _, name := range kept {
		if kind, err := api.FindKind(name); err == nil {
			prefixes = append(prefixes, kind.Key("", ""))
		}
	}
	for {
		select {
		case <-c.keep:
		case <-ctx.Done():
			return
		}
		picture := make(map[string]json.RawMessage)
		c.mu.Lock()
		for key, kv := range c.kvs {
			if json.Valid(kv.Value) && slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key, p) }) {
				picture[key] = kv.Value
			}
		}
		c.mu.Unlock()
		text, err := json.Marshal(picture)
		if err == nil {
			err = c.put(text)
		}
		if err != nil {
			c.a.Log.Warn("keep what the store said", "error", err)
		}
		select {
		case <-time.After(rememberAfter):
		case <-ctx.Done():
			return
		}
	}
}

// put keeps a picture: it is there whole, or the one before. It need not outlive a crash of the machine, which ends the pods as well.
func (c *cluster) put(text []byte) error {
	aside := filepath.Join(c.a.StateDir, PictureNew)
	if err := os.WriteFile(aside, text, 0o600); err != nil {
		return err
	}
	return os.Rename(aside, filepath.Join(c.a.StateDir, Picture))
}

// recall is the picture that was kept last; nil: there is none.
func (c *cluster) recall() (*view, error) {
	path := filepath.Join(c.a.StateDir, Picture)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var picture map[string]json.RawMessage
	if err := json.Unmarshal(text, &picture); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	kvs := make(map[string]store.KV)
	for key, value := range picture {
		kvs[key] = store.KV{Key: key, Value: value}
	}
	v, _ := c.read(kvs) // what can't be read was a problem when it was heard
	return v, nil
}

// goOn does for the other nodes what an agent can that has not heard the store: it tells them of the blocks that pods here have
// addresses of, and learns theirs, by what was heard last. The store's own trouble is a problem already; what of this fails is one as well.
func (a *Agent) goOn(ctx context.Context) (err error) {
	defer func() {
		if ctx.Err() == nil {
			a.problem("bgp", err)
		}
	}()
	a.mu.Lock()
	_, away := a.problems["store"]
	a.mu.Unlock()
	if !away { // it is about to answer
		return nil
	}
	v, err := a.cluster.recall()
	if err != nil || v == nil {
		return err
	}
	self := v.nodes[a.Node]
	if self == nil || self.BGP == nil {
		return nil
	}
	if _, err := a.instance(ctx); err != nil { // opens node.db, which gives back what an earlier boot left
		return err
	}
	here, err := a.local(ctx)
	if err != nil {
		return err
	}
	var own []netip.Prefix
	for _, b := range here.blocks {
		if _, taken := v.rival(a.Node, b.CIDR); v.blocks[b.CIDR].Node == a.Node || b.Used > 0 && !taken {
			own = append(own, b.CIDR)
		}
	}
	errs := []error{a.setTunnel(ctx, v, self), a.attachUplinks(v, self), a.masquerade(ctx, v, self)}
	_, err = a.peer(ctx, v, self, own)
	errs = append(errs, err, a.routes.sync(ctx, v, own, a.tunnel))
	a.show(own, false)
	return errors.Join(errs...)
}
