package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
)

// silent fails when the socket receives anything that was sent before now.
func silent(t testing.TB, fd int) {
	t.Helper()
	n, _, err := unix.Recvfrom(fd, make([]byte, 100), unix.MSG_DONTWAIT)
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("received %d bytes (%v), want silence", n, err)
	}
}

// A shaped pod's packets leave and arrive through the host's stack, are judged once, and lose one hop.
func TestShaped(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode, shaped())
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 0, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		wantTTL(t, afd, v6)
		wantTTL(t, bfd, v6)
		before := n.counts()
		for range 5 {
			if there, back := exchange(t, a, b, afd, bfd, v6, "slowly"); there != 63 || back != 63 {
				t.Fatalf("TTL %d there, %d back, want 63", there, back)
			}
		}
		got := n.since(before)
		if got["from_pod stack_shaped"] != 10 || got["to_pod forward_judged"] != 10 {
			t.Errorf("counts %v, want 10 stack_shaped and 10 forward_judged", got)
		}
	})
}

// A Service made by the host's stack: pod a speaks to the host's address and is answered by pod b, through the stack
// both ways.
//
//	a -> 192.0.2.1:8080 => from_pod | DNAT | to_pod => b:7
func TestTranslatedByStack(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	n.do(func() error {
		rules := `table ip cdp { chain pre { type nat hook prerouting priority dstnat; policy accept;
			ip daddr 192.0.2.1 udp dport 8080 dnat to 10.65.0.2:7
			ip daddr 192.0.2.1 tcp dport 8080 dnat to 10.65.0.2:7
		}
		}`
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
	afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, false), b.socket(t, unix.SOCK_DGRAM, 7, false)
	before := n.counts()
	for range 3 {
		send(t, afd, "hello", outside, 8080)
		if got, _, from := receive(t, bfd); got != "hello" || from != at(a.v4, 5000) {
			t.Fatalf("b received %q from %s", got, from)
		}
		send(t, bfd, "hello yourself", a.v4, 5000)
		if got, _, from := receive(t, afd); got != "hello yourself" || from != at(outside, 8080) {
			t.Fatalf("a received %q from %s", got, from)
		}
	}
	if f := n.wantFlow("udp", at(a.v4, 5000), at(b.v4, 7)); f.Entered != "stack" || f.Opener.Addr() != a.v4 || f.Received.Forward != "reply" {
		t.Errorf("flow behind the translation: %+v", f)
	}
	if got := n.since(before); got["from_pod stack_reply"] != 3 || got["to_pod forward_from_stack"] != 6 {
		t.Errorf("counts %v", got)
	}

	listener := b.socket(t, unix.SOCK_STREAM, 7, false)
	if err := unix.Listen(listener, 8); err != nil {
		t.Fatal(err)
	}
	dial := func(to netip.Addr, port int) error {
		fd := a.socket(t, unix.SOCK_STREAM, 5001, false)
		defer unix.Close(fd)
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(patience))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
			return err
		}
		return connectTo(fd, sockaddr(to, port))
	}
	for range 2 { // one source port, to the Service and to the pod behind it in turn
		if err := dial(outside, 8080); err != nil {
			t.Fatalf("through the translation: %v; counts %v", err, n.since(before))
		}
		if err := dial(b.v4, 7); err != nil {
			t.Fatalf("straight: %v; counts %v", err, n.since(before))
		}
	}
	// Judged after translation: b takes nothing in.
	n.policy(b, 0, 9)
	denied := n.counts()
	send(t, afd, "hello?", outside, 8080)
	until(t, "a denied packet", func() bool { return n.since(denied)["to_pod drop_policy_ingress"] == 1 })
	silent(t, bfd)
}

// A process of the host reaches a pod that may speak with nobody, and hears its answer.
func TestProbesAlwaysPass(t *testing.T) {
	n := newNode(t, loader.Config{})
	a := n.addPod("a", 1, loader.TCX)
	n.policy(a, 9, 9)
	listener := a.socket(t, unix.SOCK_STREAM, 8080, false)
	if err := unix.Listen(listener, 8); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var conn net.Conn
		n.do(func() (err error) {
			conn, err = (&net.Dialer{Timeout: patience}).Dial("tcp", at(a.v4, 8080).String())
			return err
		})
		fd, err := acceptFrom(listener)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(fd, []byte("ok")); err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		buf := make([]byte, 2)
		if _, err := conn.Read(buf); err != nil || string(buf) != "ok" {
			t.Fatalf("read %q: %v; counts %v", buf, err, n.counts())
		}
		conn.Close()
		unix.Close(fd)
		if _, err := n.maps.RaiseEpoch(); err != nil {
			t.Fatal(err)
		}
	}
	before := n.counts()
	own := a.socket(t, unix.SOCK_DGRAM, 0, false)
	send(t, own, "let me out", outside, 9)
	until(t, "the pod's own packet to be denied", func() bool { return n.since(before)["from_pod drop_policy_egress"] == 1 })
}

// The host answers for itself where the TTL ends, as traceroute expects.
func TestTraceroute(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		if v6 {
			t.Skip("the node has no IPv6 address")
		}
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		fd := a.socket(t, unix.SOCK_DGRAM, 0, v6)
		for option, v := range map[int]int{unix.IP_TTL: 1, unix.IP_RECVERR: 1} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, option, v); err != nil {
				t.Fatal(err)
			}
		}
		for range 3 {
			before := n.counts()
			send(t, fd, "how far?", b.v4, 33434)
			if _, err := readFrom(fd, make([]byte, 10)); !errors.Is(err, unix.EHOSTUNREACH) {
				t.Fatalf("read: %v, want no route to host (time exceeded); counts %v", err, n.since(before))
			}
			oob := make([]byte, 512)
			_, on, _, _, err := unix.Recvmsg(fd, make([]byte, 100), oob, unix.MSG_ERRQUEUE)
			if err != nil {
				t.Fatal(err)
			}
			// struct sock_extended_err, then the offender's struct sockaddr_in.
			messages, err := unix.ParseSocketControlMessage(oob[:on])
			if err != nil || len(messages) != 1 {
				t.Fatalf("%d control messages: %v", len(messages), err)
			}
			if m := messages[0].Data; m[5] != 11 || netip.AddrFrom4([4]byte(m[20:24])) != outside {
				t.Errorf("ICMP type %d from %v, want 11 from %s", m[5], m[20:24], outside)
			}
			if n.since(before)["from_pod stack_ttl"] != 1 {
				t.Errorf("counts %v", n.since(before))
			}
		}
	})
}

// An address goes to another pod while its first holder still sends and is still sent to.
//
//	a <-> b (10.65.0.2), then a <-> c (10.65.0.2)
func TestAddressReused(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		n := newNode(t, loader.Config{})
		a, b := n.addPod("a", 1, mode), n.addPod("b", 2, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		exchange(t, a, b, afd, bfd, v6, "to b")
		exchange(t, a, b, afd, bfd, v6, "to b again")

		if err := commit.RemovePod(n.maps, b.commit); err != nil {
			t.Fatal(err)
		}
		before := n.counts()
		send(t, afd, "to nobody", b.addr(v6), 7)
		until(t, "a's packet to have gone elsewhere", func() bool {
			got := n.since(before)
			return got["from_pod drop_no_pod"]+got["from_pod stack_routed"] >= 1
		})
		send(t, bfd, "from the grave", a.addr(v6), 5000)
		until(t, "b's packet to be dropped", func() bool { return n.since(before)["from_pod drop_interface"] >= 1 })
		silent(t, bfd)
		silent(t, afd)

		n.unwire(b)
		c := n.addPod("c", 2, mode)
		cfd := c.socket(t, unix.SOCK_DGRAM, 7, v6)
		exchange(t, a, c, afd, cfd, v6, "to c")
		send(t, bfd, "from the grave", a.addr(v6), 5000)
		exchange(t, a, c, afd, cfd, v6, "to c again")
		silent(t, bfd)
		silent(t, afd)
	})
}

// A pod is removed while packets flow to it and from it: each is counted, and no flow of it stays.
func TestRemovedUnderTraffic(t *testing.T) {
	n := newNode(t, loader.Config{})
	a, b := n.addPod("a", 1, loader.TCX), n.addPod("b", 2, loader.TCX)
	var done []chan struct{}
	stop := make(chan struct{})
	for i, ends := range [][2]*pod{{a, b}, {b, a}} {
		fd := ends[0].socket(t, unix.SOCK_DGRAM, 4000, false)
		if i == 0 {
			send(t, fd, "x", ends[1].v4, 4000)
		}
		d := make(chan struct{})
		done = append(done, d)
		go func() {
			defer close(d)
			for {
				select {
				case <-stop:
					return
				default:
					unix.Sendto(fd, []byte("x"), unix.MSG_DONTWAIT, sockaddr(ends[1].v4, 4000))
				}
			}
		}()
	}
	until(t, "traffic", func() bool { return n.counts()["from_pod forward_pod"] > 1000 })
	if err := commit.RemovePod(n.maps, b.commit); err != nil {
		t.Fatal(err)
	}
	before := n.counts()
	until(t, "drops", func() bool {
		got := n.since(before)
		return got["from_pod drop_interface"] > 100 && got["from_pod forward_pod"] == 0 || got["from_pod drop_no_pod"] > 100
	})
	close(stop)
	for _, d := range done {
		<-d
	}
	if _, err := n.maps.PurgeFlows(b.commit.Addrs); err != nil {
		t.Fatal(err)
	}
	if s := n.state(); s.Flows != 0 || n.held(t, a) != 0 {
		t.Errorf("%d confirmed flows, %d of them a's, want none", s.Flows, n.held(t, a))
	}
}

// Frames that end within the IP header, which TEST_RUN does not take.
func TestShortFrames(t *testing.T) {
	n := newNode(t, loader.Config{})
	a := n.addPod("a", 1, loader.TCX)
	before := n.counts()
	sent := uint64(0)
	err := a.ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		ends := [2]netip.AddrPort{at(a.v4, 1), at(stranger4, 1)}
		ends6 := [2]netip.AddrPort{at(a.v6, 1), at(stranger6, 1)}
		for _, frame := range [][]byte{udp(a, ends[0], ends[1], 9)[:34], udp(a, ends6[0], ends6[1], 9)[:54]} {
			for k := 15; k < len(frame); k++ {
				if err := unix.Sendto(fd, frame[:k], 0, &unix.SockaddrLinklayer{Ifindex: a.ifindex}); err != nil {
					return fmt.Errorf("send %d bytes: %w", k, err)
				}
				sent++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	until(t, "every frame to be counted as malformed", func() bool { return n.since(before)["from_pod drop_malformed_ip"] == sent })
}
