package ctl

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/maps"
)

// TestDoctorAgent: what each answer of the agent's is called.
func TestDoctorAgent(t *testing.T) {
	at := time.Now()
	ready := agent.Status{Ready: true, Learned: 3, Peers: []bgp.PeerStatus{{Address: netip.MustParseAddr("192.0.2.2"), Info: "Established"}}}
	with := func(change func(*agent.Status)) agent.Status {
		s := ready
		change(&s)
		return s
	}
	for _, c := range []struct {
		name   string
		status agent.Status
		want   []string
	}{
		{"in order", ready, []string{"agent ok 1 BGP sessions are established, 3 routes learned"}},
		{"at its first round", with(func(s *agent.Status) { s.Ready = false }), []string{"agent WARN it has not finished its first round yet"}},
		{"a problem and an alarm", with(func(s *agent.Status) {
			s.Problems = []agent.Problem{{About: "blocks", Text: "no pool has room", Since: at}}
			s.Alarms = []agent.Alarm{{Kind: "loop", Text: "a route came back", Since: at}}
		}), []string{"agent blocks FAIL since * no pool has room", "agent loop WARN since * a route came back"}},
		{"a session that is down", with(func(s *agent.Status) {
			s.Peers = append(slices.Clone(s.Peers), bgp.PeerStatus{Address: netip.MustParseAddr("192.0.2.3"), Info: "Active", Since: at, LastError: "refused"})
		}), []string{"agent 192.0.2.3 FAIL the BGP session is Active since * refused"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "agent.sock")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				json.NewEncoder(w).Encode(c.status)
			})}
			go server.Serve(l)
			defer server.Close()
			d := newExamination(t)
			d.socket = socket
			d.agent, d.agentErr = agentStatus(t.Context(), d.socket)
			d.check = "agent"
			if err := d.checkAgent(); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range d.diagnoses {
				got = append(got, f.Name+" "+f.Status+" "+f.Detail)
			}
			if !slices.EqualFunc(got, c.want, like) {
				t.Errorf("doctor says %q, want %q", got, c.want)
			}
		})
	}
}

// like compares a line with a pattern in which one * stands for anything.
func like(got, want string) bool {
	before, after, _ := strings.Cut(want, "*")
	return strings.HasPrefix(got, before) && strings.HasSuffix(got, after)
}

func newExamination(t *testing.T) *doctor {
	cmd := &cobra.Command{}
	cmd.SetContext(t.Context())
	return &doctor{globals: &globals{}, cmd: cmd, timeout: 5 * time.Second}
}

// TestDoctorQuery: an answer is an answer, whatever it says; another one's is not.
func TestDoctorQuery(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: entering network namespaces")
	}
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := server.ReadFromUDP(b)
			if err != nil {
				return
			}
			if n != len(rootQuery) || !bytes.Equal(b[:n], rootQuery) {
				continue
			}
			b[2] |= 0x80 // it is an answer
			server.WriteToUDP(b[:n], from)
		}
	}()
	at := netip.MustParseAddrPort(server.LocalAddr().String())
	d := newExamination(t)
	if err := d.query("/proc/self/ns/net", at.Addr(), at); err != nil {
		t.Error(err)
	}
}

// TestSeesSame: a process with a mount of its own over a directory does not see ours.
func TestSeesSame(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounting")
	}
	dir := t.TempDir()
	for _, c := range []struct {
		command string
		want    bool
	}{{"echo", true}, {"mount -t tmpfs none " + dir + " && echo", false}} {
		cmd := exec.Command("unshare", "--mount", "sh", "-c", c.command+" && read end")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has mounted
			t.Fatalf("%s: %v", c.command, err)
		}
		got, err := seesSame(fmt.Sprintf("/proc/%d/root", cmd.Process.Pid), dir)
		if err != nil || got != c.want {
			t.Errorf("%s: %v %v, want %v", c.command, got, err, c.want)
		}
		in.Close()
		cmd.Wait() // read has met the end
	}
	if _, err := seesSame("/", filepath.Join(dir, "none")); err == nil {
		t.Error("a directory that is not there is seen")
	}
}

func TestNameservers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	text := "# nameserver 192.0.2.1\nsearch a b\nnameserver 192.0.2.2 \n\tnameserver\t2001:db8::1\nnameserver\nnameserver x\noptions edns0\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := nameservers(file)
	if want := "[192.0.2.2 2001:db8::1]"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v %v, want %s", got, err, want)
	}
}

// TestProgress: nothing is said before it has taken long, nor after the end.
func TestProgress(t *testing.T) {
	var out bytes.Buffer
	p := &progress{out: &out, what: "a"}
	p.at("b")
	if out.Len() > 0 {
		t.Errorf("said %q at once", &out)
	}
	p.begin()
	p.at("c")
	p.end()
	p.at("d")
	if want := "caracalctl: checking b\ncaracalctl: checking c\n"; out.String() != want {
		t.Errorf("said %q, want %q", &out, want)
	}
}

// TestChecksum: the example of RFC 1071, section 3, and an odd length.
func TestChecksum(t *testing.T) {
	if got := checksum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}); got != ^uint16(0xddf2) {
		t.Errorf("%#x", got)
	}
	if got := checksum([]byte{0x00, 0x01, 0xf2}); got != ^uint16(0xf201) {
		t.Errorf("%#x", got)
	}
}

// TestListening: sockets that wait for anybody are found, of both families and protocols, and no others.
func TestListening(t *testing.T) {
	tcp, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	client, err := net.Dial("udp4", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, c := range []struct {
		table string
		addr  net.Addr
		want  bool
	}{{"tcp6", tcp.Addr(), true}, {"udp", udp.LocalAddr(), true}, {"udp", client.LocalAddr(), false}} {
		at, err := listening(c.table)
		if err != nil {
			t.Fatal(err)
		}
		if got := slices.Contains(at, netip.MustParseAddrPort(c.addr.String())); got != c.want {
			t.Errorf("%s in %s: %t, want %t", c.addr, c.table, got, c.want)
		}
	}
}

// TestComparePorts: a port that the host's connections may get, and that it listens on, is told; one of its loopback is not.
func TestComparePorts(t *testing.T) {
	for address, want := range map[string]bool{"0.0.0.0:0": true, "127.0.0.1:0": false} {
		l, err := net.Listen("tcp4", address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := netip.MustParseAddrPort(l.Addr().String()).Port()
		d := newExamination(t)
		if err := d.comparePorts(maps.Ports{First: port, Last: port}); err != nil {
			t.Fatal(err)
		}
		var own, listens bool
		for _, f := range d.diagnoses {
			own = own || strings.Contains(f.Detail, "ip_local_port_range")
			listens = listens || strings.HasSuffix(f.Detail, fmt.Sprintf("tcp/%d", port))
		}
		if !own || listens != want {
			t.Errorf("%s: doctor says %+v", address, d.diagnoses)
		}
	}
}

// FuzzListening: whatever is in the table, what is read of it are addresses.
func FuzzListening(f *testing.F) {
	f.Add("  sl  local_address rem_address   st\n   0: 0100007F:EE48 00000000:0000 0A 00000000:00000000\n")
	f.Add("   0: 00000000000000000000000001000000:EE48 00000000000000000000000000000000:0000 07\n")
	f.Add("0: 0100007:1 x 0A\n0: :1 x 0A\n0: 0100007F x 0A\n0: 0100007F:10000 x 0A")
	f.Fuzz(func(t *testing.T, table string) {
		for _, a := range parseListening(table) {
			if !a.IsValid() {
				t.Errorf("%q: %v", table, a)
			}
		}
	})
}
