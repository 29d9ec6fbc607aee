package bgp

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// maxRestartTime is what fits into the 12 bits of RFC 4724's field.
const maxRestartTime = 4095 * time.Second

// maxHoldTime is what fits into RFC 4271's field.
const maxHoldTime = 65535 * time.Second

func invalid(format string, a ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, a...)...)
}

func (c *Config) setDefaults() error {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.HoldTime == 0 {
		c.HoldTime = DefaultHoldTime
	}
	if c.RestartTime == 0 {
		c.RestartTime = DefaultRestartTime
	}
	if err := checkASN("ASN", c.ASN); err != nil {
		return err
	}
	if !c.RouterID.Is4() || c.RouterID.IsUnspecified() || c.RouterID.IsMulticast() {
		return invalid("RouterID %v: want an IPv4 address of this node", c.RouterID)
	}
	if a := c.NextHop6; a.IsValid() && (!a.Is6() || a.Is4In6() || !a.IsGlobalUnicast()) {
		return invalid("NextHop6 %v: want a global IPv6 address of this node", a)
	}
	if c.ListenPort < -1 || c.ListenPort > 65535 {
		return invalid("ListenPort %d: want 1 to 65535, 0 for %d, or -1 to listen nowhere", c.ListenPort, DefaultPort)
	}
	if c.ListenPort == 0 {
		c.ListenPort = DefaultPort
	}
	seen := map[netip.Addr]bool{}
	for _, a := range c.ListenAddresses {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsMulticast() {
			return invalid("ListenAddresses: %v is not an address to listen on; want IPv4 or IPv6 without a zone", a)
		}
		if seen[a] {
			return invalid("ListenAddresses: %v is there twice", a)
		}
		seen[a] = true
	}
	if err := checkHoldTime(c.HoldTime); err != nil {
		return err
	}
	return checkRestartTime(c.RestartTime)
}

// checkASN refuses what RFC 7607, RFC 6793 and RFC 7300 reserve.
func checkASN(field string, n uint32) error {
	switch n {
	case 0, 23456, 65535, 4294967295:
		return invalid("%s %d is reserved; private ones are 64512 to 65534 and 4200000000 to 4294967294", field, n)
	}
	return nil
}

func checkHoldTime(d time.Duration) error {
	if d < 3*time.Second || d > maxHoldTime || d%time.Second != 0 {
		return invalid("HoldTime %s: want whole seconds, %s to %s, or 0 for the default", d, 3*time.Second, maxHoldTime)
	}
	return nil
}

func checkRestartTime(d time.Duration) error {
	if d < time.Second || d > maxRestartTime || d%time.Second != 0 {
		return invalid("RestartTime %s: want whole seconds, %s to %s, or 0 for the default", d, time.Second, maxRestartTime)
	}
	return nil
}

func checkPrefix(field string, p netip.Prefix) error {
	if !p.IsValid() || p.Addr().Is4In6() {
		return invalid("%s %v: want an IPv4 or IPv6 prefix", field, p)
	}
	if p != p.Masked() {
		return invalid("%s %s has bits beyond its mask; want %s", field, p, p.Masked())
	}
	return nil
}
