package maps

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// MaxServiceName is how much of a Service's name an entry has, bytes.
const MaxServiceName = len(bpf.DataplaneService{}.Name) - 1

// Service is an entry of caracal_service: a port that the host's stack translates.
type Service struct {
	Address  netip.Addr `json:"address,omitzero"` // zero: each of this host's own
	Protocol string     `json:"protocol"`         // as in Flow: tcp, udp, sctp
	Port     uint16     `json:"port"`
	Name     string     `json:"name"` // namespace/name, cut off after MaxServiceName bytes
}

// Others is the entry that says that there are Services which have none: what pods send to anybody outside of the pools is judged by that
// address, and again as what the host's stack makes of it.
var Others = Service{Protocol: protocolName(0), Name: "others"}

// ServiceRoom is how many entries caracal_service may have.
func (m *Maps) ServiceRoom() (int, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalService)
	if err != nil {
		return 0, err
	}
	defer pinned.Close()
	return int(pinned.MaxEntries()), nil
}

// Services lists caracal_service, by address, port and protocol. ErrNotLoaded also when the programs are of a build that has none.
func (m *Maps) Services() ([]Service, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalService)
	if err != nil {
		return nil, err
	}
	defer pinned.Close()
	var all []Service
	err = each(pinned, func(k *bpf.DataplaneServiceKey, v *bpf.DataplaneService) {
		all = append(all, Service{FromAddress(k.Address), protocolName(k.Protocol), port(k.Port), text(v.Name[:])})
	})
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	slices.SortFunc(all, func(a, b Service) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return all, nil
}

// PutServices writes entries, over those of the same port. ErrFull: some of them may have been written.
func (m *Maps) PutServices(all []Service) error {
	if len(all) == 0 {
		return nil
	}
	values := make([]bpf.DataplaneService, len(all))
	for i, s := range all {
		copy(values[i].Name[:MaxServiceName], s.Name)
	}
	keys, err := serviceKeys(all)
	if err != nil {
		return err
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalService)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if _, err := pinned.BatchUpdate(keys, values, nil); err != nil {
		return fmt.Errorf("write %d services: %w", len(all), full(err))
	}
	return nil
}

// RemoveServices removes entries. One that is not there is not an error.
func (m *Maps) RemoveServices(all []Service) error {
	keys, err := serviceKeys(all)
	if err != nil {
		return err
	}
	pinned, err := m.pinned(bpf.DataplaneMapCaracalService)
	if err != nil {
		return err
	}
	defer pinned.Close()
	if err := removeAll(pinned, keys); err != nil {
		return fmt.Errorf("remove services: %w", err)
	}
	return nil
}

// FindService is what the host's stack translates of an address; own: it is one of this host's. ErrNotFound: it does not.
func (m *Maps) FindService(to netip.AddrPort, protocol string, own bool) (Service, error) {
	pinned, err := m.pinned(bpf.DataplaneMapCaracalService)
	if err != nil {
		return Service{}, err
	}
	defer pinned.Close()
	wanted := []Service{{Address: to.Addr(), Protocol: protocol, Port: to.Port()}}
	if own {
		wanted = append(wanted, Service{Protocol: protocol, Port: to.Port()})
	}
	keys, err := serviceKeys(wanted)
	if err != nil {
		return Service{}, err
	}
	for i, k := range keys {
		var v bpf.DataplaneService
		err := pinned.Lookup(k, &v)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		if err != nil {
			return Service{}, fmt.Errorf("read service: %w", err)
		}
		wanted[i].Name = text(v.Name[:])
		return wanted[i], nil
	}
	return Service{}, fmt.Errorf("%s/%s: %w", to, protocol, ErrNotFound)
}

func serviceKeys(all []Service) ([]bpf.DataplaneServiceKey, error) {
	keys := make([]bpf.DataplaneServiceKey, len(all))
	for i, s := range all {
		protocol, err := ProtocolNumber(s.Protocol)
		if err != nil {
			return nil, err
		}
		keys[i] = bpf.DataplaneServiceKey{Protocol: protocol, Port: port(s.Port)}
		if s.Address.IsValid() {
			keys[i].Address = Address(s.Address)
		}
	}
	return keys, nil
}
