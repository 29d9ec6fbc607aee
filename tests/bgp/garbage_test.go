package bgp

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/bgp"
)

// What a peer may say, well-formed; the garbage is one of these and one mutation.

// bgpMessage is a message of a type (RFC 4271, 4.1).
func bgpMessage(kind byte, body ...byte) []byte {
	m := append(make([]byte, 0, 19+len(body)), slices.Repeat([]byte{0xff}, 16)...)
	m = binary.BigEndian.AppendUint16(m, uint16(19+len(body)))
	return append(append(m, kind), body...)
}

func open() []byte {
	capabilities := []byte{2, 14, 1, 4, 0, 1, 0, 1, 65, 4, 0, 0, 0xfc, 0x01, 70, 0} // IPv4, AS 64513
	return bgpMessage(1, append([]byte{4, 0xfc, 0x01, 0, 9, 192, 0, 2, 2, byte(len(capabilities))}, capabilities...)...)
}

func keepalive() []byte { return bgpMessage(4) }

// update announces a prefix with these attributes, and withdraws nothing.
func update(prefix []byte, attributes ...[]byte) []byte {
	all := slices.Concat(attributes...)
	body := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(all)))
	return bgpMessage(2, append(append(body, all...), prefix...)...)
}

var (
	block   = []byte{26, 10, 10, 2, 0}
	origin  = []byte{0x40, 1, 1, 0}
	asPath  = []byte{0x40, 2, 6, 2, 1, 0, 0, 0xfc, 0x01}
	nextHop = []byte{0x40, 3, 4, 192, 0, 2, 2}
)

func TestGarbage(t *testing.T) {
	t.Parallel()
	w, r := newNetwork(t, 3)
	s, witness := r[0].speak(ourAS), r[2].speak(ourAS)
	good := to(3, ourAS)
	good.Passive = true
	s.setPeers(good)
	s.announce(block4(1))
	witness.setPeers(to(1, ourAS))
	witness.announce(block4(3))
	eventually(t, "the witness's session", func() bool { return s.has(block4(3)) && witness.has(block4(1)) })
	since := s.peer(v4(3)).Since

	hello := func(then ...[]byte) []byte { return slices.Concat(append([][]byte{open(), keepalive()}, then...)...) }
	good1 := update(block, origin, asPath, nextHop)
	table := []struct {
		name string
		data []byte
	}{
		{"nothing", nil},
		{"text", []byte("GET / HTTP/1.1\r\nHost: bgp\r\n\r\n")},
		{"half a header", open()[:10]},
		{"half an OPEN", open()[:25]},
		{"a bad marker", append([]byte{0}, open()[1:]...)},
		{"length 0", change(open(), 16, 0, 0)},
		{"length 18", change(open(), 16, 0, 18)},
		{"length 65535", change(open(), 16, 0xff, 0xff)},
		{"BGP version 3", change(open(), 19, 3)},
		{"hold time 1", change(open(), 22, 0, 1)},
		{"router ID 0.0.0.0", change(open(), 24, 0, 0, 0, 0)},
		{"our own router ID", change(open(), 24, 192, 0, 2, 1)},
		{"options beyond the end", change(open(), 28, 0xff)},
		{"an option beyond the end", change(open(), 30, 0xff)},
		{"a capability beyond the end", change(open(), 32, 0xff)},
		{"an UPDATE first", good1},
		{"a KEEPALIVE first", keepalive()},
		{"an empty UPDATE body", hello(bgpMessage(2))},
		{"withdrawn beyond the end", hello(change(good1, 19, 0xff, 0xff))},
		{"attributes beyond the end", hello(change(good1, 21, 0xff, 0xff))},
		{"a prefix of 255 bits", hello(update([]byte{255, 10, 10, 2, 0}, origin, asPath, nextHop))},
		{"half a prefix", hello(update([]byte{26, 10}, origin, asPath, nextHop))},
		{"no attributes", hello(update(block))},
		{"no next hop", hello(update(block, origin, asPath))},
		{"a next hop of 3 bytes", hello(update(block, origin, asPath, []byte{0x40, 3, 3, 192, 0, 2}))},
		{"next hop 0.0.0.0", hello(update(block, origin, asPath, []byte{0x40, 3, 4, 0, 0, 0, 0}))},
		{"origin 9", hello(update(block, []byte{0x40, 1, 1, 9}, asPath, nextHop))},
		{"an attribute twice", hello(update(block, origin, origin, asPath, nextHop))},
		{"an AS path of nonsense", hello(update(block, origin, []byte{0x40, 2, 3, 9, 200, 1}, nextHop))},
		{"an AS path of another AS", hello(update(block, origin, []byte{0x40, 2, 6, 2, 1, 0, 0, 0xff, 0x01}, nextHop))},
		{"an unknown well-known attribute", hello(update(block, origin, asPath, nextHop, []byte{0x40, 200, 0}))},
		{"half a community", hello(update(block, origin, asPath, nextHop, []byte{0xc0, 8, 3, 1, 2, 3}))},
		{"MP_REACH of an unknown family", hello(update(nil, origin, asPath, []byte{0x80, 14, 5, 0x40, 0x01, 99, 0, 0}))},
		{"MP_REACH of one byte", hello(update(nil, origin, asPath, []byte{0x80, 14, 1, 0}))},
		{"MP_REACH of IPv6, not negotiated", hello(update(nil, origin, asPath, append([]byte{0x80, 14, 21, 0, 2, 1, 16}, make([]byte, 18)...)))},
		{"MP_UNREACH of nothing", hello(update(nil, []byte{0x80, 15, 0}))},
		{"a short NOTIFICATION", hello(bgpMessage(3))},
		{"an unknown NOTIFICATION", hello(bgpMessage(3, 99, 99, 1, 2, 3))},
		{"a ROUTE-REFRESH of one byte", hello(bgpMessage(5, 0))},
		{"a ROUTE-REFRESH of an unknown family", hello(bgpMessage(5, 0x40, 1, 0, 99))},
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 60 {
		data := slices.Clone(good1)
		for range 1 + random.IntN(4) {
			data[19+random.IntN(len(data)-19)] = byte(random.IntN(256)) // behind the header: see TestFatalGarbage
		}
		data = hello(data, keepalive())
		table = append(table, struct {
			name string
			data []byte
		}{"random", data})
	}

	// Each piece has an address and a session of its own: GoBGP lets a session that broke rest for 5 s and hangs up meanwhile.
	peers := []bgp.Peer{good}
	var addresses []string
	for i := range table {
		p := to(100+i, theirAS)
		p.Passive = true
		peers = append(peers, p)
		addresses = append(addresses, "addr add "+v4(100+i).String()+"/32 dev eth0")
	}
	w.ip("2", addresses...)
	s.setPeers(peers...)
	eventually(t, "the speaker to wait for all", func() bool {
		return !slices.ContainsFunc(s.status().Peers, func(p bgp.PeerStatus) bool { return p.Info != "Passive" && p.Info != "Established" })
	})
	for i, tt := range table {
		if answer := r[1].say(v4(100+i), tt.data); len(answer) == 0 {
			t.Errorf("%s was not listened to", tt.name)
		}
		select {
		case <-s.done:
			t.Fatalf("%s brought the speaker down:\n%x", tt.name, tt.data)
		default:
		}
	}
	for _, words := range [][]string{{v4(105).String(), "bad message length"}, {v4(108).String(), "unsupported version 3"}, {v4(120).String(), "network bytes is short"}} {
		eventually(t, "alarms", func() bool { return s.alarmed(bgp.Session, words...) })
	}
	if got := s.peer(v4(3)); got.State != "up" || got.Since != since || strings.Contains(got.LastError, "malformed") {
		t.Errorf("the witness's session: %+v", got)
	}
	if got := s.status().Routes; !slices.ContainsFunc(got, func(r bgp.Route) bool { return r.Prefix == block4(3) }) {
		t.Errorf("routes %v", got)
	}

	// And the router comes to its senses.
	s.setPeers(good, to(2, theirAS))
	s2 := r[1].speak(theirAS)
	s2.setPeers(to(1, ourAS))
	s2.announce(block4(2))
	eventually(t, "the session", func() bool { return s.up(v4(2)) && s.has(block4(2)) && s2.has(block4(1)) })
}

// TestFatalGarbage: GoBGP v3.37.0 dies of a message of unknown type (osrg/gobgp#3325, mended in v4 only) and of a second
// OPEN. Only a configured peer can do that to us, with its password if it has one. This holds what is left then: the other
// peers keep our routes until we are back. Once this fails because nobody dies, the two belong into TestGarbage.
func TestFatalGarbage(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"an unknown type": change(keepalive(), 18, 99),
		"OPEN twice":      slices.Concat(open(), keepalive(), open()),
	} {
		t.Run(name, func(t *testing.T) {
			_, r := newNetwork(t, 3)
			begin := func() *speaker {
				s := r[0].speak(ourAS)
				good, bad := to(3, ourAS), to(2, theirAS)
				good.Passive, bad.Passive = true, true
				s.setPeers(good, bad)
				s.announce(block4(1))
				return s
			}
			s, witness := begin(), r[2].speak(ourAS)
			witness.setPeers(to(1, ourAS))
			witness.announce(block4(3))
			eventually(t, "the witness's session", func() bool { return s.has(block4(3)) && witness.has(block4(1)) })
			told := witness.told()

			eventually(t, "the end", func() bool {
				r[1].say(v4(2), data)
				select {
				case <-s.done:
					return true
				default:
					return false
				}
			})
			s = begin()
			if !witness.has(block4(1)) || witness.told() != told {
				t.Error("the witness lost our route")
			}
			eventually(t, "us to be back", func() bool { return s.has(block4(3)) || !witness.has(block4(1)) })
		})
	}
}

// change puts bytes into a copy of a message.
func change(m []byte, at int, b ...byte) []byte {
	m = slices.Clone(m)
	copy(m[at:], b)
	return m
}

// say connects to router 1 from an address, sends data and returns what comes back until router 1 hangs up or is silent.
func (r *router) say(from netip.Addr, data []byte) []byte {
	var answer []byte
	_ = r.do(func() error {
		d := net.Dialer{Timeout: time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		c, err := d.Dial("tcp", netip.AddrPortFrom(v4(1), bgp.DefaultPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, _ = c.Write(data)
		_ = c.SetReadDeadline(time.Now().Add(150 * time.Millisecond))
		buf := make([]byte, 4096)
		for len(answer) < len(buf) {
			n, err := c.Read(buf)
			answer = append(answer, buf[:n]...)
			if err != nil {
				return nil
			}
		}
		return nil
	})
	return answer
}
