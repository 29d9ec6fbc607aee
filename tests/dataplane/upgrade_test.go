package dataplane

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/tests/bpffs"
)

// lossless keeps packets going between a and b, to and fro, while fn runs, and fails if one is lost. Nothing but b's
// answer makes a send again, so one lost packet ends it.
func lossless(t *testing.T, n *node, a, b *pod, port int, fn func()) {
	t.Helper()
	afd, bfd := a.socket(t, unix.SOCK_DGRAM, port, false), b.socket(t, unix.SOCK_DGRAM, port, false)
	for fd, to := range map[int]*pod{afd: b, bfd: a} {
		if err := connectTo(fd, sockaddr(to.v4, port)); err != nil {
			t.Fatal(err)
		}
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	trips := 0
	trip := func() error {
		buf := make([]byte, 10)
		for _, s := range [][2]int{{afd, bfd}, {bfd, afd}} {
			if _, err := writeTo(s[0], []byte("ping")); err != nil {
				return err
			}
			if _, err := readFrom(s[1], buf); err != nil {
				return fmt.Errorf("trip %d: %w", trips, err)
			}
		}
		trips++
		return nil
	}
	for range 100 {
		if err := trip(); err != nil {
			t.Fatal(err)
		}
	}
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if err := trip(); err != nil {
				done <- err
				return
			}
		}
	}()
	fn()
	close(stop)
	if err := <-done; err != nil {
		t.Errorf("packet lost: %v; counts %v", err, n.counts())
	}
}

// Interfaces move from clsact to TCX and no packet is lost.
func TestSettleUnderTraffic(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.Quick), n.addPod("b", 2, loader.Quick)
	lossless(t, n, a, b, 4000, func() {
		for _, p := range []*pod{a, b} {
			n.do(func() error { return loader.Settle(n.dir, p.hostIf, p.commit.IfIndex) })
		}
	})
	for _, p := range []*pod{a, b} {
		n.do(func() error {
			if how, err := loader.Attached(n.dir, p.hostIf, p.commit.IfIndex); how != loader.ByTCX {
				return fmt.Errorf("%s is attached by %q: %w", p.name, how, err)
			}
			return nil
		})
	}
}

// A running node gets other programs; no packet is lost and flows are kept.
func TestUpgradeUnderTraffic(t *testing.T) {
	for name, mode := range map[string]loader.Mode{"clsact": loader.Quick, "tcx": loader.TCX} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, loader.Config{})
			a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
			client, server := connect(t, a, b, false)
			opened := n.state().Flows
			lossless(t, n, a, b, 4000, func() {
				for i := range 3 {
					n.do(func() error {
						return loader.Upgrade(loader.Config{Dir: n.dir, Timeouts: loader.Timeouts{UDP: time.Minute + time.Duration(i)}})
					})
				}
			})
			for _, p := range []*pod{a, b} {
				n.do(func() error {
					_, err := loader.Attached(n.dir, p.hostIf, p.commit.IfIndex)
					return err
				})
			}
			if s := n.state(); s.Flows != opened+1 {
				t.Errorf("%d flows, want %d", s.Flows, opened+1)
			}
			before := n.counts()
			if _, err := writeTo(client, []byte("still there?")); err != nil {
				t.Fatal(err)
			}
			if k, err := readFrom(server, make([]byte, 100)); k != 12 {
				t.Errorf("read %d bytes: %v; counts %v", k, err, n.since(before))
			}
		})
	}
}

// Who has the agent's capabilities alone, as in the pod of a DaemonSet, upgrades all there is.
func TestUpgradeByTheAgent(t *testing.T) {
	for name, mode := range map[string]loader.Mode{"clsact": loader.Quick, "tcx": loader.TCX} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, loader.Config{})
			p := n.addPod("a", 1, mode)
			n.do(func() error {
				return without(unix.CAP_SYS_ADMIN, func() error {
					return loader.Upgrade(loader.Config{Dir: n.dir, Timeouts: loader.Timeouts{UDP: time.Minute}})
				})
			})
			n.do(func() error {
				_, err := loader.Attached(n.dir, p.hostIf, p.commit.IfIndex)
				return err
			})
		})
	}
}

// without runs fn on a thread that lacks a capability meanwhile. The thread must be the caller's own.
func without(capability uint, fn func() error) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	if err := unix.Capget(&header, &had[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	less := had
	less[capability/32].Effective &^= 1 << (capability % 32)
	if err := unix.Capset(&header, &less[0]); err != nil {
		return fmt.Errorf("drop capability %d: %w", capability, err)
	}
	return errors.Join(fn(), unix.Capset(&header, &had[0]))
}

// Two nodes on one kernel know nothing of each other: the same addresses, the same interface numbers.
func TestTwoNodes(t *testing.T) {
	root := bpffs.Mount(t)
	one := newNode(t, loader.Config{Dir: filepath.Join(root, "node")})
	two := newNode(t, loader.Config{Dir: filepath.Join(root, "node-2")})
	a1, b1 := one.addPod("a", 1, loader.Quick), one.addPod("b", 2, loader.Quick)
	a2, b2 := two.addPod("a", 1, loader.Quick), two.addPod("b", 2, loader.Quick)
	if a1.commit.IfIndex != a2.commit.IfIndex {
		t.Fatalf("interfaces %d and %d, want the same numbers", a1.commit.IfIndex, a2.commit.IfIndex)
	}
	lossless(t, two, a2, b2, 4000, func() {
		lossless(t, one, a1, b1, 4000, func() {})
		two.policy(b2, 0, 0)
		one.policy(b1, 9, 9)
		// From the wrong namespace: the other node's interfaces, of the same numbers, keep their programs.
		two.do(func() error {
			return loader.Upgrade(loader.Config{Dir: one.dir, Timeouts: loader.Timeouts{UDP: time.Minute}})
		})
		two.do(func() error { return loader.Unload(one.dir) })
	})
	two.do(func() error {
		_, err := loader.Attached(two.dir, a2.hostIf, a2.commit.IfIndex)
		return err
	})
}
