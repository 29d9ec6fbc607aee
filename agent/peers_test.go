package agent

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/bgp"
)

func TestPassiveAsCalico(t *testing.T) {
	nine, ten := netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("10.0.0.10")
	if (link{ours: nine, theirs: ten}).passive() || !(link{ours: ten, theirs: nine}).passive() {
		t.Error("10.0.0.10 waits for 10.0.0.9 in Calico's mesh, not here")
	}
}

// A pod that begins while another program has the speaker's port does not wait until all of /proc was read.
func TestFreePort(t *testing.T) {
	for range 2000 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	c := bgp.Config{ListenPort: port, ListenAddresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}
	a := &Agent{}
	took := func() time.Duration {
		begin := time.Now()
		if err := a.freePort(c); err == nil || !strings.Contains(err.Error(), "is taken by process") {
			t.Fatalf("%v", err)
		}
		return time.Since(begin)
	}
	first, later := took(), time.Duration(0)
	for range 20 {
		later += took()
	}
	if later > 5*first {
		t.Errorf("the first look took %v, 20 more %v", first, later)
	}
	l.Close()
	if err := a.freePort(c); err != nil {
		t.Error(err)
	}
}
