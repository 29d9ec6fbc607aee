package ctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// States of a pod.
const (
	stateReady      = "ready"
	stateIncomplete = "incomplete"
	stateDead       = "dead"
)

// pod is an attachment as node.db, the kernel maps and the interfaces know it.
type pod struct {
	Network       string            `json:"network"`
	ContainerID   string            `json:"containerID"`
	IfName        string            `json:"ifName"`
	Endpoint      string            `json:"endpoint,omitempty"` // Docker's id of it
	Profiles      []string          `json:"profiles,omitempty"`
	PodName       string            `json:"podName"`
	PodNamespace  string            `json:"podNamespace"`
	PodUID        string            `json:"podUID,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	Addresses     []netip.Addr      `json:"addresses"`
	HostInterface string            `json:"hostInterface"`
	HostIfIndex   int               `json:"hostIfIndex"` // 0: the interface is gone
	MAC           string            `json:"mac"`         // of the pod's end, as the dataplane knows it
	HostMAC       string            `json:"hostMAC"`
	MTU           int               `json:"mtu"`
	Attached      string            `json:"attached"` // tcx, clsact, or empty: not attached
	State         string            `json:"state"`    // ready, incomplete, dead
	Shaped        bool              `json:"shaped"`
	Flows         *maps.Quota       `json:"flows"` // null: the maps do not know the pod
	IPAM          string            `json:"ipam"`
	Netns         string            `json:"netns"`
	Created       time.Time         `json:"created"`
	Problems      []string          `json:"problems,omitempty"`
}

func newPodsCommand(g *globals) *cobra.Command {
	o := &podsOptions{globals: g}
	cmd := &cobra.Command{
		Use:     "pods [POD]",
		Aliases: []string{"pod"},
		Short:   "List the pods of this node",
		Long: `pods lists the attachments that node.db records, with what the kernel maps and interfaces say of them.

STATE is ready; incomplete when something of it is missing, because an ADD or DEL is at work or did not finish; or dead
when its network namespace is gone and no DEL came. "caracalctl ipam check" says more.
POD is a pod's name, namespace/name, pod/namespace/name, the beginning of a container id, an address or a host interface.
FLOWS is how many confirmed flows count against the pod, of how many it may have.`,
		Example: `  caracalctl pods
  caracalctl pods default/web
  caracalctl pods 10.244.0.7 -o yaml
  caracalctl pods -o json | jq -r '.[].addresses[0]'`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.pod = args[0]
			}
			return o.run(cmd)
		},
	}
	cmd.Flags().StringVar(&o.network, "network", "", "only pods of this `NETWORK`")
	return cmd
}

type podsOptions struct {
	*globals
	pod, network string
}

func (o *podsOptions) run(cmd *cobra.Command) error {
	pods, err := o.pods(cmd)
	if err != nil {
		return err
	}
	shown := []pod{}
	t := newTable("NAMESPACE", "POD", "NETWORK", "CONTAINER", "INTERFACE", "ADDRESSES", "HOST-INTERFACE", "MAC", "MTU", "ATTACHED", "STATE", "SHAPED", "FLOWS")
	for _, p := range pods {
		if !p.matches(o.pod) || o.network != "" && p.Network != o.network {
			continue
		}
		shown = append(shown, p)
		flows := ""
		if p.Flows != nil {
			flows = fmt.Sprintf("%d/%d", p.Flows.Flows, p.Flows.Limit)
		}
		t.add(p.PodNamespace, p.PodName, p.Network, short(p.ContainerID), p.IfName, join(p.Addresses), p.HostInterface,
			p.MAC, p.MTU, p.Attached, p.State, yesNo(p.Shaped), flows)
	}
	if o.pod != "" && len(shown) == 0 {
		return fmt.Errorf("pod %q: no pod of this node has that name, container id, address or host interface", o.pod)
	}
	if err := o.print(cmd, shown, t); err != nil {
		return err
	}
	for _, p := range shown {
		for _, problem := range p.Problems {
			warn(cmd, "%s: %s", p.title(), problem)
		}
	}
	return nil
}

// pods joins node.db with the maps, as far as these are there, sorted by network, container and interface.
func (g *globals) pods(cmd *cobra.Command) ([]pod, error) {
	var all []node.Endpoint
	err := g.view(cmd.Context(), func(tx *node.Tx) (err error) {
		if err = g.warnBoot(cmd, tx); err == nil {
			all, err = tx.AllEndpoints()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	m, err := g.maps()
	switch {
	case errors.Is(err, errNotLoaded):
		warn(cmd, "%v", err)
	case err != nil:
		return nil, err
	default:
		defer m.Close()
	}
	ifs, err := openInterfaces()
	if err != nil {
		return nil, err
	}
	defer ifs.close()
	pods := make([]pod, 0, len(all))
	for _, e := range all {
		p, err := g.joined(e, m, ifs)
		if err != nil {
			return nil, err
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// joined adds to a recorded endpoint what the maps (nil: none) and the interfaces say.
func (g *globals) joined(e node.Endpoint, m *maps.Maps, ifs *interfaces) (pod, error) {
	p := recorded(e)
	if why := dead(e); why != "" {
		p.State = stateDead
		p.Problems = append(p.Problems, why)
	}
	index, err := ifs.index(e.HostIfName)
	if err != nil {
		return pod{}, err
	}
	if p.HostIfIndex = index; index == 0 {
		p.problem("host interface %s is not in this network namespace", e.HostIfName)
		return p, nil
	}
	if m == nil {
		p.problem("no maps are loaded")
		return p, nil
	}
	if p.Attached, err = loader.Attached(g.bpffsDir, e.HostIfName, index); err != nil {
		p.problem("%v", err)
	}
	got, err := m.Pod(uint32(index))
	switch {
	case err == nil:
		p.MAC, p.HostMAC = got.MAC.String(), got.HostMAC.String()
	case errors.Is(err, maps.ErrNotFound):
		p.problem("%s (%d) is not in caracal_pods", e.HostIfName, index)
	default:
		return pod{}, err
	}
	quota, err := m.Quota(uint32(index))
	if err == nil {
		p.Flows = &quota
	} else if !errors.Is(err, maps.ErrNotFound) {
		return pod{}, err
	}
	return p, nil
}

// recorded is a pod as node.db alone knows it.
func recorded(e node.Endpoint) pod {
	p := pod{
		Network: e.Network, ContainerID: e.ContainerID, IfName: e.Interface(),
		PodName: e.PodName, PodNamespace: e.PodNamespace, PodUID: e.PodUID, Labels: e.Labels,
		Addresses: append([]netip.Addr{}, e.Addrs...), HostInterface: e.HostIfName, MAC: e.MAC, HostMAC: e.HostMAC,
		MTU: e.MTU, State: stateReady, Shaped: e.Shaped, IPAM: e.IPAM, Netns: e.Netns, Created: e.Created,
	}
	if d := e.Docker; d != nil { // by the names that Docker's users know, once they are known
		p.Network, p.ContainerID = cmp.Or(d.Network, p.Network), cmp.Or(d.Container, p.ContainerID)
		p.Endpoint, p.Profiles = e.ContainerID, e.Profiles
	}
	return p
}

// problem notes what is wrong with a pod.
func (p *pod) problem(format string, args ...any) {
	p.Problems = append(p.Problems, fmt.Sprintf(format, args...))
	if p.State == stateReady {
		p.State = stateIncomplete
	}
}

// dead says why a recorded endpoint can't be living, "" when it may.
func dead(e node.Endpoint) string {
	if e.NetnsID == "" {
		return "" // Docker has not made it yet
	}
	ns, err := netns.Open(e.Netns)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Sprintf("its network namespace %s is gone", e.Netns)
	case errors.Is(err, netns.ErrNotNamespace):
		return fmt.Sprintf("%s is no network namespace any more", e.Netns)
	case err != nil:
		return "" // it can't be told
	}
	defer ns.Close()
	if inode, err := ns.Inode(); err == nil && fmt.Sprint(inode) != e.NetnsID {
		return fmt.Sprintf("its network namespace is gone; %s is another one", e.Netns)
	}
	return ""
}

// warnBoot says so when the database is of another boot: all pods it records are dead then. Pins do not outlive a
// boot, so where there are some it is a simulated node whose boot id is not this machine's.
func (g *globals) warnBoot(cmd *cobra.Command, tx *node.Tx) error {
	other, err := g.otherBoot(tx)
	if other && !g.pinned() {
		warn(cmd, "%s was written before this machine was booted; the next ADD releases what it records", filepath.Join(g.stateDir, "node.db"))
	}
	return err
}

// otherBoot tells whether the database's records belong to another boot than this.
func (g *globals) otherBoot(tx *node.Tx) (bool, error) {
	boot, err := g.options().BootID()
	return err == nil && tx.Boot() != boot, err
}

// pinned tells whether anything is in the bpffs directory.
func (g *globals) pinned() bool {
	_, err := os.Lstat(g.bpffsDir)
	return err == nil
}

// matches tells whether an argument names this pod; an empty one names all.
func (p pod) matches(arg string) bool {
	name, _ := strings.CutPrefix(arg, "pod/") // as kubectl says it
	if arg == "" || arg == p.HostInterface || name == p.PodName || name == p.PodNamespace+"/"+p.PodName {
		return true
	}
	if a, err := netip.ParseAddr(arg); err == nil {
		for _, own := range p.Addresses {
			if own == a.Unmap() {
				return true
			}
		}
		return false
	}
	return len(arg) >= 4 && (strings.HasPrefix(p.ContainerID, arg) || strings.HasPrefix(p.Endpoint, arg))
}

// title is how a pod is called in a sentence.
func (p pod) title() string {
	if p.PodName == "" {
		return short(p.ContainerID) + "/" + p.IfName
	}
	if p.PodNamespace == "" {
		return p.PodName
	}
	return p.PodNamespace + "/" + p.PodName
}

// byAddress finds pods by their addresses.
func byAddress(pods []pod) map[netip.Addr]string {
	names := make(map[netip.Addr]string)
	for _, p := range pods {
		for _, a := range p.Addresses {
			names[a] = p.title()
		}
	}
	return names
}

// short is a container id as tables show it.
func short(id string) string {
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

// podNames names the addresses of this node's pods, as far as node.db can be read: flows and routes are shown without.
func (g *globals) podNames(ctx context.Context) ([]pod, map[netip.Addr]string) {
	var pods []pod
	_ = g.view(ctx, func(tx *node.Tx) error { // without it the maps speak for themselves
		all, err := tx.AllEndpoints()
		for _, e := range all {
			pods = append(pods, recorded(e))
		}
		return err
	})
	return pods, byAddress(pods)
}
