package ctl

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/caracal-net/caracal/api"
)

// anySourcePort stands for the source port of who says none: the first of those that are given out by turns (RFC 6335).
const anySourcePort = 49152

// question is what why is asked.
type question struct {
	source, destination string // as end names them
	protocol            api.Protocol
	sourcePort, port    uint16 // 0: none was said
	kind                *uint8 // of ICMP, its type; nil: an echo request
	code                uint8
}

// parseQuestion reads SRC[:PORT] and DST[:PORT[/PROTOCOL]]. isPod tells of a word with a slash whether it is a pod's name.
func parseQuestion(source, destination string, isPod func(string) bool) (question, error) {
	q := question{protocol: api.TCP}
	var port string
	var err error
	rest, word, named := cutLast(destination, "/")
	if named && !isPod(destination) {
		p, known := protocolOf(word)
		a, errAddr := netip.ParseAddr(rest)
		switch {
		case errAddr == nil && isNumber(word) && (!known || int(p) <= a.BitLen()):
			return q, fmt.Errorf("%q is a network: ask about one address of it", destination)
		case known:
			q.protocol, destination = p, rest
		case strings.Contains(rest, ":"):
			return q, fmt.Errorf("%q: protocol %q: tcp, udp, sctp, icmp, icmpv6 or a number from 1 to 255", destination, word)
		}
	}
	if q.source, port, err = cutPort(source); err != nil {
		return q, err
	}
	if q.sourcePort, err = q.parsePort(source, port); err != nil {
		return q, err
	}
	if q.destination, port, err = cutPort(destination); err != nil {
		return q, err
	}
	if q.isICMP() {
		err = q.parseType(destination, port)
	} else {
		q.port, err = q.parsePort(destination, port)
	}
	return q, err
}

func (q question) isICMP() bool { return q.protocol == api.ICMP || q.protocol == api.ICMPv6 }

func protocolOf(word string) (p api.Protocol, known bool) {
	quoted, err := json.Marshal(word)
	return p, err == nil && p.UnmarshalJSON(quoted) == nil
}

func cutLast(s, separator string) (before, after string, found bool) {
	i := strings.LastIndex(s, separator)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(separator):], true
}

// cutPort takes apart POD:PORT, ADDRESS:PORT and [ADDRESS]:PORT; an IPv6 address without a port needs no brackets.
func cutPort(s string) (end, port string, err error) {
	_, errAddr := netip.ParseAddr(s)
	switch {
	case s == "":
		return "", "", fmt.Errorf("an end is empty: it is a pod or an address")
	case errAddr == nil:
		return s, "", nil
	case strings.HasPrefix(s, "["):
		inside, behind, closed := strings.Cut(s[1:], "]")
		if _, err := netip.ParseAddr(inside); err != nil || !closed || behind != "" && (behind[0] != ':' || behind == ":") {
			return "", "", fmt.Errorf("%q: write it as [2001:db8::1]:80", s)
		}
		return inside, strings.TrimPrefix(behind, ":"), nil
	case strings.Count(s, ":") > 1:
		return "", "", fmt.Errorf("%q: neither an address, nor one with a port behind it: write that as [2001:db8::1]:80", s)
	}
	end, port, with := strings.Cut(s, ":")
	if end == "" || with && port == "" {
		return "", "", fmt.Errorf("%q: write it as POD:PORT or ADDRESS:PORT", s)
	}
	return end, port, nil
}

func (q question) parsePort(of, text string) (uint16, error) {
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q: port %q: not a number from 1 to 65535", of, text)
	}
	if !q.protocol.HasPorts() {
		return 0, fmt.Errorf("%q: %s has no ports; leave :%s out", of, q.protocol, text)
	}
	return uint16(n), nil
}

// parseType reads ICMP's type, or type.code, in the place of a port.
func (q *question) parseType(of, text string) error {
	if text == "" {
		return nil
	}
	kind, code, _ := strings.Cut(text, ".")
	k, err := strconv.ParseUint(kind, 10, 8)
	var c uint64
	if err == nil && code != "" {
		c, err = strconv.ParseUint(code, 10, 8)
	}
	if err != nil || strings.HasSuffix(text, ".") {
		return fmt.Errorf("%q: type %q of %s: write it as 8, or with a code as 3.1", of, text, q.protocol)
	}
	number := uint8(k)
	q.kind, q.code = &number, uint8(c)
	return nil
}
