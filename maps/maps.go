// Package maps is typed access to the kernel maps that the dataplane reads and writes, one file per map.
package maps

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// ErrNotLoaded says that the directory holds no pinned maps: no program was loaded for this node yet.
var ErrNotLoaded = errors.New("no maps are pinned there")

// ErrNotFound says that a map has no entry for the key.
var ErrNotFound = errors.New("no such entry")

// Maps is the maps of one node. It is safe for concurrent use; who writes holds the node lock. The maps that every
// attachment needs are open, the others are opened when they are read.
type Maps struct {
	dir  string
	open []*ebpf.Map

	state, pods, routes, quota *ebpf.Map
}

// Open opens the pinned maps in a node's bpffs directory. ErrNotLoaded when there are none.
func Open(dir string) (*Maps, error) {
	m := &Maps{dir: dir}
	for _, e := range []struct {
		name string
		into **ebpf.Map
	}{
		{bpf.DataplaneMapCaracalState, &m.state},
		{bpf.DataplaneMapCaracalPods, &m.pods},
		{bpf.DataplaneMapCaracalRoutes, &m.routes},
		{bpf.DataplaneMapCaracalQuota, &m.quota},
	} {
		opened, err := m.pinned(e.name)
		if err != nil {
			m.Close()
			return nil, err
		}
		m.open = append(m.open, opened)
		*e.into = opened
	}
	return m, nil
}

// pinned opens one map.
func (m *Maps) pinned(name string) (*ebpf.Map, error) {
	opened, err := ebpf.LoadPinnedMap(bpf.MapPath(m.dir, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", m.dir, ErrNotLoaded)
	}
	if err != nil {
		return nil, fmt.Errorf("open map %s: %w", name, err)
	}
	return opened, nil
}

// Close closes the descriptors; the pinned maps stay.
func (m *Maps) Close() error {
	var errs []error
	for _, o := range m.open {
		errs = append(errs, o.Close())
	}
	return errors.Join(errs...)
}

// Address is the maps' form of an address: IPv4 as v4-mapped IPv6.
func Address(a netip.Addr) [16]byte { return a.As16() }

// FromAddress is the address in a map's form; the zero Addr for ::.
func FromAddress(b [16]byte) netip.Addr {
	a := netip.AddrFrom16(b)
	if a == netip.IPv6Unspecified() {
		return netip.Addr{}
	}
	return a.Unmap()
}

// remove deletes one key; none there is not an error.
func remove(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}
