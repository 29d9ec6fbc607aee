package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

const birdConf = `router id 192.0.2.254;
protocol device {}
protocol kernel { ipv4 { import none; export none; }; }
protocol static {
  ipv4;
  route 172.20.0.0/16 blackhole;
  route 192.0.2.0/24 blackhole;
  route 192.0.2.1/32 blackhole;
  route 10.244.0.0/26 blackhole;
  route 10.244.0.4/32 blackhole;
  route 0.0.0.0/0 blackhole;
}
protocol bgp h1 {
  local 192.0.2.254 as 64999;
  neighbor 192.0.2.1 as 64512;
  ipv4 { import all; export all; next hop self; };
}
`

// TestForeignPeer: a router beside the mesh, BIRD. What it has is learned and it learns our blocks; it takes over neither
// our blocks nor the host's own routes, whatever it announces.
func TestForeignPeer(t *testing.T) {
	bird := testenv.NeedProgram(t, "bird", "bird2")
	l := newHosts(t, 2)
	ctx := t.Context()
	h := l.Host(1)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "bird.conf"), []byte(birdConf), 0o600))
	cmd := exec.Command(bird, "-f", "-c", filepath.Join(dir, "bird.conf"), "-s", filepath.Join(dir, "bird.ctl"), "-P", filepath.Join(dir, "bird.pid"))
	must(t, l.Outside().Start(cmd))
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	before, err := h.Exec(ctx, "ip", "route", "show", "proto", "kernel")
	must(t, err)
	ctl(t, h, "apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: tor}\nspec: {peerIP: 192.0.2.254, asNumber: 64999}\n", "apply", "-f", "-")
	eventually(t, "its route is learned", func() error {
		routes, err := h.Exec(ctx, "ip", "route")
		if err == nil && !strings.Contains(routes, "172.20.0.0/16 via 192.0.2.254") {
			err = fmt.Errorf("%s", routes)
		}
		return err
	})
	eventually(t, "it learns our block", func() error {
		out, err := l.Outside().Exec(ctx, "birdc", "-s", filepath.Join(dir, "bird.ctl"), "show", "route", "10.244.0.0/26", "all")
		if err == nil && !strings.Contains(out, "via 192.0.2.1") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	eventually(t, "what it must not announce is said", func() error {
		s, err := status(t, h)
		if err != nil {
			return err
		}
		text := fmt.Sprint(s.Alarms, s.Problems)
		for _, want := range []string{"10.244.0.0/26", "10.244.0.4/32", "0.0.0.0/0", "192.0.2.0/24"} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("nothing of %s: %s", want, text)
			}
		}
		return nil
	})
	after, err := h.Exec(ctx, "ip", "route", "show", "proto", "kernel")
	must(t, err)
	if after != before {
		t.Errorf("the host's own routes were\n%s\nand are\n%s", before, after)
	}
	routes, err := h.Exec(ctx, "ip", "route")
	must(t, err)
	for _, never := range []string{"192.0.2.0/24 via", "192.0.2.1 via", "10.244.0.4 via", "10.244.0.0/26 via", "default via 192.0.2.254 dev eth0 proto 202"} {
		if strings.Contains(routes, never) {
			t.Errorf("%s", routes)
		}
	}
	if table := ctl(t, h, "", "node", "status"); !strings.Contains(table, "| global            | up    |") {
		t.Errorf("%s", table)
	}
}
