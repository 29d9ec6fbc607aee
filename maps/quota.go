package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// Quota is a pod's share of the flow table.
type Quota struct {
	Flows uint32 `json:"flows"` // confirmed flows that count against it now
	Limit uint32 `json:"limit"` // how many may
}

// NewQuota gives a pod, by the ifindex of its host interface, a share of the flow table. One that it has is kept.
func (m *Maps) NewQuota(ifindex, limit uint32) error {
	err := m.quota.Update(ifindex, &bpf.DataplaneQuota{Limit: limit}, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("write quota of pod %d: %w", ifindex, full(err))
	}
	return nil
}

// Quota reads a pod's share. ErrNotFound when it has none.
func (m *Maps) Quota(ifindex uint32) (Quota, error) {
	var q bpf.DataplaneQuota
	if err := m.quota.Lookup(ifindex, &q); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return Quota{}, fmt.Errorf("quota of pod %d: %w", ifindex, ErrNotFound)
		}
		return Quota{}, fmt.Errorf("read quota of pod %d: %w", ifindex, err)
	}
	return Quota{Flows: q.Flows, Limit: q.Limit}, nil
}

// Quotas are the shares of all pods, by the ifindex of their host interfaces.
func (m *Maps) Quotas() (map[uint32]Quota, error) {
	all := make(map[uint32]Quota)
	err := each(m.quota, func(ifindex *uint32, q *bpf.DataplaneQuota) { all[*ifindex] = Quota{Flows: q.Flows, Limit: q.Limit} })
	if err != nil {
		return nil, fmt.Errorf("list quotas: %w", err)
	}
	return all, nil
}

// RemoveQuota removes a pod's share. None there is not an error.
func (m *Maps) RemoveQuota(ifindex uint32) error {
	if err := remove(m.quota, ifindex); err != nil {
		return fmt.Errorf("remove quota of pod %d: %w", ifindex, err)
	}
	return nil
}
