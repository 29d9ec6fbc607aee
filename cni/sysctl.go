package cni

import (
	"errors"
	"io/fs"
	"os"

	"github.com/caracal-net/caracal/node"
)

// SysctlSetting is the prefix of the node's settings that hold what a machine-wide sysctl was before Caracal set it:
// its name below /proc/sys/net follows.
const SysctlSetting = "sysctl/"

// sysctl is one machine-wide setting to make.
type sysctl struct{ name, value, before string }

// forwarding lists what this host lacks to be a router. Turning IPv6 forwarding on would stop it from accepting router
// advertisements where it does; accept_ra 2 keeps that.
func forwarding(v6 bool) ([]sysctl, error) {
	var todo []sysctl
	want := func(name, value string) error {
		before, err := readSysctl(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the kernel has not this family
		}
		if err == nil && before != value {
			todo = append(todo, sysctl{name, value, before})
		}
		return err
	}
	if err := want("ipv4/ip_forward", "1"); err != nil || !v6 {
		return todo, err
	}
	already := len(todo)
	if err := want("ipv6/conf/all/forwarding", "1"); err != nil || len(todo) == already {
		return todo, err
	}
	interfaces, err := os.ReadDir(sysctlPath("ipv6/conf"))
	if err != nil {
		return nil, err
	}
	var accept []sysctl
	for _, i := range interfaces {
		name := "ipv6/conf/" + i.Name() + "/accept_ra"
		if v, err := readSysctl(name); err == nil && v == "1" && i.Name() != "all" {
			accept = append(accept, sysctl{name, "2", v})
		}
	}
	return append(accept, todo...), nil
}

// recordSysctls notes what will be changed, before it is, for uninstall to restore. The first note of a sysctl stays.
func recordSysctls(tx *node.Tx, todo []sysctl) error {
	for _, s := range todo {
		if tx.Setting(SysctlSetting+s.name) != "" {
			continue
		}
		if err := tx.PutSetting(SysctlSetting+s.name, s.before); err != nil {
			return err
		}
	}
	return nil
}

func writeSysctls(todo []sysctl) error {
	for _, s := range todo {
		if err := writeSysctl(s.name, s.value); err != nil {
			return err
		}
	}
	return nil
}

// RestoreSysctls puts back what was there before Caracal, by the node's settings, and returns what it restored.
func RestoreSysctls(tx *node.Tx) ([]string, error) {
	var restored []string
	var errs []error
	err := tx.Settings(SysctlSetting, func(name, value string) error {
		name = name[len(SysctlSetting):]
		if err := writeSysctl(name, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			return nil
		}
		restored = append(restored, name+" = "+value)
		return nil
	})
	return restored, errors.Join(append(errs, err)...)
}
