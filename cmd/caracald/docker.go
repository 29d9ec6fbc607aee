package main

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/pflag"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/cmd/caracald/ctl"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/docker"
	"github.com/caracal-net/caracal/internal/capability"
	"github.com/caracal-net/caracal/store"
)

// addDockerFlags adds what Docker's drivers are told.
func addDockerFlags(f *pflag.FlagSet, d *docker.Config) {
	f.StringSliceVar(&d.Names, "docker", splitList(os.Getenv("CARACAL_DOCKER")), "serve Docker's libnetwork as drivers `NAME` and NAME-ipam: caracal, calico, or both (env CARACAL_DOCKER, with commas between)")
	f.StringVar(&d.Scope, "docker-scope", ctl.FromEnv("CARACAL_DOCKER_SCOPE", "local"), "local, or global: networks of all daemons with one --cluster-store, which Docker 20.10 was the last to have (env CARACAL_DOCKER_SCOPE)")
	f.StringVar(&d.Plugins, "docker-plugins", docker.DefaultPlugins, "`DIR` where Docker looks for plugins")
	f.StringVar(&d.Engine, "docker-engine", ctl.FromEnv("CARACAL_DOCKER_ENGINE", docker.DefaultEngine), "Docker's `SOCKET`, asked for names and labels; empty: nobody is (env CARACAL_DOCKER_ENGINE)")
}

// serve runs the agent, and Docker's drivers if there are to be any, until ctx ends or one of them does.
func serve(ctx context.Context, c agent.Config, d docker.Config, s store.Store) error {
	if len(d.Names) == 0 {
		return agent.Run(ctx, c, s)
	}
	if c.Socket == "" {
		return errors.New("--docker needs a --socket, on which policy is asked for")
	}
	if err := capability.Need("caracald --docker", capability.SysAdmin); err != nil { // to enter containers' namespaces
		return err
	}
	d.Node, d.Log = c.Node, c.Log
	d.CNI = cni.Config{NodeName: c.Node, StateDir: c.StateDir, BPFFSDir: c.BPFFSDir, BootIDFile: c.BootIDFile, AgentSocket: c.Socket}
	drivers, err := docker.Listen(d, s)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() {
		defer cancel()
		served <- drivers.Serve(ctx)
	}()
	err = agent.Run(ctx, c, s)
	cancel()
	return errors.Join(err, <-served)
}
