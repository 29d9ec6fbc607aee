// Command caracald is Caracal on a node. Called as caracalctl it is the operator's tool.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cmd/caracald/ctl"
)

func main() { os.Exit(run()) }

func run() int {
	if name := filepath.Base(os.Args[0]); name != "caracalctl" {
		fmt.Fprintf(os.Stderr, "%s: the agent is not part of this version; pods need none. For the operator's tool call this program caracalctl (ln -s caracald caracalctl)\n", name)
		return ctl.ExitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	return ctl.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
}
