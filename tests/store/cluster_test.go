// Package store_test runs the stores' conformance suite and what can go wrong with a cluster against real etcd: three
// members on loopback, which are killed, cut off, compacted and given bad certificates.
package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/store/storetest"
)

// member is one etcd process.
type member struct {
	name, dir    string
	client, peer string // URLs
	args         []string
	cmd          *exec.Cmd
	out          bytes.Buffer
}

// cluster is members that know each other.
type cluster struct {
	members []*member
}

// startCluster starts n members and waits until they have a leader. clientTLS are arguments that make the client side
// speak TLS.
func startCluster(t testing.TB, n int, clientTLS ...string) *cluster {
	t.Helper()
	binary, err := exec.LookPath("etcd")
	if err != nil {
		t.Fatalf("these tests need etcd: install etcd-server (%v)", err)
	}
	scheme := "http"
	if len(clientTLS) > 0 {
		scheme = "https"
	}
	c := &cluster{}
	dir := t.TempDir()
	var all []string
	for i := range n {
		m := &member{
			name:   fmt.Sprintf("m%d", i),
			dir:    filepath.Join(dir, fmt.Sprintf("m%d", i)),
			client: scheme + "://" + freeAddr(t),
			peer:   "http://" + freeAddr(t),
		}
		c.members = append(c.members, m)
		all = append(all, m.name+"="+m.peer)
	}
	for _, m := range c.members {
		m.args = append([]string{binary,
			"--name", m.name, "--data-dir", m.dir,
			"--listen-client-urls", m.client, "--advertise-client-urls", m.client,
			"--listen-peer-urls", m.peer, "--initial-advertise-peer-urls", m.peer,
			"--initial-cluster", strings.Join(all, ","), "--initial-cluster-state", "new",
			"--heartbeat-interval", "50", "--election-timeout", "500",
			"--unsafe-no-fsync", "--logger", "zap", "--log-level", "error",
		}, clientTLS...)
		m.start(t)
		t.Cleanup(func() { m.kill(t) })
	}
	if len(clientTLS) == 0 {
		c.await(t)
	}
	return c
}

// slack is what a busy machine may take beyond a deadline.
const slack = 3 * time.Second

// given are the addresses that freeAddr returned.
var given sync.Map

// freeAddr is an address of loopback that nobody listens on. It is not reserved: when another program takes it in the
// meantime, the member ends.
func freeAddr(t testing.TB) string {
	t.Helper()
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		addr := l.Addr().String()
		if _, taken := given.LoadOrStore(addr, true); !taken {
			return addr
		}
	}
}

func (m *member) start(t testing.TB) {
	t.Helper()
	m.cmd = exec.Command(m.args[0], m.args[1:]...)
	m.cmd.Env = append(os.Environ(), "ETCD_UNSUPPORTED_ARCH="+runtime.GOARCH) // what etcd 3.4 wants to hear on arm64
	m.cmd.Stdout, m.cmd.Stderr = &m.out, &m.out
	m.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		t.Fatalf("start etcd: %v", err)
	}
}

// kill ends a member as a power failure does.
func (m *member) kill(t testing.TB) {
	t.Helper()
	if m.cmd == nil {
		return
	}
	if err := m.cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Errorf("etcd %s had ended already: %v\n%s", m.name, err, m.out.String())
	}
	m.cmd.Wait()
	m.cmd = nil
}

// signal stops or continues a member: one that is stopped is there for the network but answers nothing.
func (m *member) signal(t testing.TB, s unix.Signal) {
	t.Helper()
	if err := m.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) endpoints() []string {
	var all []string
	for _, m := range c.members {
		all = append(all, m.client)
	}
	return all
}

// await waits until every member that runs serves.
func (c *cluster) await(t testing.TB) {
	t.Helper()
	for _, m := range c.members {
		if m.cmd == nil {
			continue
		}
		s := open(t, etcd.Config{Endpoints: []string{m.client}, Timeout: time.Second})
		until(t, "etcd "+m.name+" serves", func() error {
			_, _, err := s.List(context.Background(), "/none")
			return err
		})
		s.Close()
	}
}

// until waits for a condition.
func until(t testing.TB, what string, fn func() error) {
	t.Helper()
	deadline := time.Now().Add(storetest.Deadline)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("never came: %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func open(t testing.TB, cfg etcd.Config) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// raw is a client of the library's own, for what administrators do.
func (c *cluster) raw(t testing.TB) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: c.endpoints(), DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// leader is the member that leads.
func (c *cluster) leader(t testing.TB) *member {
	t.Helper()
	client := c.raw(t)
	var found *member
	until(t, "a leader", func() error {
		for _, m := range c.members {
			if m.cmd == nil {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			st, err := client.Status(ctx, m.client)
			cancel()
			if err == nil && st.Leader == st.Header.MemberId {
				found = m
				return nil
			}
		}
		return errors.New("none")
	})
	return found
}
