package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/tools/lab"
)

// journey is the demo's second part: hosts without a datastore, each told of the others and of all blocks, and a world outside.
type journey struct {
	ctx  context.Context
	lab  *lab.Lab
	pods []*lab.Pod
}

func (j *journey) walk() error {
	for _, step := range []func() error{j.start, j.peer, j.add, j.talk, j.trace, j.leave, j.examine, j.look} {
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
		for _, o := range j.lab.Hosts() {
			how := "disabled: true" // no address of it is given out here: it is known to be inside
			if o.Number == h.Number {
				how = "natOutgoing: true"
			}
			for i, p := range o.Pools() {
				fmt.Fprintf(&text, "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: %s-%d}\nspec: {cidr: '%s', %s}\n---\n", o.Name, i, p, how)
			}
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
		if err := askHundred(j.pods[0].Namespace(), j.pods[1].Namespace(), to, 62); err != nil {
			return err
		}
	}
	return nil
}

// trace shows the routers between two pods, if there is something to show them with.
func (j *journey) trace() error {
	if _, err := exec.LookPath("traceroute"); err != nil {
		return nil
	}
	out, err := j.pods[0].Exec(j.ctx, "traceroute", "-n", "-q", "1", "-w", "1", "-m", "5", j.pods[1].Addr().String())
	if err != nil {
		return nil // one that knows other options
	}
	title("web-h1# traceroute -n %s", j.pods[1].Addr())
	fmt.Print(out)
	return nil
}

// leave asks the world outside, which has no route to any pod.
func (j *journey) leave() error {
	title("web-h1 asks the world outside, which knows no pod, and sees h1")
	h, p := j.lab.Host(1), j.pods[0]
	for _, way := range []struct{ to, seen netip.Addr }{{lab.Outside4, h.Addr()}, {lab.Outside6, h.Addr6()}} {
		got, err := askOften(p.Namespace(), j.lab.Outside(), way.to, 3)
		if err != nil {
			return err
		}
		fmt.Printf("%-17s was asked by %s\n", way.to, got.by)
		if got.by.Addr() != way.seen {
			return fmt.Errorf("the world sees %s, not %s", got.by, way.seen)
		}
	}
	if _, err := exec.LookPath("ping"); err == nil {
		title("web-h1# ping %s", lab.Outside4)
		out, err := p.Exec(j.ctx, "ping", "-c", "1", lab.Outside4.String())
		fmt.Print(out)
		if err != nil {
			return err
		}
	}
	title("h1# caracalctl flows --pod web-h1 --state open")
	out, err := h.Exec(j.ctx, "caracalctl", "flows", "--pod", p.Name, "--state", "open")
	fmt.Print(out)
	return err
}

// examine leaves out the machine's name servers, which no pod of the lab can reach.
func (j *journey) examine() error {
	title("h1# caracalctl doctor --to %s --resolv-conf /dev/null", lab.Outside4)
	out, err := j.lab.Host(1).Exec(j.ctx, "caracalctl", "doctor", "--to", lab.Outside4.String(), "--resolv-conf", "/dev/null")
	fmt.Print(out)
	return err
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
