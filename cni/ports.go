package cni

import (
	"net/netip"
	"strings"

	"github.com/caracal-net/caracal/node"
)

// portMapping is one of runtimeConfig.portMappings (CNI CONVENTIONS.md). Runtimes differ in the case of its keys.
type portMapping struct {
	HostPort int    `json:"hostPort"` // 0: none
	Protocol string `json:"protocol"` // "": TCP
	HostIP   string `json:"hostIP"`
}

// ports are the host's that the attachment's are published at by a later plugin. Told of them by the capability portMappings, this
// one refuses those that another attachment has: portmap would not, and the earlier attachment would get all connections.
func (c *Config) ports() ([]node.HostPort, error) {
	var ports []node.HostPort
	for _, m := range c.RuntimeConfig.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		if m.HostPort < 0 || m.HostPort > 65535 {
			return nil, fail(codeConfig, "runtimeConfig.portMappings: %d is no port", m.HostPort)
		}
		p := node.HostPort{Protocol: strings.ToLower(m.Protocol), Port: uint16(m.HostPort)}
		switch p.Protocol {
		case "":
			p.Protocol = "tcp"
		case "tcp", "udp", "sctp":
		default:
			return nil, fail(codeConfig, "runtimeConfig.portMappings: protocol %s is none of tcp, udp, sctp", quoted(m.Protocol))
		}
		if m.HostIP != "" {
			ip, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return nil, fail(codeConfig, "runtimeConfig.portMappings: hostIP %s is not an address", quoted(m.HostIP))
			}
			p.IP = ip.Unmap()
		}
		ports = append(ports, p)
	}
	return ports, nil
}

// freePorts makes sure that no attachment that is alive has one of the ports.
func (a *adding) freePorts(tx *node.Tx) error {
	if len(a.record.Ports) == 0 {
		return nil
	}
	all, err := tx.AllEndpoints()
	if err != nil {
		return err
	}
	for _, other := range all {
		for _, theirs := range other.Ports {
			for _, ours := range a.record.Ports {
				if other.Key != a.key && ours.Overlaps(theirs) && !gone(other.HostIfName) {
					return fail(codeConflict, "port %s of this host is published by %s already", ours, called(other))
				}
			}
		}
	}
	return nil
}

// called is what a user calls an attachment.
func called(e node.Endpoint) string {
	if e.PodNamespace != "" && e.PodName != "" {
		return e.PodNamespace + "/" + e.PodName
	}
	return e.Key.String()
}
