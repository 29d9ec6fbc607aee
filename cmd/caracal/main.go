// Command caracal is the CNI plugin. As caracal-ipam (or calico-ipam) it is the IPAM plugin for other main plugins; as
// calico it is itself.
//
// The Go runtime would look now and then how many processors the process may use, though one thread does all the work here;
// and it would give each piece of its memory a name for /proc/self/maps.
//
//go:debug updatemaxprocs=0
//go:debug decoratemappings=0
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/fault"
)

const usage = `caracal is a CNI plugin: a container runtime calls it, with parameters in the environment
and the network configuration on stdin.

A network, as /etc/cni/net.d/10-caracal.conflist:

  {"cniVersion": "1.0.0", "name": "pods", "plugins": [
    {"type": "caracal", "ipam": {"type": "caracal-ipam", "ipv4_pools": ["10.244.0.0/16"]}}]}

By hand:

  echo '{"cniVersion":"1.1.0","name":"pods","type":"caracal"}' | CNI_COMMAND=VERSION caracal

caracalctl shows what it made.
`

func main() {
	if len(os.Args) > 1 {
		os.Exit(background(os.Args[1], os.Args[2:]))
	}
	growStack()
	// The process lives for milliseconds: collecting garbage would cost more than it frees.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(128 << 20)
	stdout, err := ownStdout()
	if err != nil {
		fmt.Fprintln(os.Stderr, "caracal:", err)
		os.Exit(1)
	}
	ctx := context.Background() // a signal ends us as SIGKILL does, and DEL removes what that leaves
	p := &cni.Plugin{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: stdout, Stderr: os.Stderr, Step: fault.Step, Spawn: spawn}
	if strings.HasSuffix(filepath.Base(os.Args[0]), "-ipam") {
		os.Exit(p.IPAMMain(ctx))
	}
	os.Exit(p.Main(ctx))
}

// growStack makes the stack as large as a command will need it, while there is next to nothing on it: the runtime would
// double it step by step and each time walk and copy what it holds by then.
//
//go:noinline
func growStack() byte {
	var frame [12 << 10]byte
	return frame[len(os.Args)]
}

// background runs what the plugin starts beside the runtime.
func background(verb string, args []string) int {
	var err error
	switch verb {
	case "settle":
		err = cni.Settle(context.Background(), args)
	case "reap":
		err = cni.Reap(args)
	case "-h", "--help", "help":
		fmt.Print(usage)
	default:
		err = fmt.Errorf("unknown argument %q\n\n%s", verb, usage)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "caracal:", err)
		return 1
	}
	return 0
}

// ownStdout keeps stdout for the answer alone: whatever any library prints goes to stderr.
func ownStdout() (io.Writer, error) {
	fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("keep stdout: %w", err)
	}
	if err := unix.Dup3(2, 1, 0); err != nil {
		return nil, fmt.Errorf("redirect stdout: %w", err)
	}
	return os.NewFile(uintptr(fd), "stdout"), nil
}

// spawn starts this program detached: it outlives us, and holds neither our terminal, our directory nor our files.
func spawn(args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if _, err := os.Stat(self); err != nil {
		self = "/proc/self/exe" // removed or replaced under us: this very program is still there
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	// Not by os/exec, which would first make a process to learn how it can wait for this one. Nobody waits for it.
	_, err = syscall.ForkExec(self, append([]string{self}, args...), &syscall.ProcAttr{
		Dir: "/", Env: []string{}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	return err
}
