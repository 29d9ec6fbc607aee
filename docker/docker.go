// Package docker serves Docker's libnetwork: a network driver and an IPAM driver on sockets that dockerd finds. A network is a
// Profile in the store: what may enter its containers. Endpoints are attached as the CNI plugin attaches pods, by package cni,
// and recorded in node.db. Nothing is kept in memory: an agent that begins anew goes on.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	ipamhelper "github.com/docker/go-plugins-helpers/ipam"
	nethelper "github.com/docker/go-plugins-helpers/network"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/socket"
	"github.com/caracal-net/caracal/store"
)

// Where Docker looks for plugins, and where its own API is.
const (
	DefaultPlugins = "/run/docker/plugins"
	DefaultEngine  = "/run/docker.sock"
)

// Config is what the drivers are told.
type Config struct {
	Names   []string // of the network drivers, "caracal" or "calico"; each IPAM driver is NAME-ipam
	Plugins string   // directory of the sockets
	Scope   string   // "local": a network is one daemon's; "global": all daemons' of one --cluster-store
	Engine  string   // Docker's API socket, asked for names and labels; "": nobody is
	Node    string   // this node's name in the store
	CNI     cni.Config
	Log     *slog.Logger

	Step func(name string) error // injects faults; nil: none
}

// Check validates the configuration.
func (c Config) Check() error {
	for i, name := range c.Names {
		if _, ok := spaces[name]; !ok {
			return fmt.Errorf("--docker %q: caracal or calico", name)
		}
		for _, other := range c.Names[:i] {
			if other == name {
				return fmt.Errorf("--docker %s: it is there twice", name)
			}
		}
	}
	if c.Scope != "local" && c.Scope != "global" {
		return fmt.Errorf("--docker-scope %q: local or global", c.Scope)
	}
	return nil
}

// maxShown is how many characters of a request's field are logged.
const maxShown = 200

// takes is how long a request of Docker's may take; Docker itself waits 30 s and more.
const takes = 60 * time.Second

// Drivers serve one node.
type Drivers struct {
	Config
	store     store.Store
	attacher  *cni.Attacher
	engine    *engine // nil: nobody is asked
	ctx       context.Context
	listeners []net.Listener
	working   sync.WaitGroup
	look      chan struct{} // there may be something to learn from Docker
}

// Listen begins to listen: a request waits until Serve runs. The error is socket.ErrInUse when another agent serves a name.
func Listen(c Config, s store.Store) (*Drivers, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	d := &Drivers{Config: c, store: s, attacher: cni.NewAttacher(c.CNI, c.Log, c.Step), look: make(chan struct{}, 1)}
	if c.Engine != "" {
		d.engine = newEngine(c.Engine)
	}
	for _, name := range c.Names {
		for _, file := range []string{name + ".sock", name + "-ipam.sock"} {
			l, err := socket.Listen(filepath.Join(c.Plugins, file))
			if err != nil {
				d.close()
				return nil, fmt.Errorf("docker plugin: %w", err)
			}
			d.listeners = append(d.listeners, l)
		}
	}
	return d, nil
}

func (d *Drivers) close() {
	for _, l := range d.listeners {
		_ = l.Close() // removes the socket
	}
}

// Serve answers Docker, and collects what crashes leave, until ctx ends.
func (d *Drivers) Serve(ctx context.Context) error {
	d.ctx = ctx
	failed := make(chan error, len(d.listeners))
	for i, name := range d.Names {
		network := nethelper.NewHandler(&networkDriver{d, name})
		addresses := ipamhelper.NewHandler(&ipamDriver{d, name})
		go func() { failed <- network.Serve(limited{d.listeners[2*i]}) }()
		go func() { failed <- addresses.Serve(limited{d.listeners[2*i+1]}) }()
	}
	d.Log.Info("serving docker", "drivers", strings.Join(d.Names, ","), "scope", d.Scope, "plugins", d.Plugins)
	d.working.Go(func() { d.tend(ctx) })
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	d.close()
	d.working.Wait()
	return err
}

// request is the life of one of Docker's requests.
func (d *Drivers) request() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(d.ctx), takes)
}

// answer logs what a request of Docker's came to. Docker shows its user the error.
func (d *Drivers) answer(request string, begin time.Time, err *error, attrs ...any) {
	for i, a := range attrs {
		if s, ok := a.(string); ok && len(s) > maxShown {
			attrs[i] = s[:maxShown]
		}
	}
	log := d.Log.With("duration", time.Since(begin).Round(time.Microsecond)).With(attrs...)
	if *err != nil {
		log.Error(request, "error", *err)
		return
	}
	log.Info(request)
}

func (d *Drivers) step(name string) error {
	if d.Step == nil {
		return nil
	}
	return d.Step(name)
}

// errUnsupported says that Docker was asked for something that these networks do not do.
var errUnsupported = errors.New("not supported")
