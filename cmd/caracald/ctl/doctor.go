package ctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// What doctor says of a check.
const (
	statusOK      = "ok"
	statusWarn    = "WARN"
	statusFail    = "FAIL"
	statusSkipped = "skipped"
)

// diagnosis is a line of doctor's: of a check, or of one thing that it looked at.
type diagnosis struct {
	Name         string  `json:"name"`
	Status       string  `json:"status"` // ok, WARN, FAIL, skipped
	Detail       string  `json:"detail"`
	Remedy       string  `json:"remedy,omitempty"` // the way out
	Milliseconds float64 `json:"milliseconds"`     // that the line's check took, in all
}

// checks are what doctor does, in this order: from the machine up to the packets, and what these did last.
var checks = []struct {
	name string
	run  func(*doctor) error // an error: it could not be checked, which is a FAIL
}{
	{"configuration", (*doctor).checkConfiguration},
	{"directories", (*doctor).checkDirectories},
	{"kernel", (*doctor).checkKernel},
	{"sysctls", (*doctor).checkSysctls},
	{"pods", (*doctor).checkPods},
	{"addresses", (*doctor).checkAddresses},
	{"kubernetes", (*doctor).checkKubernetes},
	{"uplinks", (*doctor).checkUplinks},
	{"routes", (*doctor).checkRoutes},
	{"masquerade", (*doctor).checkMasquerade},
	{"agent", (*doctor).checkAgent},
	{"probe", (*doctor).checkProbes},
	{"mtu", (*doctor).checkMTU},
	{"dns", (*doctor).checkDNS},
	{"drops", (*doctor).checkDrops},
	{"fullness", (*doctor).checkFullness},
}

// slow is when doctor begins to say what it is doing.
const slow = 2 * time.Second

// doctor is one examination of the node.
type doctor struct {
	*globals
	pod        string
	to         []string
	timeout    time.Duration
	cache      string
	resolvConf string
	confDir    string // where runtimes look for networks
	binDir     string // and for plugins; a list as PATH is

	cmd       *cobra.Command
	endpoints []node.Endpoint // that node.db records and --pod leaves
	others    []node.Endpoint // of these and all other pods
	dbErr     error           // why there are none; node.ErrNoDatabase on a fresh node
	maps      *maps.Maps      // nil: mapsErr says why
	mapsErr   error
	routes    []maps.Route // in the maps
	before    []maps.Count // in the maps, when the examination began
	agent     agent.Status
	agentErr  error    // errNoAgent when none runs
	reached   []*probe // what answered, for the checks after checkProbes

	check     string // at work
	from      int    // its first line
	diagnoses []diagnosis
}

func newDoctorCommand(g *globals) *cobra.Command {
	d := &doctor{globals: g}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong with this node, and say the way out",
		Long: `doctor compares what this node should have with what it has, sends probes from a pod, and says what is wrong and the way
out. It changes nothing.

Each line is ok; WARN, which is worth a look; FAIL, which keeps packets from where they should go; or skipped, with the
reason. docs/doctor.md says what each check means. Exit code 1: something FAILs.`,
		Example: `  caracalctl doctor
  caracalctl doctor --pod default/web --to 10.244.3.7
  caracalctl doctor -o json | jq '.[] | select(.status == "FAIL")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&d.pod, "pod", "", "look at and probe from this `POD` alone: namespace/name, or what else pods takes")
	f.StringArrayVar(&d.to, "to", nil, "also probe this `ADDRESS`; may be repeated")
	f.DurationVar(&d.timeout, "timeout", time.Second, "how long to wait for each answer")
	f.StringVar(&d.resolvConf, "resolv-conf", "/etc/resolv.conf", "`FILE` that names the servers for the dns check")
	f.StringVar(&d.confDir, "conf-dir", FromEnv("CNI_NET_DIR", defaultConfDir), "`DIR` in which runtimes look for networks (env CNI_NET_DIR)")
	f.StringVar(&d.binDir, "bin-dir", FromEnv("CNI_BIN_DIR", defaultBinDir), "`DIR` in which they look for plugins; several with colons between (env CNI_BIN_DIR)")
	cacheFlag(cmd, &d.cache)
	return cmd
}

func (d *doctor) run(cmd *cobra.Command) error {
	if d.timeout <= 0 {
		return usagef("--timeout %v: must be more than 0, as in 1s", d.timeout)
	}
	for _, s := range d.to {
		if a, err := netip.ParseAddr(s); err != nil || a.Zone() != "" {
			return usagef("--to %q: not an address", s)
		}
	}
	p := &progress{out: cmd.ErrOrStderr(), what: "what there is to compare"}
	defer time.AfterFunc(slow, p.begin).Stop()
	defer p.end()
	d.cmd = cmd
	d.read(cmd.Context())
	if d.maps != nil {
		defer d.maps.Close()
	}
	if d.pod != "" && len(d.endpoints) == 0 {
		if d.dbErr != nil {
			return d.dbErr
		}
		return fmt.Errorf("--pod %q: no pod of this node has that name, container id, address or host interface", d.pod)
	}
	var stopped error
	for i, c := range checks {
		if cmd.Context().Err() != nil {
			stopped = fmt.Errorf("interrupted before the check of %s", c.name)
			break
		}
		p.at(fmt.Sprintf("%s (%d of %d)", c.name, i+1, len(checks)))
		d.check, d.from = c.name, len(d.diagnoses)
		began := time.Now()
		if err := c.run(d); err != nil {
			d.fail("", "could not be checked: %v", err)
		}
		for j := d.from; j < len(d.diagnoses); j++ {
			d.diagnoses[j].Milliseconds = float64(time.Since(began).Microseconds()) / 1000
		}
	}
	p.end()
	return cmp.Or(stopped, d.print(cmd))
}

// read reads what the checks compare. What can't be read is for the checks to tell.
func (d *doctor) read(ctx context.Context) {
	d.dbErr = d.view(ctx, func(tx *node.Tx) (err error) {
		d.others, err = tx.AllEndpoints()
		return err
	})
	for _, e := range d.others {
		if recorded(e).matches(d.pod) {
			d.endpoints = append(d.endpoints, e)
		}
	}
	d.agent, d.agentErr = agentStatus(ctx, d.socket)
	if d.maps, d.mapsErr = d.globals.maps(); d.mapsErr != nil {
		d.maps = nil
		return
	}
	var counted error
	d.routes, d.mapsErr = d.maps.Routes()
	d.before, counted = d.maps.Counts()
	d.mapsErr = errors.Join(d.mapsErr, counted)
}

func (d *doctor) print(cmd *cobra.Command) error {
	t := newTable("CHECK", "STATUS", "DETAIL")
	for _, f := range d.diagnoses {
		detail := f.Detail
		if f.Remedy != "" {
			detail += "; " + f.Remedy
		}
		t.add(f.Name, f.Status, detail)
	}
	if err := d.globals.print(cmd, d.diagnoses, t); err != nil {
		return err
	}
	if slices.ContainsFunc(d.diagnoses, func(f diagnosis) bool { return f.Status == statusFail }) {
		return errFound
	}
	return nil
}

// found adds a line. about is what of the check it is about, "" for all of it.
func (d *doctor) found(status, about, remedy, format string, args ...any) {
	name := d.check
	if about != "" {
		name += " " + about
	}
	d.diagnoses = append(d.diagnoses, diagnosis{Name: name, Status: status, Detail: fmt.Sprintf(format, args...), Remedy: remedy})
}

func (d *doctor) ok(format string, args ...any)      { d.found(statusOK, "", "", format, args...) }
func (d *doctor) skipped(format string, args ...any) { d.found(statusSkipped, "", "", format, args...) }
func (d *doctor) warn(remedy, format string, args ...any) {
	d.found(statusWarn, "", remedy, format, args...)
}
func (d *doctor) fail(remedy, format string, args ...any) {
	d.found(statusFail, "", remedy, format, args...)
}

// silent tells whether the check at work has added no line yet: then all it looked at is right.
func (d *doctor) silent() bool { return len(d.diagnoses) == d.from }

// progress says what is being done, once that has taken long.
type progress struct {
	out io.Writer

	mu           sync.Mutex
	what         string
	begun, ended bool
}

func (p *progress) at(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what = what
	p.say()
}

func (p *progress) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begun = true
	p.say()
}

func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
}

// say is called with the lock held.
func (p *progress) say() {
	if p.begun && !p.ended {
		fmt.Fprintf(p.out, "caracalctl: checking %s\n", p.what)
	}
}
