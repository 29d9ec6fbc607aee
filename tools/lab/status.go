package lab

import (
	"errors"
	"net/netip"
	"time"
)

// Status is what `lab status` shows of one lab.
type Status struct {
	Name    string       `json:"name"`
	Up      bool         `json:"up"` // false: its making or taking down was interrupted
	Created time.Time    `json:"created"`
	Network string       `json:"network"`
	Hosts   []HostStatus `json:"hosts"`
}

// HostStatus is one host of a Status.
type HostStatus struct {
	Name     string         `json:"name"`
	Netns    string         `json:"netns"`
	Addrs    []netip.Addr   `json:"addresses"`
	Pools    []netip.Prefix `json:"pools"`
	StateDir string         `json:"stateDir"`
	BPFDir   string         `json:"bpffsDir"`
	Conflist string         `json:"conflist"`
	Pods     []PodStatus    `json:"pods"`
}

// PodStatus is one pod of a HostStatus.
type PodStatus struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	ContainerID string            `json:"containerID"`
	Netns       string            `json:"netns"`
	State       PodState          `json:"state"`
	Addrs       []netip.Addr      `json:"addresses"`
	HostIfName  string            `json:"hostInterface"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// ReadStatus reads the state of a lab, also of one that is half made or half removed. The error is ErrNotFound.
func ReadStatus(name string) (Status, error) {
	l, err := Open(name)
	if errors.Is(err, ErrClosing) {
		return Status{Name: name, Hosts: []HostStatus{}}, nil
	}
	if err != nil {
		return Status{}, err
	}
	return l.Status()
}

// Status reads the state of the lab.
func (l *Lab) Status() (Status, error) {
	s := Status{Name: l.Name, Up: l.file.Up, Created: l.file.Created, Network: l.file.Network}
	for _, h := range l.Hosts() {
		hs := HostStatus{Name: h.Name, Netns: h.file.Netns, Addrs: []netip.Addr{h.Addr(), h.Addr6()}, Pools: h.Pools(),
			StateDir: h.StateDir(), BPFDir: h.BPFDir(), Conflist: h.ConfFile(), Pods: []PodStatus{}}
		pods, err := h.Pods()
		if err != nil {
			return Status{}, err
		}
		for _, p := range pods {
			hs.Pods = append(hs.Pods, PodStatus{Name: p.Name, Namespace: p.file.Namespace, ContainerID: p.file.ContainerID,
				Netns: p.file.Netns, State: p.file.State, Addrs: append([]netip.Addr{}, p.Addrs()...),
				HostIfName: p.HostIfName(), Labels: p.file.Labels})
		}
		s.Hosts = append(s.Hosts, hs)
	}
	return s, nil
}
