package containerd

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// nerdctl is the program of a major version, "v1" or "v2", that .ci/nerdctl has built.
func nerdctl(t testing.TB, major string) string {
	t.Helper()
	root, err := testenv.Root()
	must(t, err)
	found, err := filepath.Glob(filepath.Join(root, "out", "nerdctl", major+".*", "nerdctl"))
	must(t, err)
	if len(found) == 0 {
		lab.Skip(t, "needs nerdctl "+major+": run .ci/nerdctl")
	}
	return found[len(found)-1]
}

// installNerdctl puts a version of it onto a machine, and the image where it looks for it.
func (m *machine) installNerdctl(major string) {
	m.t.Helper()
	m.copy(nerdctl(m.t, major), "/usr/local/bin/nerdctl")
	m.sh("ctr -n k8s.io images export - " + busybox + " | nerdctl load")
}

// container is one of nerdctl's, which serves its own name on port 80.
type container struct {
	m    *machine
	word string
}

// starts runs a container that may fail.
func (m *machine) starts(name, options string) (*container, error) {
	c := &container{m, name}
	_, err := m.Sh(m.t.Context(), "nerdctl run -d --name "+name+" --net caracal "+options+" "+busybox+" sh -c "+
		quote("mkdir -p /srv; echo "+c.name()+" >/srv/index.html; exec httpd -f -p 80 -h /srv"))
	return c, err
}

func (m *machine) runs(name, options string) *container {
	m.t.Helper()
	c, err := m.starts(name, options)
	must(m.t, err)
	return c
}

func (c *container) name() string { return c.word + " of " + c.m.Name }

// exec may lose output, as nerdctl exec does now and then.
func (c *container) exec(script string) (string, error) {
	return c.m.Sh(c.m.t.Context(), "nerdctl exec "+c.word+" sh -c "+quote(script))
}

func (c *container) does(command string) {
	c.m.t.Helper()
	c.m.sh("nerdctl " + command + " " + c.word)
}

func (c *container) addr() netip.Addr {
	c.m.t.Helper()
	a, err := netip.ParseAddr(c.m.sh("nerdctl inspect --format '{{.NetworkSettings.IPAddress}}' " + c.word))
	must(c.m.t, err)
	return a
}

// TestNerdctl: containers of two versions of nerdctl on two machines.
func TestNerdctl(t *testing.T) {
	nerdctl(t, "v1")
	nerdctl(t, "v2")
	all := newCluster(t)
	for _, major := range []string{"v1", "v2"} {
		if !t.Run(major, func(t *testing.T) {
			for _, m := range all {
				m.t = t
				m.installNerdctl(major)
			}
			testNerdctl(t, major, all[0], all[1])
			for _, m := range all {
				m.clean()
			}
		}) {
			return
		}
	}
}

func testNerdctl(t *testing.T, major string, h1, h2 *machine) {
	h1.plugin("", "")
	web, client := h1.runs("web", "-p 8080:80"), h1.runs("client", "")
	far := h2.runs("far", "-p 8080:80")
	for _, c := range []*container{web, far} {
		reached(t, c.name(), c.addr().String(), 80, web, client, far, h1, h2)
		reached(t, c.name(), c.m.Addr().String(), 8080, client, far, h1, h2, h1.Lab().Outside())
	}
	check := func() {
		t.Helper()
		reached(t, web.name(), web.addr().String(), 80, client, far)
		reached(t, web.name(), h1.Addr().String(), 8080, h2)
		reached(t, far.name(), far.addr().String(), 80, web)
	}
	// Every DEL comes without a namespace, and version 2 sends one before each ADD.
	web.does("stop -t 0")
	web.does("start")
	check()
	var got []string
	for _, c := range h1.calls() {
		if strings.Contains(h1.sh("nerdctl inspect --format '{{.ID}}' web"), strings.TrimPrefix(c.container, "default-")) {
			got = append(got, c.command)
			if (c.netns == "") != (c.command == "DEL") {
				t.Errorf("%s with namespace %q", c.command, c.netns)
			}
		}
	}
	if want := map[string][]string{"v1": {"ADD", "DEL", "ADD"}, "v2": {"DEL", "ADD", "DEL", "ADD"}}[major]; !slices.Equal(slices.Compact(got), want) {
		t.Errorf("calls %v, want %v, and perhaps DEL more than once", got, want)
	}
	h1.unwrap()

	web.does("restart -t 0")
	check()
	h1.kill()
	h1.start()
	reached(t, web.name(), web.addr().String(), 80, client, far)

	// A wanted address, of this machine's block; the second time proves that the first was given back.
	want := client.addr()
	for range 10 {
		want = want.Next()
	}
	mac := map[string]string{"v1": "--label", "v2": "--annotation"}[major] + " nerdctl/mac-address=02:00:5e:00:53:07"
	for range 2 {
		fixed := h1.runs("fixed", "--ip "+want.String()+" "+mac)
		eventually(t, "the container has what it asked for", func() error {
			out, err := fixed.exec("ip -o addr show dev eth0; ip -o link show dev eth0")
			if err == nil && (!strings.Contains(out, want.String()+"/32") || !strings.Contains(out, "02:00:5e:00:53:07")) {
				err = fmt.Errorf("%s, 02:00:5e:00:53:07: it has %q", want, out)
			}
			return err
		})
		reached(t, fixed.name(), want.String(), 80, far, client)
		fixed.does("rm -f")
	}
	for options, words := range map[string]string{
		"--ip " + client.addr().String():  client.addr().String() + ": address is taken by caracal/default-",
		"--ip 192.0.2.77":                 "192.0.2.77: address is in no pool; the pools are 10.244.0.0/16",
		"--ip " + far.addr().String():     "address is in no block of this node; ask for it on the node that has",
		"--mac-address 02:00:5e:00:53:08": `network type \"caracal\" is not supported`, // nerdctl's own word
	} {
		if refused, err := h1.starts("refused", options); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("nerdctl run %s: %v; want %q", options, err, words)
		} else if !strings.HasPrefix(options, "--mac") {
			refused.does("rm -f")
		}
	}

	if major == "v2" {
		h1.reboot()
		must(t, h1.StartEtcdMember())
		must(t, h1.agent())
		h1.ready()
		web.does("start")
		client.does("start")
		check()
	}
	for _, c := range []*container{web, client, far} {
		c.does("rm -f")
	}
}
