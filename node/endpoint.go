package node

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"
)

// Key names one attachment: what a runtime calls it.
type Key struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// String is the key as it stands in the database: network/container/interface, none of which may be empty, hold a slash
// or be other than UTF-8.
func (k Key) String() string { return k.Network + "/" + k.ContainerID + "/" + k.IfName }

// ParseKey is the inverse of String.
func ParseKey(s string) (Key, error) {
	f := strings.Split(s, "/")
	if len(f) != 3 || f[0] == "" || f[1] == "" || f[2] == "" || !utf8.ValidString(s) {
		return Key{}, fmt.Errorf("attachment %q: not network/container/interface", s)
	}
	return Key{f[0], f[1], f[2]}, nil
}

func (k Key) check() error {
	_, err := ParseKey(k.String())
	return err
}

// Endpoint is what ADD recorded of one attachment before it made anything of it, and all that DEL may touch.
type Endpoint struct {
	Key
	HostIfName   string            `json:"hostInterface,omitempty"`
	Netns        string            `json:"netns,omitempty"`   // CNI_NETNS
	NetnsID      string            `json:"netnsID,omitempty"` // device:inode, to tell a namespace from its path's next user
	MAC          string            `json:"mac,omitempty"`
	HostMAC      string            `json:"hostMAC,omitempty"`
	Addrs        []netip.Addr      `json:"addresses,omitempty"`
	MTU          int               `json:"mtu,omitempty"` // bytes
	Shaped       bool              `json:"shaped,omitempty"`
	IPMasq       bool              `json:"ipMasq,omitempty"`      // its configuration wants both families masqueraded
	Masquerade4  bool              `json:"masquerade4,omitempty"` // what it sends out of all pools gets the host's address
	Masquerade6  bool              `json:"masquerade6,omitempty"`
	PodName      string            `json:"podName,omitempty"`
	PodNamespace string            `json:"podNamespace,omitempty"`
	PodUID       string            `json:"podUID,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	IPAM         string            `json:"ipam,omitempty"`     // "caracal", "docker", or the foreign plugin's type
	Profiles     []string          `json:"profiles,omitempty"` // that decide about it when no tier does
	Ports        []HostPort        `json:"ports,omitempty"`    // of the host, that a later plugin publishes its own at
	Docker       *Docker           `json:"docker,omitempty"`
	Adopted      bool              `json:"adopted,omitempty"` // Calico's plugin has made it
	Created      time.Time         `json:"created"`
}

// HostPort is a port of the host.
type HostPort struct {
	Protocol string     `json:"protocol"`    // "tcp", "udp" or "sctp"
	IP       netip.Addr `json:"ip,omitzero"` // none: every address of the host; unspecified: every one of its family
	Port     uint16     `json:"port"`
}

// Overlaps tells whether a packet can be for both.
func (p HostPort) Overlaps(o HostPort) bool {
	if p.Protocol != o.Protocol || p.Port != o.Port {
		return false
	}
	return !p.IP.IsValid() || !o.IP.IsValid() || p.IP == o.IP ||
		p.IP.Is4() == o.IP.Is4() && (p.IP.IsUnspecified() || o.IP.IsUnspecified())
}

func (p HostPort) String() string {
	if !p.IP.IsValid() {
		return fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	}
	return netip.AddrPortFrom(p.IP, p.Port).String() + "/" + p.Protocol
}

// Docker is what is known of an endpoint of Docker's besides.
type Docker struct {
	NetworkID string     `json:"networkID"`
	Network   string     `json:"network,omitempty"`   // its name, once it is known
	Container string     `json:"container,omitempty"` // its id, once it is known; Key.ContainerID is the endpoint's
	Interface string     `json:"interface,omitempty"` // in the container, once it is there: "cali0"
	Gateway   netip.Addr `json:"gateway"`             // of the interface; each of a container has its own
}

// Interface is what the pod's end is called there: Docker numbers its ends itself.
func (e Endpoint) Interface() string {
	if e.Docker != nil && e.Docker.Interface != "" {
		return e.Docker.Interface
	}
	return e.IfName
}

// PutEndpoint writes an endpoint, over one of the same key.
func (tx *Tx) PutEndpoint(e Endpoint) error {
	if err := e.Key.check(); err != nil {
		return err
	}
	old, err := tx.Endpoint(e.Key)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if old.HostIfName != e.HostIfName {
		if err := tx.unindex(old); err != nil {
			return err
		}
	}
	if e.HostIfName != "" {
		if err := tx.bolt.Bucket(bucketHostIfs).Put([]byte(e.HostIfName), []byte(e.Key.String())); err != nil {
			return err
		}
	}
	return put(tx, bucketEndpoints, e.Key.String(), e)
}

// Endpoint reads one endpoint. ErrNotFound when there is none.
func (tx *Tx) Endpoint(k Key) (Endpoint, error) {
	var e Endpoint
	if err := get(tx, bucketEndpoints, k.String(), &e); err != nil {
		return Endpoint{}, fmt.Errorf("endpoint %s: %w", k, err)
	}
	if e.Key != k {
		return Endpoint{}, invalid("endpoint %s says that it is %s", k, e.Key)
	}
	return e, nil
}

// EndpointByHostIfName reads the endpoint that owns a host interface. ErrNotFound when none does.
func (tx *Tx) EndpointByHostIfName(name string) (Endpoint, error) {
	if k, err := ParseKey(string(tx.bolt.Bucket(bucketHostIfs).Get([]byte(name)))); err == nil {
		return tx.Endpoint(k)
	}
	return Endpoint{}, fmt.Errorf("endpoint of %s: %w", name, ErrNotFound)
}

// DeleteEndpoint removes an endpoint. None there is not an error.
func (tx *Tx) DeleteEndpoint(k Key) error {
	e, err := tx.Endpoint(k)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.unindex(e); err != nil {
		return err
	}
	return tx.bolt.Bucket(bucketEndpoints).Delete([]byte(k.String()))
}

// unindex forgets that an endpoint owns its host interface, unless another one owns it by now.
func (tx *Tx) unindex(e Endpoint) error {
	index := tx.bolt.Bucket(bucketHostIfs)
	if e.HostIfName == "" || string(index.Get([]byte(e.HostIfName))) != e.Key.String() {
		return nil
	}
	return index.Delete([]byte(e.HostIfName))
}

// AllEndpoints lists the endpoints, sorted by key; never nil.
func (tx *Tx) AllEndpoints() ([]Endpoint, error) {
	all := []Endpoint{}
	err := tx.Endpoints(func(e Endpoint) error {
		all = append(all, e)
		return nil
	})
	return all, err
}

// Endpoints calls fn for every endpoint, sorted by key. fn must not write.
func (tx *Tx) Endpoints(fn func(Endpoint) error) error {
	return each(tx, bucketEndpoints, func(k, v []byte) error {
		var e Endpoint
		if err := decode(v, &e); err != nil {
			return fmt.Errorf("endpoint %s: %w", k, err)
		}
		if e.Key.String() != string(k) {
			return invalid("endpoint %s says that it is %s", k, e.Key)
		}
		return fn(e)
	})
}
