package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	etcdClientPort = 2379
	etcdPeerPort   = 2380
	etcdMembers    = 3
	startWithin    = 30 * time.Second
)

// Socket is where the host's agent answers.
func (h *Host) Socket() string { return filepath.Join(h.Dir(), "agent.sock") }

// storeFile says where the lab's store is, shaped like calicoctl.cfg.
func (l *Lab) storeFile() string { return filepath.Join(l.Dir, "caracalctl.cfg") }

// EtcdEndpoints are the client addresses of the lab's etcd members.
func (l *Lab) EtcdEndpoints() string {
	var all []string
	for _, h := range l.etcdHosts() {
		all = append(all, h.etcdURL(etcdClientPort))
	}
	return strings.Join(all, ",")
}

func (l *Lab) etcdHosts() []*Host {
	hosts := l.Hosts()
	return hosts[:min(len(hosts), etcdMembers)]
}

func (h *Host) etcdURL(port int) string { return fmt.Sprintf("http://%s:%d", h.Addr(), port) }

// StartEtcd starts an etcd member on each of the first three hosts, and waits until the cluster answers. From then on the
// hosts' agents and caracalctl use it.
func (l *Lab) StartEtcd(ctx context.Context) error {
	for _, h := range l.etcdHosts() {
		if err := h.StartEtcdMember(); err != nil {
			return err
		}
	}
	text := "apiVersion: v1\nkind: calicoApiConfig\nmetadata:\nspec:\n  datastoreType: etcdv3\n  etcdEndpoints: " + l.EtcdEndpoints() + "\n"
	if err := os.WriteFile(l.storeFile(), []byte(text), 0o644); err != nil {
		return fmt.Errorf("say where the store is: %w", err)
	}
	return await(ctx, "etcd answers", func() error { return l.etcdHealthy(ctx) })
}

// StartEtcdMember starts the host's etcd member, again after a kill.
func (h *Host) StartEtcdMember() error {
	path, err := exec.LookPath("etcd")
	if err != nil {
		return fmt.Errorf("find etcd: %w; install it (apt-get install etcd-server)", err)
	}
	var initial []string
	for _, o := range h.lab.etcdHosts() {
		initial = append(initial, o.Name+"="+o.etcdURL(etcdPeerPort))
	}
	return h.start("etcd", exec.Command(path,
		"--name", h.Name, "--data-dir", filepath.Join(h.Dir(), "etcd"),
		"--listen-client-urls", h.etcdURL(etcdClientPort), "--advertise-client-urls", h.etcdURL(etcdClientPort),
		"--listen-peer-urls", h.etcdURL(etcdPeerPort), "--initial-advertise-peer-urls", h.etcdURL(etcdPeerPort),
		"--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", h.lab.Name,
		"--heartbeat-interval", "100", "--election-timeout", "1000", "--logger", "zap", "--log-level", "warn"))
}

func (l *Lab) etcdHealthy(ctx context.Context) error {
	for _, h := range l.etcdHosts() {
		err := h.Do(func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.etcdURL(etcdClientPort)+"/health", nil)
			if err != nil {
				return err
			}
			// Dialled on this thread: a pool's connections would be opened by others, elsewhere.
			c, err := dialHere(h.Addr(), etcdClientPort)
			if err != nil {
				return err
			}
			defer c.Close()
			if err := req.Write(c); err != nil {
				return err
			}
			answer := make([]byte, 4096)
			n, err := c.Read(answer)
			if err != nil {
				return err
			}
			if !strings.Contains(string(answer[:n]), `"true"`) {
				return fmt.Errorf("etcd of %s: %q", h.Name, answer[:n])
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// StartAgent starts the host's caracald, again after a kill, and waits until it answers on its socket.
func (h *Host) StartAgent(ctx context.Context, args ...string) error {
	cmd := exec.Command(filepath.Join(h.lab.binDir(), "caracald"), append([]string{
		"--ip", h.file.Addr4.String(), "--ip6", h.file.Addr6.String(), "--health", "127.0.0.1:9099", "--metrics", "127.0.0.1:9091",
	}, args...)...)
	if err := h.start("caracald", cmd); err != nil {
		return err
	}
	return await(ctx, "caracald of "+h.Name+" answers", func() error {
		_, err := h.Exec(ctx, "caracalctl", "node", "status", "-o", "json")
		return err
	})
}

// AgentLog is what the host's agents wrote.
func (h *Host) AgentLog() string { return h.daemonLog("caracald") }

func (h *Host) daemonLog(name string) string { return filepath.Join(h.Dir(), name+".log") }

func (h *Host) pidFile(name string) string { return filepath.Join(h.Dir(), name+".pid") }

// start starts a daemon on the host: it goes on when this process ends, until Down ends it.
func (h *Host) start(name string, cmd *exec.Cmd) error {
	log, err := os.OpenFile(h.daemonLog(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := h.Namespace().Start(cmd); err != nil {
		return fmt.Errorf("start %s on %s: %w", name, h.Name, err)
	}
	go func() { _ = cmd.Wait() }() // how it ended is in its log
	return os.WriteFile(h.pidFile(name), fmt.Append(nil, cmd.Process.Pid), 0o600)
}

// Signal sends a signal to a daemon of the host, "etcd" or "caracald", and with SIGKILL or SIGTERM waits until it is gone.
func (h *Host) Signal(ctx context.Context, name string, s unix.Signal) error {
	pid, err := h.readPid(name)
	if err != nil {
		return err
	}
	if err := unix.Kill(pid, s); err != nil {
		return fmt.Errorf("%s on %s: %w", name, h.Name, err)
	}
	if s != unix.SIGKILL && s != unix.SIGTERM {
		return nil
	}
	return await(ctx, name+" of "+h.Name+" ends", func() error {
		if p, ok := readProcess(pid); ok && !strings.HasPrefix(p.comm, name) || unix.Kill(pid, 0) != nil {
			return nil
		}
		return errors.New("still there")
	})
}

// readPid reads the process id of a daemon of the host.
func (h *Host) readPid(name string) (pid int, err error) {
	text, err := os.ReadFile(h.pidFile(name))
	if err == nil {
		_, err = fmt.Sscan(string(text), &pid)
	}
	if err != nil {
		return 0, fmt.Errorf("%s on %s: %w", name, h.Name, err)
	}
	return pid, nil
}

// await repeats what may not hold yet.
func await(ctx context.Context, what string, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	for {
		err := fn()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, errors.Join(ctx.Err(), err))
		}
	}
}

// dialHere connects from the calling thread's network namespace.
func dialHere(to netip.Addr, port int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	limit := unix.NsecToTimeval(int64(time.Second))
	for _, o := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &limit); err != nil {
			unix.Close(fd)
			return nil, err
		}
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4(), Port: port}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s port %d: %w", to, port, err)
	}
	return os.NewFile(uintptr(fd), "tcp"), nil
}
