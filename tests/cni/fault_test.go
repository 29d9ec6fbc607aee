package cni

import (
	"path/filepath"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

var (
	addSteps = []string{"load", "predecessor", "address", "record", "veth", "sysctl", "attach", "commit", "policy", "host", "pod", "answer"}
	delSteps = []string{"unmap", "unlink", "forget"}
)

// TestFaults fails and kills ADD and DEL at every step; afterwards DEL, GC and another ADD each leave nothing but what they
// should.
func TestFaults(t *testing.T) {
	h := newHost(t)
	h.bin = testenv.Faulty(t, "caracal")
	other := h.pod().add()
	for _, command := range []string{"ADD", "DEL"} {
		steps := addSteps
		if command == "DEL" {
			steps = delSteps
		}
		for _, step := range steps {
			for _, how := range []string{"error", "kill"} {
				for _, after := range []string{"DEL", "GC", "ADD"} {
					t.Run(command+"/"+step+"/"+how+"/"+after, func(t *testing.T) {
						fault(t, h, other, command, step+":"+how, after)
					})
				}
			}
		}
	}
	other.del()
	h.clean()
}

func fault(t *testing.T, h *host, other *pod, command, where, after string) {
	old := h.t
	h.t = t
	defer func() { h.t = old }()
	p := h.pod()
	p.conf = object{"name": "faulty"}
	if command == "DEL" {
		p.add()
	}
	if err := p.do(command, "CARACAL_FAULT="+where); err == nil {
		t.Fatalf("%s went well", command)
	}
	only := func() error { return h.othersOnly(other) }
	if command == "ADD" && filepath.Ext(where) == "" && where[len(where)-5:] == "error" {
		eventually(t, "a failed ADD leaves nothing", only)
	}
	switch after {
	case "DEL":
		p.del()
	case "GC":
		g := *p
		g.conf = object{"name": "faulty", "cni.dev/valid-attachments": []any{}}
		must(t, g.do("GC"))
	case "ADD":
		if where == "answer:kill" || command == "DEL" && (where == "unmap:kill" || where == "unmap:error") {
			p.fails(103, "exists", "ADD") // the attachment is whole
			p.del()
			break
		}
		p.add()
		p.ping(other.addr(false))
		c := *p
		c.conf = object{"name": "faulty", "prevResult": p.raw}
		must(t, c.do("CHECK"))
		p.del()
	}
	eventually(t, "only the other pod is left", only)
	if links := run(t, p.ns, "ip", "-o", "link"); len(links) == 0 || len(splitLines(links)) != 1 {
		t.Errorf("in the pod: %s", links)
	}
}
