package api

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Protocol is an IANA protocol number; it is written as a name or as a number from 1 to 255.
type Protocol uint8

// The protocols that have names.
const (
	ICMP    Protocol = 1
	TCP     Protocol = 6
	UDP     Protocol = 17
	ICMPv6  Protocol = 58
	SCTP    Protocol = 132
	UDPLite Protocol = 136
)

var protocolNames = map[Protocol]string{ICMP: "ICMP", TCP: "TCP", UDP: "UDP", ICMPv6: "ICMPv6", SCTP: "SCTP", UDPLite: "UDPLite"}

// String is the protocol's name, or its number.
func (p Protocol) String() string {
	if name := protocolNames[p]; name != "" {
		return name
	}
	return strconv.Itoa(int(p))
}

// HasPorts tells whether rules can ask for ports of the protocol.
func (p Protocol) HasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// MarshalJSON writes a name, or a number.
func (p Protocol) MarshalJSON() ([]byte, error) {
	if name := protocolNames[p]; name != "" {
		return json.Marshal(name)
	}
	return json.Marshal(uint8(p))
}

// UnmarshalJSON reads a name, in any case, or a number.
func (p *Protocol) UnmarshalJSON(b []byte) error {
	word := strings.Trim(string(b), `"`)
	for number, name := range protocolNames {
		if strings.EqualFold(name, word) {
			*p = number
			return nil
		}
	}
	n, err := strconv.ParseUint(word, 10, 8)
	if err != nil || n == 0 {
		return fmt.Errorf("%w: protocol %.80s: TCP, UDP, SCTP, ICMP, ICMPv6, UDPLite or a number from 1 to 255", ErrInvalid, b)
	}
	*p = Protocol(n)
	return nil
}

// Ports are a port, a range "1000:2000", or the name of a port.
type Ports struct {
	First, Last uint16 // both included
	Name        string // "": the range
}

// MarshalJSON writes a number, a range or a name.
func (p Ports) MarshalJSON() ([]byte, error) {
	switch {
	case p.Name != "":
		return json.Marshal(p.Name)
	case p.First == p.Last:
		return json.Marshal(p.First)
	}
	return json.Marshal(fmt.Sprintf("%d:%d", p.First, p.Last))
}

// UnmarshalJSON reads a number, a range or a name. No range and no port begins with 0.
func (p *Ports) UnmarshalJSON(b []byte) error {
	var word string
	if json.Unmarshal(b, &word) != nil {
		word = string(b)
	}
	if !strings.Contains(word, ":") && strings.Trim(word, "0123456789+-") != "" && b[0] == '"' {
		if !validPortName(word) {
			return fmt.Errorf("%w: port %.80q: a name has letters, digits, '_', '.' and '-', at most 128; a range is written \"1000:2000\"", ErrInvalid, word)
		}
		*p = Ports{Name: word}
		return nil
	}
	low, high, isRange := strings.Cut(word, ":")
	if !isRange {
		high = low
	}
	first, err := parsePort(low)
	if err != nil {
		return err
	}
	last, err := parsePort(high)
	if err != nil {
		return err
	}
	if first > last {
		return fmt.Errorf("%w: port range %s is reversed; write %d:%d", ErrInvalid, word, last, first)
	}
	*p = Ports{First: first, Last: last}
	return nil
}

func parsePort(word string) (uint16, error) {
	n, err := strconv.ParseUint(word, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%w: port %.80s: not a number between 1 and 65535, nor a range \"1000:2000\" or a name", ErrInvalid, word)
	}
	return uint16(n), nil
}

func validPortName(s string) bool {
	return s != "" && len(s) <= 128 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == ""
}

// checkPortName refuses what is no name of a port of a pod (RFC 6335, section 5.1).
func checkPortName(path, s string) error {
	letters := strings.ContainsFunc(s, func(r rune) bool { return r >= 'a' && r <= 'z' })
	if len(s) > 15 || !letters || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || strings.Contains(s, "--") || strings.HasPrefix(s, "-") || strings.HasSuffix(s, "-") {
		return invalid(path, "%.80q is no port's name: it has lower case letters, digits and single '-' between them, at most 15", s)
	}
	return nil
}

// Net is a network, or one address: "10.0.0.0/8", "10.0.0.1". It is masked, and never IPv4 written as IPv6.
type Net struct{ netip.Prefix }

// UnmarshalText reads a network or an address.
func (n *Net) UnmarshalText(b []byte) error {
	p, err := netip.ParsePrefix(string(b))
	if a, err1 := netip.ParseAddr(string(b)); err1 == nil && a.Zone() == "" {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	switch {
	case err != nil:
		return fmt.Errorf("%w: %.80q is no network; write it like 10.0.0.0/8 or 2001:db8::/32", ErrInvalid, b)
	case p.Addr().Is4In6():
		return fmt.Errorf("%w: %s: write IPv4 as IPv4", ErrInvalid, p)
	case p != p.Masked():
		return fmt.Errorf("%w: %s: bits are set behind the prefix; write %s", ErrInvalid, p, p.Masked())
	}
	n.Prefix = p
	return nil
}

// family is 4 or 6.
func (n Net) family() int {
	if n.Addr().Is4() {
		return 4
	}
	return 6
}

// Refused is a field that is read to be refused by its name: true when it is there and says something.
type Refused bool

// UnmarshalJSON reads whatever there is.
func (r *Refused) UnmarshalJSON(b []byte) error {
	*r = Refused(!slices.Contains([]string{"null", "false", "[]", "{}", `""`}, string(b)))
	return nil
}
