package bpf

import (
	"path/filepath"
	"strconv"
	"strings"
)

// Every path in bpffs. dir is a node's own directory, /sys/fs/bpf/caracal unless set otherwise.

// MapPath: /sys/fs/bpf/caracal/<noun>, for the map caracal_<noun>.
func MapPath(dir, name string) string {
	return filepath.Join(dir, strings.TrimPrefix(name, "caracal_"))
}

// ProgramsDir: /sys/fs/bpf/caracal/programs
func ProgramsDir(dir string) string { return filepath.Join(dir, "programs") }

// ProgramPath: /sys/fs/bpf/caracal/programs/<program>
func ProgramPath(dir, program string) string { return filepath.Join(ProgramsDir(dir), program) }

// LinksDir: /sys/fs/bpf/caracal/links
func LinksDir(dir string) string { return filepath.Join(dir, "links") }

// LinkPath: /sys/fs/bpf/caracal/links/<interface>-<program>. bpffs refuses dots and interfaces refuse colons, so a
// dot in the interface's name becomes a colon.
func LinkPath(dir, ifname, program string) string {
	return filepath.Join(LinksDir(dir), strings.ReplaceAll(ifname, ".", ":")+"-"+program)
}

// AsidePath: /sys/fs/bpf/caracal~<pid>, for example, where a process prepares what it then renames to path. No node's directory is
// taken for one.
func AsidePath(path string, pid int) string { return path + "~" + strconv.Itoa(pid) }

// AsideOf is the path that AsidePath gave an aside for, and whether it is one.
func AsideOf(aside string) (string, bool) {
	i := strings.LastIndexByte(aside, '~') // the path may have one as well
	if i < 0 {
		return aside, false
	}
	path, pid := aside[:i], aside[i+1:]
	_, err := strconv.ParseUint(pid, 10, 32)
	return path, err == nil
}

// LinkInterface is the interface in the file name that LinkPath gave for a program, and whether it is one.
func LinkInterface(name, program string) (string, bool) {
	ifname, ok := strings.CutSuffix(name, "-"+program)
	return strings.ReplaceAll(ifname, ":", "."), ok
}
