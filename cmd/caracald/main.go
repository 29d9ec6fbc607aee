// Command caracald is Caracal on a node. Called as caracalctl it is the operator's tool.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cmd/caracald/ctl"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if filepath.Base(os.Args[0]) != "caracalctl" {
		return runAgent(ctx, os.Args[1:])
	}
	return ctl.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
}
