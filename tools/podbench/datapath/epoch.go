package datapath

import (
	"errors"
	"fmt"

	"github.com/caracal-net/caracal/maps"
)

// UsesCaracal tells whether the node's pods are wired by the caracal plugin.
func (n *Node) UsesCaracal() bool { return n.Spec.usesCaracal() }

// RaiseEpoch has the node's packets judged again, as any change of pods, routes or policy does.
func (n *Node) RaiseEpoch() error {
	return n.eachMaps(func(m *maps.Maps) error {
		_, err := m.RaiseEpoch()
		return err
	})
}

// eachMaps opens the maps of each of the hosts.
func (n *Node) eachMaps(fn func(*maps.Maps) error) error {
	for _, h := range n.hosts() {
		m, err := maps.Open(h.BPFDir())
		if err == nil {
			err = errors.Join(fn(m), m.Close())
		}
		if err != nil {
			return fmt.Errorf("datapath %s: %w", n.Spec.Name, err)
		}
	}
	return nil
}
