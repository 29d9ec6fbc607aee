//go:build faults

package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// step fails or dies at the step that CARACAL_FAULT names: "veth:error", "veth:kill".
func step(name string) error {
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
