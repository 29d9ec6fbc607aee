package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Machine is a host as a computer of its own, for what insists on default paths: container runtimes, units, installers. Beside
// its network it has its own processes, host name, boot id, control groups and bpf file system, and of the file system these
// places: /run, /tmp, /dev/shm, /var, /opt, /usr/local/bin, empty at first, and /etc, a copy without the networks configured on the
// real machine. Everything else, programs above all, is the real machine's. What lies beside Config.Caracal is
// in /root/caracal too, to read.
//
// All of it ends with its first process, and Down ends that.
type Machine struct {
	*Host
	pid int // of its first process
}

//go:embed machine.sh
var machineScript string

// machinePath is PATH on a machine.
const machinePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Boot starts the host as a machine; Machine finds it again.
func (h *Host) Boot(ctx context.Context) (*Machine, error) {
	if _, err := h.Machine(); err == nil {
		return nil, fmt.Errorf("machine %s: %w", h.Name, ErrExists)
	}
	if err := removeCgroups(h.cgroup()); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.disk(), 0o755); err != nil {
		return nil, fmt.Errorf("make the disk of %s: %w", h.Name, err)
	}
	binaries := "" // a lab with a foreign plugin may have none
	if plugin, err := filepath.EvalSymlinks(filepath.Join(h.lab.binDir(), "caracal")); err == nil {
		binaries = filepath.Dir(plugin)
	}
	if err := os.Remove(h.upFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("boot %s: %w", h.Name, err)
	}
	cmd := exec.Command("bash", "-c", machineScript, "machine")
	cmd.Env = []string{"PATH=" + machinePath, "NAME=" + h.Name, "DISK=" + h.disk(), "UP=" + h.upFile(), "BOOT_ID=" + h.BootIDFile(),
		"CGROUP=" + h.cgroup(), "BINARIES=" + binaries}
	if err := h.start("machine", cmd); err != nil {
		return nil, err
	}
	var m *Machine
	err := await(ctx, h.Name+" is up", func() (err error) {
		m, err = h.Machine()
		return err
	})
	if err != nil {
		text, _ := os.ReadFile(h.daemonLog("machine"))
		return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(text))
	}
	return m, nil
}

// Machine finds the machine that Boot has started. The error is ErrNotFound when none is up.
func (h *Host) Machine() (*Machine, error) {
	off := fmt.Errorf("machine %s: %w", h.Name, ErrNotFound)
	if up, err := os.ReadFile(h.upFile()); err != nil || len(up) == 0 {
		return nil, off
	}
	pid, err := h.readPid("machine") // of unshare, whose only child is the machine's first process
	if err != nil {
		return nil, err
	}
	first, err := onlyChild(pid)
	if err != nil || !hasEnv(first, marker+"="+h.lab.Name) {
		return nil, off
	}
	return &Machine{Host: h, pid: first}, nil
}

// onlyChild is the child of a process that has one.
func onlyChild(pid int) (child int, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, fmt.Errorf("find the child of process %d: %w", pid, err)
	}
	if _, err = fmt.Sscan(string(text), &child); err != nil {
		return 0, fmt.Errorf("find the child of process %d: it has none", pid)
	}
	return child, nil
}

func (h *Host) disk() string   { return filepath.Join(h.Dir(), "disk") }
func (h *Host) upFile() string { return filepath.Join(h.Dir(), "machine.up") }
func (h *Host) cgroup() string { return cgroupPrefix + h.lab.Name + "-" + h.Name }

const cgroupPrefix = "caracal-lab-"

// Path is where a path of the machine lies for others.
func (m *Machine) Path(path string) string { return fmt.Sprintf("/proc/%d/root%s", m.pid, path) }

// enter puts a process into the machine's control groups, and becomes the program that is meant.
const enter = `for c in /sys/fs/cgroup/*/cgroup.procs; do echo $$ >"$c"; done; exec "$@"`

// Command is a program that will run on the machine, as root in /root, with a login's environment. Ending ctx ends it, though not
// what it has started.
func (m *Machine) Command(ctx context.Context, name string, arg ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", fmt.Sprint(m.pid), "-m", "-u", "-i", "-n", "-p", "-C",
		"--wdns=/root", "--", "sh", "-c", enter, "sh", name}, arg...)...)
	cmd.Env = []string{"PATH=" + machinePath, "HOME=/root", "LANG=C.UTF-8", marker + "=" + m.lab.Name}
	cmd.WaitDelay = time.Second
	return cmd
}

// Sh runs a shell script on the machine, and returns what it wrote, stdout and stderr together. The error holds it too, and an
// *exec.ExitError.
func (m *Machine) Sh(ctx context.Context, script string) (string, error) {
	cmd := m.Command(ctx, "sh", "-c", script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w: %s", m.Name, script, err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// StartDaemon starts a daemon on the machine; its output goes to /var/log/NAME.log there. It goes on when this process ends, until
// PowerOff or Down. Signal ends it by its name.
func (m *Machine) StartDaemon(name string, arg ...string) error {
	return m.Start(name, m.Command(context.Background(), arg[0], arg[1:]...))
}

// Start is StartDaemon for a command that Command made.
func (m *Machine) Start(name string, cmd *exec.Cmd) error {
	log, err := os.OpenFile(m.Path("/var/log/"+name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, 0
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, m.Name, err)
	}
	go func() { _ = cmd.Wait() }()
	var pid int // nsenter has made a child for the pid namespace: that is the daemon
	err = await(context.Background(), name+" runs", func() (err error) {
		pid, err = onlyChild(cmd.Process.Pid)
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(m.pidFile(name), fmt.Append(nil, pid), 0o600)
}

// PowerOff ends the machine as a cut of the power does. What it had on disk stays for the next Boot; its network namespace, with
// all routes, stays too (see Reboot).
func (m *Machine) PowerOff(ctx context.Context) error {
	if err := unix.Kill(m.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("power off %s: %w", m.Name, err)
	}
	err := await(ctx, m.Name+" is off", func() error {
		if _, ok := readProcess(m.pid); ok {
			return errors.New("its first process is there")
		}
		return nil
	})
	if err != nil {
		return err
	}
	return await(ctx, "control groups of "+m.Name+" are empty", func() error { return removeCgroups(m.cgroup()) })
}

// Reboot is PowerOff, and a start with a new boot id and a new network namespace with the uplink as it was. m is of no use
// afterwards.
func (m *Machine) Reboot(ctx context.Context) (*Machine, error) {
	if err := m.PowerOff(ctx); err != nil {
		return nil, err
	}
	if err := m.Host.Reboot(ctx); err != nil {
		return nil, err
	}
	return m.Boot(ctx)
}

// removeCgroups removes a control group, and all below it, from every hierarchy. None there is not an error.
func removeCgroups(name string) error {
	tops, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
	if err != nil {
		return fmt.Errorf("list control groups: %w", err)
	}
	var errs []error
	for _, top := range tops {
		var dirs []string
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil // gone meanwhile
		})
		errs = append(errs, err)
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove control group %s: %w", strings.TrimPrefix(dirs[i], "/sys/fs/cgroup/"), err))
			}
		}
	}
	return errors.Join(errs...)
}
