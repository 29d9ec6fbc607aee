package ctl

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/tests/testenv"
)

// enforce FILE: puts policies in force without an agent, and no others.
func enforcePolicy(ts *testscript.TestScript, _ bool, args []string) {
	h, ctx := of(ts).host, context.Background()
	resources, err := manifest.Parse([]byte(ts.ReadFile(args[0])))
	ts.Check(err)
	m, err := maps.Open(h.BPFDir())
	ts.Check(err)
	defer m.Close()
	p, err := enforce.Load(ctx, enforce.Config{Dir: h.StateDir(), Maps: m, Node: h.Name})
	ts.Check(err)
	db, err := node.OpenReadOnly(ctx, h.StateDir(), node.Options{BootIDFile: h.BootIDFile()})
	ts.Check(err)
	var local []node.Endpoint
	err = db.View(func(tx *node.Tx) (err error) {
		local, err = tx.AllEndpoints()
		return err
	})
	ts.Check(errors.Join(err, db.Close()))
	p.SetLocal(local)
	p.Replace(resources)
	_, err = p.Commit(ctx)
	ts.Check(errors.Join(err, p.Close()))
}

// serve POD|host PORT: takes connections there, and answers with what it is sent, until the script ends.
func serve(ts *testscript.TestScript, _ bool, args []string) {
	ns := of(ts).host.Namespace()
	if args[0] != "host" {
		p, err := of(ts).host.Pod(args[0])
		ts.Check(err)
		ns = p.Namespace()
	}
	var l net.Listener
	ts.Check(ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", ":"+args[1])
		return err
	}))
	ts.Defer(func() { l.Close() })
	go testenv.Echo(l)
}

// connect POD POD PORT: a connection is made, used, and held until the script ends. ! connect: none comes about.
func connect(ts *testscript.TestScript, neg bool, args []string) {
	h := of(ts).host
	from, err := h.Pod(args[0])
	ts.Check(err)
	to, err := h.Pod(args[1])
	ts.Check(err)
	timeout := 5 * time.Second
	if neg {
		timeout = 300 * time.Millisecond
	}
	var c net.Conn
	err = from.Namespace().Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", net.JoinHostPort(to.Addr().String(), args[2]), timeout)
		return err
	})
	if err == nil {
		ts.Defer(func() { c.Close() })
	}
	if neg != (err != nil) {
		ts.Fatalf("connect %s: %v", strings.Join(args, " "), err)
	}
	if neg {
		return
	}
	_, err = c.Write([]byte("hello"))
	ts.Check(err)
	ts.Check(c.SetReadDeadline(time.Now().Add(timeout)))
	_, err = io.ReadFull(c, make([]byte, len("hello")))
	ts.Check(err)
}

// send POD PROTOCOL ADDRESS PORT FROM: one packet, without an answer. ICMP: PORT is the type.
func send(ts *testscript.TestScript, _ bool, args []string) {
	p, err := of(ts).host.Pod(args[0])
	ts.Check(err)
	to := netip.MustParseAddr(args[2]).As4()
	port, err := strconv.Atoi(args[3])
	ts.Check(err)
	from, err := strconv.Atoi(args[4])
	ts.Check(err)
	protocol := map[string]int{"udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP, "icmp": unix.IPPROTO_ICMP}[args[1]]
	packet := make([]byte, 16) // of UDP the payload
	switch args[1] {
	case "sctp": // RFC 9260, 3.1: ports, tag, checksum; then an INIT chunk's header
		binary.BigEndian.PutUint16(packet, uint16(from))
		binary.BigEndian.PutUint16(packet[2:], uint16(port))
		packet[12], packet[15] = 1, 4
	case "icmp": // RFC 792: type, code, checksum
		packet[0] = byte(port)
		binary.BigEndian.PutUint16(packet[2:], ^uint16(port<<8))
	}
	kind := unix.SOCK_RAW
	if args[1] == "udp" {
		kind = unix.SOCK_DGRAM
	} else {
		port = 0
	}
	ts.Check(p.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if kind == unix.SOCK_DGRAM {
			if err := unix.Bind(fd, &unix.SockaddrInet4{Port: from}); err != nil {
				return err
			}
		}
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Port: port, Addr: to})
	}))
}

// flood POD ADDRESS FIRST LAST: a UDP packet to each port from FIRST to LAST.
func flood(ts *testscript.TestScript, _ bool, args []string) {
	p, err := of(ts).host.Pod(args[0])
	ts.Check(err)
	first, err := strconv.Atoi(args[2])
	ts.Check(err)
	last, err := strconv.Atoi(args[3])
	ts.Check(err)
	var c net.PacketConn
	ts.Check(p.Do(func() (err error) {
		c, err = net.ListenPacket("udp4", ":0")
		return err
	}))
	defer c.Close()
	for port := first; port <= last; port++ {
		_, err := c.WriteTo([]byte("flood"), &net.UDPAddr{IP: net.ParseIP(args[1]), Port: port})
		ts.Check(err)
	}
}

// agent: starts the node's agent, and waits until it has a block for pods.
func agentCommand(ts *testscript.TestScript, _ bool, _ []string) {
	h, ctx := of(ts).host, context.Background()
	ts.Check(h.StartAgent(ctx))
	until(ts, "the agent has a block", func() bool {
		var s agent.Status
		out, err := h.Exec(ctx, "caracalctl", "node", "status", "-o", "json")
		return err == nil && json.Unmarshal([]byte(out), &s) == nil && s.Ready && len(s.Blocks) > 0
	})
}

// logged EXPRESSION: waits until the agent's log has it.
func logged(ts *testscript.TestScript, _ bool, args []string) {
	want, err := regexp.Compile(args[0])
	ts.Check(err)
	until(ts, "the agent logs "+args[0], func() bool {
		log, err := os.ReadFile(of(ts).host.AgentLog())
		ts.Check(err)
		return want.Match(log)
	})
}

// seen TEXT ARG...: waits until ctl ARG... says TEXT.
func seen(ts *testscript.TestScript, _ bool, args []string) {
	until(ts, "caracalctl "+strings.Join(args[1:], " ")+" says "+args[0], func() bool {
		out, err := of(ts).host.Exec(context.Background(), append([]string{"caracalctl"}, args[1:]...)...)
		return err == nil && strings.Contains(out, args[0])
	})
}

// ask socket|metrics PATH: what the agent answers.
func askAgent(ts *testscript.TestScript, _ bool, args []string) {
	fmt.Fprint(ts.Stdout(), answerOf(ts, args[0], args[1]))
}

func answerOf(ts *testscript.TestScript, where, path string) string {
	h := of(ts).host
	network, address := "unix", h.Socket()
	if where == "metrics" {
		network, address = "tcp", "127.0.0.1:9091"
	}
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (c net.Conn, err error) {
			err = h.Namespace().Do(func() (err error) {
				c, err = net.DialTimeout(network, address, time.Second)
				return err
			})
			return c, err
		},
	}}
	r, err := client.Get("http://agent" + path)
	ts.Check(err)
	defer r.Body.Close()
	answer, err := io.ReadAll(r.Body)
	ts.Check(err)
	return string(answer)
}

// counted [NUMBER]: every one of so many rules in force has counted more packets and bytes than at the last counted.
func counted(ts *testscript.TestScript, _ bool, args []string) {
	r := of(ts)
	out, err := r.host.Exec(context.Background(), "caracalctl", "rules", "-o", "json")
	ts.Check(err)
	var all []struct {
		ID             uint32
		Packets, Bytes uint64
	}
	ts.Check(json.Unmarshal([]byte(out), &all))
	before := r.counts
	r.counts = make(map[uint32]maps.RuleCount)
	for _, c := range all {
		r.counts[c.ID] = maps.RuleCount{Rule: c.ID, Packets: c.Packets, Bytes: c.Bytes}
		if b := before[c.ID]; len(args) > 0 && (c.Packets <= b.Packets || c.Bytes <= b.Bytes) {
			ts.Fatalf("rule %d has counted %+v, before %+v", c.ID, c, b)
		}
	}
	if len(args) > 0 && fmt.Sprint(len(all)) != args[0] {
		ts.Fatalf("%d rules, want %s: %s", len(all), args[0], out)
	}
}

// told: every dropped packet is one that the agent remembers, has forgotten, or was never told of.
func told(ts *testscript.TestScript, _ bool, _ []string) {
	h := of(ts).host
	m, err := maps.Open(h.BPFDir())
	ts.Check(err)
	defer m.Close()
	var last string
	until(ts, "all drops are accounted for", func() bool {
		var d agent.Drops
		ts.Check(json.Unmarshal([]byte(answerOf(ts, "socket", "/v1/drops")), &d))
		known := d.Lost + d.Forgotten
		for _, one := range d.Drops {
			known += one.Count
		}
		counts, err := m.Counts()
		ts.Check(err)
		var dropped uint64
		for _, c := range counts {
			if c.Dropped() {
				dropped += c.Packets
			}
		}
		if text := fmt.Sprintf("%d packets dropped; %d lost, %d forgotten, %d kinds", dropped, d.Lost, d.Forgotten, len(d.Drops)); text != last {
			last = text
			ts.Logf("%s", text)
		}
		return known == dropped && d.Lost > 0 && len(d.Drops) > 0
	})
}

// spoilRows makes every row of policy allow, or removes it.
func spoilRows(dir string, allow bool) error {
	m, err := maps.Open(dir)
	if err != nil {
		return err
	}
	defer m.Close()
	rows, err := m.Policy()
	if err != nil {
		return err
	}
	var keys []maps.PolicyKey
	for i := range rows {
		rows[i].Action = maps.PolicyAllow
		keys = append(keys, rows[i].PolicyKey)
	}
	if allow {
		return m.PutPolicy(rows)
	}
	return m.RemovePolicy(keys)
}
