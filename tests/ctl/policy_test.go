package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
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
	err = db.View(func(tx *node.Tx) error {
		return tx.Endpoints(func(e node.Endpoint) error {
			local = append(local, e)
			return nil
		})
	})
	ts.Check(errors.Join(err, db.Close()))
	p.SetLocal(local)
	p.Replace(resources)
	_, err = p.Commit(ctx)
	ts.Check(errors.Join(err, p.Close()))
}

// serve POD PORT: takes connections there, and answers with what it is sent, until the script ends.
func serve(ts *testscript.TestScript, _ bool, args []string) {
	p, err := of(ts).host.Pod(args[0])
	ts.Check(err)
	var l net.Listener
	ts.Check(p.Namespace().Do(func() (err error) {
		l, err = net.Listen("tcp4", ":"+args[1])
		return err
	}))
	ts.Defer(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c) // until the other side closes
			}()
		}
	}()
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

// seen TEXT ARG...: waits until ctl ARG... says TEXT.
func seen(ts *testscript.TestScript, _ bool, args []string) {
	until(ts, "caracalctl "+strings.Join(args[1:], " ")+" says "+args[0], func() bool {
		out, err := of(ts).host.Exec(context.Background(), append([]string{"caracalctl"}, args[1:]...)...)
		return err == nil && strings.Contains(out, args[0])
	})
}
