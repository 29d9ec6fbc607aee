package lab

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// h1 is a computer of its own: what it is called, its processes, its files, its pins, and what a reboot leaves of them.
func TestMachine(t *testing.T) {
	needPlugins(t)
	l := New(t, Config{Hosts: 2, Conflist: ptp})
	m, err := l.Host(1).Boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sh := func(script, want string) {
		t.Helper()
		out, err := m.Sh(t.Context(), script)
		if err != nil || strings.TrimSpace(out) != want {
			t.Errorf("%s: %q, %v; want %q", script, out, err, want)
		}
	}
	real, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	sh("hostname; pwd; id -u; find /run/netns /opt /usr/local/bin /var/lib /tmp -mindepth 1; ls -d /etc/cni 2>/dev/null || true", "h1\n/root\n0")
	sh("ps -e -o comm= | sort | uniq | tr '\\n' ' '", "bash ps sh sleep sort tr uniq")
	sh("ip -4 -o addr show dev eth0 | awk '{print $4}'; ls /sys/class/net | tr '\\n' ' '", "192.0.2.1/24\neth0 lo")
	sh("cat /proc/self/cgroup | grep -c ':/$'", "10")
	sh("findmnt -n -o FSTYPE /sys/fs/bpf; mkdir -p /etc/cni /opt/cni /var/lib/cni; touch /etc/cni/caracal-x /opt/cni/caracal-x /var/lib/cni/caracal-x /run/caracal-x /tmp/caracal-x /dev/shm/x; mkdir /sys/fs/bpf/caracal_x", "bpf")
	for _, path := range []string{"/etc/cni/caracal-x", "/opt/cni/caracal-x", "/var/lib/cni/caracal-x", "/run/caracal-x", "/tmp/caracal-x", "/dev/shm/x", "/sys/fs/bpf/caracal_x"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s of the machine is on the real one", path)
		}
		if _, err := os.Lstat(m.Path(path)); err != nil {
			t.Errorf("%s is not where Path says: %v", path, err)
		}
	}
	if _, err := m.Boot(t.Context()); !errors.Is(err, ErrExists) {
		t.Errorf("a second start: %v; want ErrExists", err)
	}
	var exit *exec.ExitError
	if _, err := m.Sh(t.Context(), "echo sorry; exit 7"); !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.Contains(err.Error(), "sorry") {
		t.Errorf("a script that fails: %v", err)
	}

	if err := m.StartDaemon("sleeper", "sleep", "1000"); err != nil {
		t.Fatal(err)
	}
	sh("until pgrep -x -f 'sleep 1000' >/dev/null; do sleep 0.01; done; echo 1", "1") // its start is under way
	if err := m.Signal(t.Context(), "sleeper", unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := m.StartDaemon("sleeper", "unshare", "-n", "sleep", "1000"); err != nil { // in a network of its own, as containers are
		t.Fatal(err)
	}
	boot, err := os.ReadFile(m.Path("/proc/sys/kernel/random/boot_id"))
	if err != nil || string(boot) == string(real) {
		t.Errorf("boot id %q, %v; the real machine's is %q", boot, err, real)
	}
	if m, err = m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	sh("ls -d /etc/cni/caracal-x /opt/cni/caracal-x /var/lib/cni/caracal-x /run/caracal-x /tmp/caracal-x /dev/shm/x /sys/fs/bpf/caracal_x 2>/dev/null | tr '\\n' ' '; pgrep -c sleep; ip -4 -o addr show dev eth0 | awk '{print $4}'",
		"/etc/cni/caracal-x /opt/cni/caracal-x /var/lib/cni/caracal-x 1\n192.0.2.1/24")
	if again, err := os.ReadFile(m.Path("/proc/sys/kernel/random/boot_id")); err != nil || string(again) == string(boot) {
		t.Errorf("boot id after a reboot %q, %v; before %q", again, err, boot)
	}
	if found, err := l.Host(1).Machine(); err != nil || found.Path("/") != m.Path("/") {
		t.Errorf("the machine found: %v, %v", found, err)
	}
	if err := m.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host(1).Machine(); !errors.Is(err, ErrNotFound) {
		t.Errorf("a machine that is off: %v; want ErrNotFound", err)
	}
	if groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + m.cgroup()); len(groups) > 0 {
		t.Errorf("control groups left: %v", groups)
	}
}
