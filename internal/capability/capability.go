// Package capability says which capabilities of Linux (capabilities(7)) a process lacks.
package capability

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Capability is one, as linux/capability.h numbers them.
type Capability int

// The capabilities that Caracal takes.
const (
	NetBindService Capability = unix.CAP_NET_BIND_SERVICE
	NetAdmin       Capability = unix.CAP_NET_ADMIN
	SysAdmin       Capability = unix.CAP_SYS_ADMIN
	Perfmon        Capability = unix.CAP_PERFMON
	BPF            Capability = unix.CAP_BPF
)

var names = map[Capability]string{
	NetBindService: "CAP_NET_BIND_SERVICE", NetAdmin: "CAP_NET_ADMIN", SysAdmin: "CAP_SYS_ADMIN", Perfmon: "CAP_PERFMON", BPF: "CAP_BPF",
}

// String is its name: "CAP_BPF".
func (c Capability) String() string { return names[c] }

// Need returns nil if this thread has all of these capabilities, else an error that names the missing ones. CAP_SYS_ADMIN
// stands for CAP_BPF and CAP_PERFMON too, as it does in the kernel.
func Need(program string, all ...Capability) error {
	has, err := effective()
	if err != nil {
		return err
	}
	var missing []string
	for _, c := range all {
		if has&(1<<c) == 0 && ((c != BPF && c != Perfmon) || has&(1<<SysAdmin) == 0) {
			missing = append(missing, c.String())
		}
	}
	if missing == nil {
		return nil
	}
	return fmt.Errorf("%s lacks %s: run it as root; give a container --cap-add, a systemd unit CapabilityBoundingSet=, the capability",
		program, strings.Join(missing, ", "))
}

func effective() (uint64, error) {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		return 0, fmt.Errorf("read capabilities: %w", err)
	}
	return uint64(data[0].Effective) | uint64(data[1].Effective)<<32, nil
}
