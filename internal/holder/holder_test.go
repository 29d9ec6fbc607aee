package holder

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHolder: this process is found to have what it has.
func TestHolder(t *testing.T) {
	self := Process(os.Getpid())
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.ListenPacket("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		tcp, udp := l.Addr().(*net.TCPAddr).Port, u.LocalAddr().(*net.UDPAddr).Port
		if got := Port("tcp", tcp); got != self {
			t.Errorf("TCP port %d is %q's, want %q", tcp, got, self)
		}
		if got := Port("udp", udp); got != self {
			t.Errorf("UDP port %d is %q's, want %q", udp, got, self)
		}
		if got, want := Taken("tcp", tcp), fmt.Sprintf("port %d is taken by %s", tcp, self); got != want {
			t.Errorf("%q, want %q", got, want)
		}
		l.Close()
		u.Close()
		if got := Port("tcp", tcp); got != "" {
			t.Errorf("a free port is %q's", got)
		}
	}
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := Peer(c.(*net.UnixConn)); got != self {
		t.Errorf("the socket is %q's", got)
	}
	f, err := os.Create(path + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := Lock(f.Name()); got != "" {
		t.Errorf("the free lock is %q's", got)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if got := Lock(f.Name()); got != self {
		t.Errorf("the lock is %q's", got)
	}
	if got := Process(1 << 30); got != fmt.Sprintf("process %d", 1<<30) {
		t.Errorf("no process is called %q", got)
	}
}

// FuzzListener: no line of a table ends the program.
func FuzzListener(f *testing.F) {
	f.Add("   0: 0100007F:23EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0", 9195)
	f.Fuzz(func(t *testing.T, line string, port int) { listener(line, port) })
}
