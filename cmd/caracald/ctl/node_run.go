package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// DefaultLogFile is where an agent that node run has started writes.
const DefaultLogFile = "/var/log/caracal/caracald.log"

type nodeRunOptions struct {
	*globals
	dryRun  bool
	image   string // none: directly
	docker  string // the program that runs it
	logFile string
	timeout time.Duration
}

func newNodeRunCommand(g *globals) *cobra.Command {
	o := &nodeRunOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "run [-- CARACALD ARGUMENTS]",
		Short: "Start this node's agent and wait until it has done its work once",
		Long: `run starts caracald in the background, shows what it logs, and returns when the node is as the store says and
knows the way to the pods of the other nodes; for that it waits 5 seconds at most, and says whom it has not heard. caracald goes on
when run is interrupted. A service manager does this better: see caracalctl install --agent. With --node-image it runs caracald as a
container, with what it needs of the host and no more; Docker starts it again when it ends.

Exit code 1: it ended again, or was not done in time; it then goes on trying.`,
		Example: `  caracalctl node run --dry-run
  caracalctl -c /etc/calico/calicoctl.cfg node run -- --ip 10.0.0.1/24
  caracalctl node run --node-image=caracal:v1 -c /etc/calico/calicoctl.cfg`,
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args) },
	}
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show the command and start nothing")
	cmd.Flags().StringVar(&o.image, "node-image", "", "`IMAGE` to run it in; none: directly")
	cmd.Flags().StringVar(&o.docker, "docker", "docker", "`PROGRAM` that runs the image")
	cmd.Flags().StringVar(&o.logFile, "log-file", DefaultLogFile, "`FILE` that it writes to")
	cmd.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

func (o *nodeRunOptions) run(cmd *cobra.Command, args []string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find caracald: %w", err)
	}
	argv := []string{"--state-dir", o.stateDir, "--bpffs-dir", o.bpffsDir, "--socket", o.socket}
	if o.config != "" {
		argv = append(argv, "--config", o.config)
	}
	if o.bootIDFile != "" {
		argv = append(argv, "--boot-id-file", o.bootIDFile)
	}
	argv = append(argv, args...)
	if o.image != "" {
		return o.runImage(cmd, argv)
	}
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "Running command to start the node:\n\n%s %s >> %s\n\n", filepath.Join(filepath.Dir(self), "caracald"), strings.Join(argv, " "), o.logFile)
	if o.dryRun {
		return nil
	}
	if _, err := agentStatus(cmd.Context(), o.socket); err == nil {
		return fmt.Errorf("%s: an agent answers there already; look at it (caracalctl node status)", o.socket)
	}
	if err := os.MkdirAll(filepath.Dir(o.logFile), 0o755); err != nil {
		return fmt.Errorf("make directory of log: %w", err)
	}
	log, err := os.OpenFile(o.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	agent := &exec.Cmd{Path: self, Args: append([]string{"caracald"}, argv...), Stdout: log, Stderr: log, SysProcAttr: &unix.SysProcAttr{Setsid: true}}
	if err := agent.Start(); err != nil {
		return fmt.Errorf("start caracald: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	tail, err := os.Open(o.logFile)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer tail.Close()
	if _, err := tail.Seek(from, io.SeekStart); err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	return o.await(cmd.Context(), out, follow(tail, out), ended)
}

// syncTimeout is how long a node that is ready is given to learn the routes of the others.
const syncTimeout = 5 * time.Second

// await shows the log until the agent is ready and knows the way to the other nodes' pods.
func (o *nodeRunOptions) await(ctx context.Context, out io.Writer, show func(), ended <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	var ready time.Time
	for {
		show()
		s, err := agentStatus(ctx, o.socket)
		if err == nil && s.Ready && len(s.Problems) == 0 {
			if ready.IsZero() {
				ready = time.Now()
			}
			if s.Synced || time.Since(ready) > syncTimeout {
				show()
				for _, p := range s.Peers {
					if !s.Synced && p.Info != "Established" {
						fmt.Fprintf(out, "The way to the pods behind %s is not known yet (caracalctl node status)\n", p.Address)
					}
				}
				fmt.Fprintln(out, "Caracal node started successfully")
				return nil
			}
		}
		select {
		case err := <-ended:
			show()
			return fmt.Errorf("caracald ended: %w; its log: %s", errors.Join(err, errEnded), o.where())
		case <-ctx.Done():
			if err == nil {
				for _, p := range s.Problems {
					fmt.Fprintf(out, "Problem: %s: %s\n", printable(p.About), printable(p.Text))
				}
			}
			return fmt.Errorf("the node was not ready within %s; caracald goes on trying (caracalctl node status)", o.timeout)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// where says where the log is.
func (o *nodeRunOptions) where() string {
	if o.image != "" {
		return o.docker + " logs " + containerName
	}
	return o.logFile
}

var errEnded = errors.New("it should not")
