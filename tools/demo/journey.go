package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tools/lab"
)

// journey is the demo's second part: hosts without a datastore, each told of the others and of its own block.
type journey struct {
	ctx  context.Context
	lab  *lab.Lab
	pods []*lab.Pod
}

func (j *journey) walk() error {
	for _, step := range []func() error{j.start, j.peer, j.add, j.talk, j.look} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// start gives each host a store of its own and starts its agent.
func (j *journey) start() error {
	title("Three hosts, each with a block of its own; caracald brings BGP with it")
	for _, h := range j.lab.Hosts() {
		var text strings.Builder
		for _, o := range j.lab.Hosts() {
			fmt.Fprintf(&text, "apiVersion: projectcalico.org/v3\nkind: Node\nmetadata: {name: %s}\nspec: {bgp: {ipv4Address: %s/24, ipv6Address: '%s/64'}}\n---\n", o.Name, o.Addr(), o.Addr6())
		}
		for i, p := range h.Pools() {
			fmt.Fprintf(&text, "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: own%d}\nspec: {cidr: '%s'}\n---\n", i, p)
		}
		if h.Number == 1 {
			fmt.Printf("h1# caracalctl apply -f - <<end\n%send\n", text.String())
		}
		out, err := h.Namespace().ExecInput(j.ctx, text.String(), "caracalctl", "apply", "-f", "-")
		if err != nil {
			return err
		}
		if h.Number == 1 {
			fmt.Print(out)
		}
		if err := h.StartAgent(j.ctx); err != nil {
			return err
		}
	}
	return nil
}

// peer waits until every host has a session with every other, of both families, and their routes.
func (j *journey) peer() error {
	title("h1# caracalctl node status")
	others := len(j.lab.Hosts()) - 1
	for _, h := range j.lab.Hosts() {
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			out, err := h.Exec(j.ctx, "caracalctl", "node", "status", "-o", "json")
			if err != nil {
				return err
			}
			var s agent.Status
			if err := json.Unmarshal([]byte(out), &s); err != nil {
				return err
			}
			if s.Ready && s.Written == 2*others {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s has learned %d routes of %d: %s", h.Name, s.Learned, 2*others, out)
			}
		}
	}
	out, err := j.lab.Host(1).Exec(j.ctx, "caracalctl", "node", "status")
	fmt.Print(out)
	return err
}

func (j *journey) add() error {
	title("A pod on each")
	for _, h := range j.lab.Hosts() {
		p, err := h.AddPod(j.ctx, "web-"+h.Name, lab.PodOptions{})
		if err != nil {
			return err
		}
		fmt.Printf("%-7s on %s %-12s %-18s %s\n", p.Name, h.Name, p.Addr(), p.Addr6(), p.HostIfName())
		j.pods = append(j.pods, p)
	}
	return nil
}

func (j *journey) talk() error {
	title("web-h1 asks web-h2 a hundred times; two routers between them take 2 off the TTL of 64, every time")
	for _, to := range []netip.Addr{j.pods[1].Addr(), j.pods[1].Addr6()} {
		begin := time.Now()
		ttls, err := askOften(j.pods[0], j.pods[1], to, 100)
		if err != nil {
			return err
		}
		fmt.Printf("to %-18s TTL of answer 1: %d, of answer 100: %d, mean round trip %s\n", to, ttls[0], ttls[99], (time.Since(begin) / 100).Round(time.Microsecond))
		for i, ttl := range ttls {
			if ttl != 62 {
				return fmt.Errorf("answer %d has TTL %d", i+1, ttl)
			}
		}
	}
	return nil
}

func (j *journey) look() error {
	for _, h := range j.lab.Hosts() {
		title("%s# ip route; caracalctl routes", h.Name)
		out, err := h.Exec(j.ctx, "ip", "route")
		if err != nil {
			fmt.Println("(no ip command here)")
		}
		fmt.Print(out)
		table, err := h.Exec(j.ctx, "caracalctl", "routes")
		if err != nil {
			return err
		}
		fmt.Print(table)
		if !strings.Contains(table, "remote") {
			return errors.New("no route to another host")
		}
	}
	return nil
}
