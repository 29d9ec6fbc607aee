package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/caracal-net/caracal/internal/netns"
)

// Namespace is a network namespace of a lab, to run things in.
type Namespace struct {
	Netns string // its path
	env   []string
}

// Do runs fn on a thread inside the namespace; sockets opened there stay in it. See netns.NS.Do.
func (n Namespace) Do(fn func() error) error { return netns.Do(n.Netns, fn) }

// Env is the environment of processes of the lab: the caller's, with the lab's bin directory first in the PATH and, on a
// host, CARACAL_STATE_DIR, CARACAL_BPFFS_DIR and CARACAL_BOOT_ID_FILE.
func (n Namespace) Env() []string { return append(os.Environ(), n.env...) }

// Start starts cmd inside the namespace. Only the network namespace changes: mounts, also /sys, stay the caller's. A nil
// cmd.Env becomes Env, otherwise the lab's variables are added. The caller waits for it; Down ends what is still running.
// cmd.SysProcAttr.Pdeathsig must not be set: it would follow a short-lived thread.
func (n Namespace) Start(cmd *exec.Cmd) error {
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, n.env...)
	return n.Do(cmd.Start)
}

// Run is Start and Wait.
func (n Namespace) Run(cmd *exec.Cmd) error {
	if err := n.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// Exec runs a program inside the namespace and returns what it wrote to stdout. The error carries its stderr.
func (n Namespace) Exec(ctx context.Context, arg ...string) (string, error) {
	return n.ExecInput(ctx, "", arg...)
}

// ExecInput is Exec with input on stdin.
func (n Namespace) ExecInput(ctx context.Context, stdin string, arg ...string) (string, error) {
	path, err := n.lookPath(arg[0])
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, path, arg[1:]...)
	cmd.Args[0] = arg[0]
	cmd.WaitDelay = time.Second // a grandchild that keeps the pipe must not hold us
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := n.Run(cmd); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(arg, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// lookPath finds a program as the lab's PATH says.
func (n Namespace) lookPath(name string) (string, error) {
	if !strings.Contains(name, "/") {
		for _, v := range n.env {
			if dirs, ok := strings.CutPrefix(v, "PATH="); ok {
				first, _, _ := strings.Cut(dirs, ":") // the lab's own; the rest is the caller's
				if p := first + "/" + name; isFile(p) {
					return p, nil
				}
			}
		}
	}
	return exec.LookPath(name)
}

// Replace puts a program in the place of the calling one, inside the namespace. It returns only when that fails.
func (n Namespace) Replace(arg []string) error {
	path, err := n.lookPath(arg[0])
	if err != nil {
		return err
	}
	env := dedup(n.Env())
	return n.Do(func() error { // execve from any thread makes it the process
		if err := syscall.Exec(path, arg, env); err != nil {
			return fmt.Errorf("execute %s: %w", path, err)
		}
		return nil
	})
}

// dedup keeps the last value of each variable, as os/exec does.
func dedup(env []string) []string { return (&exec.Cmd{Env: env}).Environ() }
