package ctl

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	stdmaps "maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// checkKernel: programs and maps are pinned, of this version, where the machine's other processes see them.
func (d *doctor) checkKernel() error {
	if errors.Is(d.mapsErr, errNotLoaded) && len(d.others) == 0 {
		if err := loader.Probe(); err != nil {
			d.fail("boot a newer kernel", "%v", err)
			return nil
		}
		d.warn("it is loaded by the first ADD", "nothing is pinned in %s, and no pod is recorded", d.bpffsDir)
		return nil
	}
	if d.mapsErr != nil {
		d.fail("", "%v", d.mapsErr)
		return nil
	}
	s, err := d.maps.State()
	if err != nil {
		return err
	}
	if s.Build != build() { // which may have fewer maps and programs
		d.warn("caracalctl upgrade replaces them without cutting flows", "the loaded programs are build %s, this caracalctl has %s", s.Build, build())
	} else if missing := d.missingPins(); len(missing) > 0 {
		d.fail("caracalctl upgrade --force pins programs again; what else is gone takes caracalctl uninstall and new pods",
			"not pinned in %s: %s", d.bpffsDir, strings.Join(missing, ", "))
	}
	// Where another process's root may not be looked at, as in some containers, it can't be told.
	if same, err := seesSame("/proc/1/root", d.bpffsDir); err == nil && !same {
		d.fail("run caracalctl, and the runtime, in the machine's own mount namespace (nsenter --mount=/proc/1/ns/mnt)",
			"%s is in a bpf file system of this mount namespace alone: the machine's other processes don't see it", d.bpffsDir)
	}
	if d.silent() {
		d.ok("programs and maps are pinned in %s, schema %d, build %s", d.bpffsDir, s.Version, s.Build)
	}
	return nil
}

func (d *doctor) missingPins() []string {
	var missing []string
	look := func(path string) {
		if _, err := os.Lstat(path); err != nil {
			missing = append(missing, strings.TrimPrefix(path, d.bpffsDir+"/"))
		}
	}
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		look(bpf.MapPath(d.bpffsDir, name))
	}
	for name := range bpf.Programs(&bpf.DataplaneObjects{}) {
		look(bpf.ProgramPath(d.bpffsDir, name))
	}
	slices.Sort(missing)
	return missing
}

// seesSame tells whether the process whose root directory is given sees the same directory at dir as this one. An error:
// it can't be told.
func seesSame(root, dir string) (bool, error) {
	own, err := os.Stat(dir)
	if err != nil {
		return false, err
	}
	theirs, err := os.Stat(filepath.Join(root, dir))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(own, theirs), err
}

// checkSysctls: this host forwards, still learns its own routes, and does not drop what comes by the right way.
func (d *doctor) checkSysctls() error {
	if len(d.others) == 0 && len(d.uplinks()) == 0 {
		d.skipped("the first ADD sets them")
		return nil
	}
	d.wantForwarding()
	if err := d.wantRouterAdvertisements(); err != nil {
		return err
	}
	if err := d.wantReversePath(); err != nil {
		return err
	}
	if d.silent() {
		d.ok("forwarding is on, and no filter is in the pods' way")
	}
	return nil
}

func (d *doctor) wantForwarding() {
	off := func(name string) bool {
		v, err := sysctl(name)
		return err == nil && v == "0" // one that is not there belongs to a family or an interface that is not
	}
	const blame = ", and look for what turned it off (sysctl.d, another network's agent)"
	interfaces := d.uplinks()
	v6 := false
	for _, e := range d.endpoints {
		interfaces = append(interfaces, e.HostIfName)
		v6 = v6 || slices.ContainsFunc(e.Addrs, netip.Addr.Is6)
	}
	names := slices.DeleteFunc(interfaces, func(name string) bool { return !off("ipv4/conf/" + name + "/forwarding") })
	switch {
	case off("ipv4/ip_forward"): // which turns all interfaces' off
		d.fail("sysctl -w net/ipv4/ip_forward=1"+blame, "net/ipv4/ip_forward is 0: the host's stack forwards no IPv4")
	case len(names) > 0:
		d.fail("sysctl -w net/ipv4/conf/"+names[0]+"/forwarding=1"+blame, "the host's stack forwards no IPv4 that comes by %s", strings.Join(names, ", "))
	}
	if v6 && off("ipv6/conf/all/forwarding") {
		d.fail("sysctl -w net/ipv6/conf/all/forwarding=1"+blame, "net/ipv6/conf/all/forwarding is 0: the host's stack forwards no IPv6")
	}
}

// wantRouterAdvertisements finds interfaces whose routes come by router advertisements, which a host that forwards
// ignores unless accept_ra is 2.
func (d *doctor) wantRouterAdvertisements() error {
	if v, err := sysctl("ipv6/conf/all/forwarding"); err != nil || v == "0" {
		return nil
	}
	routes, err := nl.Dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(unix.AF_INET6, &netlink.Route{Protocol: unix.RTPROT_RA}, netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	told := make(map[string]bool)
	for _, r := range routes {
		name, err := nl.Name(r.LinkIndex)
		if err != nil || told[name] {
			continue
		}
		told[name] = true
		if v, err := sysctl("ipv6/conf/" + name + "/accept_ra"); err == nil && v == "1" {
			d.warn(fmt.Sprintf("sysctl -w net/ipv6/conf/%s/accept_ra=2", name),
				"%s has routes by router advertisement, but with forwarding on and accept_ra 1 the next one is ignored and they expire", name)
		}
	}
	return nil
}

// wantReversePath finds interfaces with strict rp_filter by which packets come whose way back is another: what of them
// enters the host's stack is dropped. Pods' interfaces and those to other nodes.
func (d *doctor) wantReversePath() error {
	all, err := sysctl("ipv4/conf/all/rp_filter")
	if err != nil {
		return err
	}
	strict := func(name string) bool {
		v, err := sysctl("ipv4/conf/" + name + "/rp_filter")
		return err == nil && max(all, v) == "1" // the larger one counts; 2 is loose
	}
	told := make(map[string]bool)
	look := func(name string, behind netip.Addr) {
		if !behind.Is4() || told[name] || !strict(name) {
			return
		}
		if back, err := wayTo(behind); err != nil || back != name {
			told[name] = true
			d.fail(fmt.Sprintf("mend the route, or sysctl -w net/ipv4/conf/%s/rp_filter=2 (and .../all/rp_filter)", name),
				"rp_filter of %s is strict, but the host's way back to %s is not by it: the stack drops what comes from there", name, behind)
		}
	}
	for _, e := range d.endpoints {
		for _, a := range e.Addrs {
			look(e.HostIfName, a)
		}
	}
	for _, r := range d.remotes() {
		if name, err := nl.Name(int(r.IfIndex)); err == nil {
			look(name, r.Prefix.Addr())
		}
	}
	return nil
}

// wayTo is the interface by which the host's stack reaches an address, "" when a blackhole or nothing leads there.
func wayTo(a netip.Addr) (string, error) {
	found, err := netlink.RouteGet(a.AsSlice())
	if err != nil || len(found) == 0 || found[0].Type != unix.RTN_UNICAST {
		return "", err
	}
	return nl.Name(found[0].LinkIndex)
}

// sysctl reads one by its path below /proc/sys/net.
func sysctl(name string) (string, error) {
	b, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		return "", fmt.Errorf("read sysctl net/%s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// checkAddresses: what ipam check finds, in short.
func (d *doctor) checkAddresses() error {
	if errors.Is(d.dbErr, node.ErrNoDatabase) {
		d.skipped("%v", d.dbErr)
		return nil
	}
	r, err := (&ipamCheckOptions{globals: d.globals, cache: d.cache}).check(d.cmd)
	if errors.Is(err, unix.EPERM) && slices.ContainsFunc(d.endpoints, closed) {
		d.skipped(toEnter)
		return nil
	}
	if err != nil {
		return err
	}
	if len(r.Problems) == 0 {
		d.ok("%d addresses in %d blocks, all held by the %d recorded pods or a runtime", r.Addresses, r.Blocks, r.Endpoints)
		return nil
	}
	d.fail("caracalctl ipam check lists them, caracalctl ipam release gives an address back", "%s; the first: %s %s",
		kinds(r.Problems), r.Problems[0].Holder, r.Problems[0].Detail)
	return nil
}

// kinds counts problems by kind: 2 dead, 1 leaked.
func kinds(problems []ipam.Problem) string {
	n := make(map[string]int)
	for _, p := range problems {
		n[p.Kind]++
	}
	var words []string
	for _, kind := range slices.Sorted(stdmaps.Keys(n)) {
		words = append(words, fmt.Sprintf("%d %s", n[kind], kind))
	}
	return strings.Join(words, ", ")
}

// checkAgent: the agent answers, and has nothing to complain of.
func (d *doctor) checkAgent() error {
	s := d.agent
	if errors.Is(d.agentErr, errNoAgent) {
		d.warn("systemctl start caracald, or --socket is another one; a node without other nodes needs none",
			"no agent answers on %s: pods go on, routes to other nodes are not learned", d.socket)
		d.wantPorts()
		return nil
	}
	if d.agentErr != nil {
		return d.agentErr
	}
	for _, p := range s.Problems {
		d.found(statusFail, printable(p.About), "", "since %s: %s", since(p.Since), p.Text)
	}
	for _, a := range s.Alarms {
		d.found(statusWarn, printable(a.Kind), "", "since %s: %s", since(a.Since), a.Text)
	}
	for _, p := range s.Peers {
		if p.Info != "Established" {
			why := ""
			if p.LastError != "" {
				why = ": " + p.LastError
			}
			d.found(statusFail, p.Address.String(), "is its agent up, TCP port 179 open, and do both sides' AS numbers and passwords agree?",
				"the BGP session is %s since %s%s", p.Info, since(p.Since), why)
		}
	}
	if d.silent() && !s.Ready {
		d.warn("caracalctl node status", "it has not finished its first round yet")
	}
	if d.silent() {
		d.ok("%d BGP sessions are established, %d routes learned", len(s.Peers), s.Learned)
	}
	return nil
}

// checkDrops: which drop reasons grew since doctor began.
func (d *doctor) checkDrops() error {
	if d.maps == nil || d.mapsErr != nil {
		d.skipped("the kernel maps can't be read")
		return nil
	}
	now, err := d.maps.Counts()
	if err != nil {
		return err
	}
	for i, c := range now {
		if n := c.Packets - d.before[i].Packets; c.Dropped() && n > 0 {
			d.found(statusWarn, c.Verdict, cmp.Or(natRemedies[c.Verdict], "caracalctl counters --drops --watch 1s shows whether it goes on"),
				"%d packets at %s while doctor ran: %s", n, c.Hook, c.Meaning)
		}
	}
	if d.silent() {
		d.ok("none while doctor ran")
	}
	return nil
}

// nearlyFull is the share of a table's places from which on checkFullness warns.
const nearlyFull = 0.8

// checkFullness: flows, the pods' shares of them, pods and routes have room.
func (d *doctor) checkFullness() error {
	if d.maps == nil || d.mapsErr != nil {
		d.skipped("the kernel maps can't be read")
		return nil
	}
	spec, err := bpf.LoadDataplane()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	s, err := d.maps.State()
	if err != nil {
		return err
	}
	pods, err := d.maps.Pods()
	if err != nil {
		return err
	}
	look := func(remedy, what string, used, limit uint32) {
		if limit > 0 && float64(used) > nearlyFull*float64(limit) {
			d.warn(remedy, "%s: %d of %d places are taken", what, used, limit)
		}
	}
	look("caracalctl flows --limit 20 shows whose; max_flows in the network configuration makes the next table larger", "flows", s.Flows, s.MaxFlows)
	look("no pod can be added beyond", "pods", uint32(len(pods)), spec.Maps[bpf.DataplaneMapCaracalPods].MaxEntries)
	look("routes that other nodes announce beyond are refused; announce larger blocks", "routes", uint32(len(d.routes)), spec.Maps[bpf.DataplaneMapCaracalRoutes].MaxEntries)
	ifs, err := openInterfaces()
	if err != nil {
		return err
	}
	defer ifs.close()
	for _, e := range d.endpoints {
		index, err := ifs.index(e.HostIfName)
		if err != nil {
			return err
		}
		q, err := d.maps.Quota(uint32(index))
		if errors.Is(err, maps.ErrNotFound) {
			continue // checkPods tells of a pod that is not in the maps
		}
		if err != nil {
			return err
		}
		title := recorded(e).title()
		look(fmt.Sprintf("caracalctl flows --pod %s shows them; new ones beyond are refused (drop_quota)", title), "flows of "+title, q.Flows, q.Limit)
	}
	if d.silent() {
		d.ok("%d of %d flows, %d pods, %d routes", s.Flows, s.MaxFlows, len(pods), len(d.routes))
	}
	return nil
}
