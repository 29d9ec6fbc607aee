package datapath

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/podbench/measure"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// Only the last rule matches what is measured, and no two rules are the same.
func TestRules(t *testing.T) {
	pods := netip.MustParsePrefix("10.244.0.2/31")
	a := netip.MustParseAddr("10.244.0.3")
	seen := make(map[rule]bool)
	for i, r := range rules(MaxRules, pods) {
		last := i == MaxRules-1
		server := r.port == 0 || r.port >= measure.FirstPort && r.port <= measure.LastPort
		if seen[r] || server != last || (r.protocol == 0) != last || last && !(r.allow && r.peer == pods) {
			t.Fatalf("rule %d: %+v", i, r)
		}
		if !last && r.allow == r.peer.Contains(a) {
			t.Fatalf("rule %d: %+v", i, r)
		}
		seen[r] = true
	}
	if got := rules(1, pods); len(got) != 1 || !got[0].allow {
		t.Errorf("one rule: %+v", got)
	}
}

func TestAround(t *testing.T) {
	for _, c := range []struct{ a, b, want string }{
		{"10.244.0.2", "10.244.0.3", "10.244.0.2/31"},
		{"10.244.0.1", "10.244.0.2", "10.244.0.0/30"},
		{"10.244.0.255", "10.244.1.0", "10.244.0.0/23"},
	} {
		if got, err := around(netip.MustParseAddr(c.a), netip.MustParseAddr(c.b)); err != nil || got.String() != c.want {
			t.Errorf("around %s and %s: %s, %v", c.a, c.b, got, err)
		}
	}
	if _, err := around(netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")); err == nil {
		t.Error("IPv6 has rules")
	}
}

// TestEnforce has the rules decide: what the last one allows arrives, what one before denies does not.
func TestEnforce(t *testing.T) {
	testenv.NeedRoot(t)
	ctx := context.Background()
	session, err := NewSession()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := session.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"caracal@20", "ptp-iptables@20", "ptp-nft@20"} {
		t.Run(name, func(t *testing.T) {
			spec, err := Builtin(name, Options{Caracal: testenv.Bin(t, "caracal")})
			if err != nil {
				t.Fatal(err)
			}
			n, err := spec.Start(session)
			if err != nil {
				t.Fatal(err)
			}
			a, b, err := n.Pair(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := n.Settle(ctx, a, b); err != nil {
				t.Fatal(err)
			}
			by, err := n.Enforce(ctx, a, b)
			if err != nil || by == "" {
				t.Fatalf("enforced by %q: %v", by, err)
			}
			// A port that no rule is about, one that a rule denies, and the first one again after the flows are gone.
			for _, c := range []struct {
				port uint16
				ok   bool
			}{{measure.FirstPort, true}, {nearPort(0), false}, {nearPort(1), false}, {measure.FirstPort, true}} {
				if err := connects(t, a, b, c.port); (err == nil) != c.ok {
					t.Errorf("port %d: %v, want it to be reached: %v", c.port, err, c.ok)
				}
				if err := n.Forget(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// connects tries to open a TCP connection from a to a port of b, where a socket listens.
func connects(t *testing.T, a, b *Pod, port uint16) error {
	t.Helper()
	to := &unix.SockaddrInet4{Addr: b.Addr.As4(), Port: int(port)}
	open := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	var listener int
	err := b.NS.Do(func() error {
		listener = open()
		return errors.Join(unix.SetsockoptInt(listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(listener, to), unix.Listen(listener, 1))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(listener)
	return a.NS.Do(func() error {
		fd := open()
		defer unix.Close(fd)
		patience := unix.NsecToTimeval(int64(300 * time.Millisecond)) // a connection is open long before
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &patience); err != nil {
			t.Fatal(err)
		}
		return unix.Connect(fd, to)
	})
}
