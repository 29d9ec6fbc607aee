//go:build faults

// Package fault fails a program at a step of its work, for tests: only in binaries that are built for it (-tags faults).
package fault

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Step fails, dies or stops at the step that CARACAL_FAULT names: "veth:error", "veth:kill", "veth:stop", which SIGCONT ends.
func Step(name string) error {
	at, how, _ := strings.Cut(os.Getenv("CARACAL_FAULT"), ":")
	if at != name {
		return nil
	}
	switch how {
	case "kill":
		unix.Kill(unix.Getpid(), unix.SIGKILL)
		select {}
	case "stop":
		return unix.Kill(unix.Getpid(), unix.SIGSTOP)
	}
	return fmt.Errorf("fault injected at %s", name)
}
