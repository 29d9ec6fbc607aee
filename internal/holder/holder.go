// Package holder finds out, in /proc, which process has what this one can't get: a port, a socket, a lock.
package holder

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Process names a process as in "process 812 (bird)".
func Process(pid int) string {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	return fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(comm)))
}

// Port names the process that listens on a port ("tcp", "udp") of this network namespace; "" when that can't be told: nobody
// does, or it is in another process namespace, or the kernel itself.
func Port(network string, port int) string {
	for _, table := range []string{network, network + "6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + table)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if inode := listener(line, port); inode != "" {
				if pid := opener("socket:[" + inode + "]"); pid != 0 {
					return Process(pid)
				}
			}
		}
	}
	return ""
}

// Taken says that a port is taken, and by which process, or how to find out for who may do more.
func Taken(network string, port int) string {
	if who := Port(network, port); who != "" {
		return fmt.Sprintf("port %d is taken by %s", port, who)
	}
	return fmt.Sprintf("port %d is taken (ss -lnp tells by which program)", port)
}

// listener is the inode of a line of /proc/net/tcp or /proc/net/udp (proc_pid_net(5)) if that is of a socket without a peer on a
// port.
func listener(line string, port int) string {
	const listens, open = "0A", "07" // of TCP, of UDP
	f := strings.Fields(line)
	if len(f) < 10 || f[3] != listens && f[3] != open || f[9] == "0" {
		return ""
	}
	_, local, _ := strings.Cut(f[1], ":")
	if n, err := strconv.ParseUint(local, 16, 16); err != nil || int(n) != port {
		return ""
	}
	return f[9]
}

// opener is a process that has something open, 0 when none is found.
func opener(what string) int {
	all, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range all {
		if to, err := os.Readlink(fd); err == nil && to == what {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
			return pid
		}
	}
	return 0
}

// Peer names the process that listens where a connection leads; "" when that can't be told.
func Peer(c *net.UnixConn) string {
	raw, err := c.SyscallConn()
	if err != nil {
		return ""
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if pid == 0 {
		return ""
	}
	return Process(pid)
}

// Lock names the process that has a file locked (flock(2)), as far as /proc/locks tells; "" when it does not. The kernel waits for
// an RCU grace period, 10 to 20 ms, before it tells.
func Lock(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return ""
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return ""
	}
	inode := fmt.Sprintf(":%d", st.Ino)
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line)
		if len(f) >= 6 && f[1] == "FLOCK" && strings.HasSuffix(f[5], inode) {
			if pid, err := strconv.Atoi(f[4]); err == nil && pid > 0 {
				return Process(pid)
			}
		}
	}
	return ""
}

// By is " by ..." for a sentence, "" when nobody was found.
func By(who string) string {
	if who == "" {
		return ""
	}
	return " by " + who
}
