//go:build faults

// Package fault fails a program at a step of its work, for tests: only in binaries that are built for it (-tags faults).
package fault

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Step fails or dies at the step that CARACAL_FAULT names: "veth:error", "veth:kill".
func Step(name string) error {
	at, how, _ := strings.Cut(os.Getenv("CARACAL_FAULT"), ":")
	if at != name {
		return nil
	}
	if how == "kill" {
		unix.Kill(unix.Getpid(), unix.SIGKILL)
		select {}
	}
	return fmt.Errorf("fault injected at %s", name)
}
