// Package api is the resources that people write. Package api/manifest reads them; this one stays small, because the CNI
// plugin starts with it.
package api

import (
	"errors"
	"fmt"
	"net/netip"
)

// Default block sizes, as Calico has them: 64 addresses a block.
const (
	DefaultBlockSize4 = 26
	DefaultBlockSize6 = 122
)

// ErrInvalid says that a resource breaks one of its own rules.
var ErrInvalid = errors.New("invalid resource")

// special are the ranges that no pod can have an address of: RFC 6890, RFC 5771, RFC 4291. 240.0.0.0/4 is not among
// them: some networks have nothing else left.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::/128"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("::ffff:0:0/96"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// IPPool is a range that pods get their addresses from, block by block.
type IPPool struct {
	CIDR         netip.Prefix `json:"cidr"`
	BlockSize    int          `json:"blockSize,omitempty"`    // prefix length of its blocks; 0: 26 for IPv4, 122 for IPv6
	Disabled     bool         `json:"disabled,omitempty"`     // true: no new address comes out of it
	NATOutgoing  bool         `json:"natOutgoing,omitempty"`  // true: masquerade what leaves all pools
	NodeSelector string       `json:"nodeSelector,omitempty"` // which nodes use it, in Calico's selector language; "": all
	VXLANMode    string       `json:"vxlanMode,omitempty"`    // Always, CrossSubnet or Never (default)
	IPIPMode     string       `json:"ipipMode,omitempty"`     // Calico's: Never
	AllowedUses  []string     `json:"allowedUses,omitempty"`  // Calico's: Workload
}

// Complete is Defaulted in place, for a pool that somebody wrote.
func (p *IPPool) Complete(string) (err error) {
	*p, err = p.Defaulted()
	switch {
	case err != nil:
		return err
	case p.IPIPMode != "" && p.IPIPMode != "Never":
		return fmt.Errorf("ipipMode %s: %w; write vxlanMode", p.IPIPMode, ErrUnsupported)
	case p.VXLANMode != "" && p.VXLANMode != "Never" && p.VXLANMode != "Always" && p.VXLANMode != "CrossSubnet":
		return fmt.Errorf("%w: vxlanMode %q: Always, CrossSubnet or Never", ErrInvalid, p.VXLANMode)
	}
	if err := checkSelector("nodeSelector", p.NodeSelector); err != nil {
		return err
	}
	for _, use := range p.AllowedUses {
		if use != "Workload" {
			return fmt.Errorf("allowedUses %q: %w; write Workload", use, ErrUnsupported)
		}
	}
	return nil
}

// Encapsulates tells whether packets to some of the pool's blocks go encapsulated.
func (p IPPool) Encapsulates() bool { return p.VXLANMode == "Always" || p.VXLANMode == "CrossSubnet" }

// Defaulted validates the pool and fills what it leaves open.
func (p IPPool) Defaulted() (IPPool, error) {
	if !p.CIDR.IsValid() {
		return p, fmt.Errorf("pool without a CIDR: %w", ErrInvalid)
	}
	if p.CIDR != p.CIDR.Masked() {
		return p, fmt.Errorf("pool %s: %w: bits are set behind the prefix; write %s", p.CIDR, ErrInvalid, p.CIDR.Masked())
	}
	a := p.CIDR.Addr()
	if a.Is4In6() {
		return p, fmt.Errorf("pool %s: %w: write IPv4 as IPv4", p.CIDR, ErrInvalid)
	}
	for _, s := range special {
		if p.CIDR.Overlaps(s) {
			return p, fmt.Errorf("pool %s: %w: addresses in %s can't be given to pods", p.CIDR, ErrInvalid, s)
		}
	}
	low, high := 20, 32
	size := DefaultBlockSize4
	if a.Is6() {
		low, high, size = 116, 128, DefaultBlockSize6
	}
	if p.BlockSize == 0 {
		p.BlockSize = size
	}
	if p.BlockSize < low || p.BlockSize > high {
		return p, fmt.Errorf("pool %s: %w: block size /%d is not between /%d and /%d", p.CIDR, ErrInvalid, p.BlockSize, low, high)
	}
	if p.BlockSize < p.CIDR.Bits() {
		return p, fmt.Errorf("pool %s: %w: smaller than one block of /%d; make the pool larger or set a block size of /%d or smaller blocks",
			p.CIDR, ErrInvalid, p.BlockSize, p.CIDR.Bits())
	}
	return p, nil
}
