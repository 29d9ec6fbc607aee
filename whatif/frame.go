package whatif

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/caracal-net/caracal/maps"
)

// Protocols whose headers are more than ports (IANA).
const (
	icmp   = 1
	tcp    = 6
	udp    = 17
	icmpv6 = 58
	sctp   = 132
)

// frame makes a packet as a flow in its middle has them, of the opener or an answer to it, without payload. Checksums are left
// out: nothing that judges it looks at them.
func frame(f *maps.Flow, answer bool, from, to net.HardwareAddr) ([]byte, error) {
	protocol, err := maps.ProtocolNumber(f.Protocol)
	if err != nil {
		return nil, err
	}
	src, dst := f.Opener, f.Responder
	if answer {
		src, dst = dst, src
	}
	b := make([]byte, 0, 96)
	b = append(b, mac(to)...)
	b = append(b, mac(from)...)
	body := transport(f, protocol, answer, src.Port(), dst.Port())
	b = network(b, protocol, src.Addr(), dst.Addr(), len(body))
	return append(b, body...), nil
}

func mac(a net.HardwareAddr) []byte {
	var b [6]byte
	copy(b[:], a)
	return b[:]
}

// network appends what comes before the transport header: the frame's type and the IP header (RFC 791, RFC 8200).
func network(b []byte, protocol uint8, src, dst netip.Addr, length int) []byte {
	const ttl = 64
	if src.Is4() {
		b = append(b, 0x08, 0x00, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(20+length))
		b = append(b, 0, 0, 0, 0, ttl, protocol, 0, 0)
	} else {
		b = append(b, 0x86, 0xdd, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(length))
		b = append(b, protocol, ttl)
	}
	return append(append(b, src.AsSlice()...), dst.AsSlice()...)
}

// transport is the header of a segment, datagram, chunk or message that opens nothing and ends nothing.
func transport(f *maps.Flow, protocol uint8, answer bool, sport, dport uint16) []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, sport), dport)
	switch protocol {
	case tcp:
		const words, ack = 5, 0x10
		return append(ports, 0, 0, 0, 1, 0, 0, 0, 1, words<<4, ack, 0xff, 0xff, 0, 0, 0, 0)
	case udp:
		return append(ports, 0, 8, 0, 0)
	case sctp:
		const data = 0 // the chunk's type, RFC 9260 section 3.2
		return append(ports, 0, 0, 0, 0, 0, 0, 0, 0, data, 0, 0, 4)
	case icmp, icmpv6:
		kind := f.ICMPType
		if answer {
			kind = counterpart(protocol, kind)
		}
		return append([]byte{kind, f.ICMPCode, 0, 0}, append(ports[:2], 0, 1)...) // the identifier is both ports
	}
	return nil
}

// counterpart is the type of a reply to a message, or of what it replies to, or its own.
func counterpart(protocol, kind uint8) uint8 {
	for _, pair := range map[uint8][][2]uint8{icmp: {{8, 0}, {13, 14}, {15, 16}, {17, 18}}, icmpv6: {{128, 129}}}[protocol] {
		switch kind {
		case pair[0]:
			return pair[1]
		case pair[1]:
			return pair[0]
		}
	}
	return kind
}
