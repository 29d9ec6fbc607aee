package maps

import (
	"fmt"
	"net/netip"

	"github.com/caracal-net/caracal/bpf"
)

// Uplink is an entry of caracal_uplinks: the addresses that masqueraded packets leave an interface with. Zero: none of that
// family.
type Uplink struct {
	IPv4 netip.Addr `json:"ipv4,omitzero"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
	VNI  uint32     `json:"vni,omitempty"` // of the VXLAN interface, 24 bits (RFC 7348); 0: it is none
}

// PutUplink writes an uplink's addresses.
func (m *Maps) PutUplink(ifindex uint32, u Uplink) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalUplinks)
	if err != nil {
		return err
	}
	defer pinned.Close()
	value := bpf.DataplaneUplink{Vni: u.VNI}
	if u.IPv4.IsValid() {
		value.AddressV4 = Address(u.IPv4)
	}
	if u.IPv6.IsValid() {
		value.AddressV6 = Address(u.IPv6)
	}
	if err := pinned.Put(ifindex, &value); err != nil {
		return fmt.Errorf("write uplink %d: %w", ifindex, full(err))
	}
	return nil
}

// RemoveUplink removes an uplink. None there is not an error.
func (m *Maps) RemoveUplink(ifindex uint32) error {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalUplinks)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if err := remove(pinned, ifindex); err != nil {
		return fmt.Errorf("remove uplink %d: %w", ifindex, err)
	}
	return nil
}

// Uplinks lists them by ifindex.
func (m *Maps) Uplinks() (map[uint32]Uplink, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalUplinks)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	var (
		ifindex uint32
		value   bpf.DataplaneUplink
	)
	all := make(map[uint32]Uplink)
	entries := pinned.Iterate()
	for entries.Next(&ifindex, &value) {
		all[ifindex] = Uplink{IPv4: FromAddress(value.AddressV4), IPv6: FromAddress(value.AddressV6), VNI: value.Vni}
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("list uplinks: %w", err)
	}
	return all, nil
}
