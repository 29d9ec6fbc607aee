package bgp

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"time"
)

// AlarmKind says what an alarm is about.
type AlarmKind int

// The kinds of alarms.
const (
	ForeignOrigin AlarmKind = iota // somebody else announces one of our own blocks, or a part of it; it is not used
	Default                        // a peer announces 0.0.0.0/0 or ::/0 and may not; it is not used
	Limit                          // a peer announces more than its MaxPrefixes
	Refused                        // a peer announces what is not in its AllowedPrefixes, and no filter accepts it
	Session                        // a session does not come up or broke: wrong AS, wrong password, malformed message
)

var alarmWords = [...]string{"foreign-origin", "default", "limit", "refused", "session"}

// String is one word, fit for a log or a label.
func (k AlarmKind) String() string {
	if k < 0 || int(k) >= len(alarmWords) {
		return fmt.Sprintf("alarm-%d", int(k))
	}
	return alarmWords[k]
}

// Alarm is something that an operator must see. The same one is told once a minute at most, and a peer's no more than
// MaxAlarms of them.
type Alarm struct {
	Kind   AlarmKind
	Prefix netip.Prefix // not valid for Session
	Peer   netip.Addr
	Text   string // a sentence
}

// MaxAlarms is how many different alarms of one peer a Sink is told in a minute.
const MaxAlarms = 1000

// alarmEvery is for how long an alarm that was told is not told again.
const alarmEvery = time.Minute

var formatf = fmt.Sprintf

// alarm tells the Sink.
func (s *Speaker) alarm(a Alarm) {
	n := s.peers[a.Peer]
	if n == nil {
		return
	}
	key := a
	if a.Kind == Limit {
		key.Prefix = netip.Prefix{} // the first stands for all
	}
	if _, told := n.told[key]; told || len(n.told) >= MaxAlarms {
		return
	}
	n.told[key] = time.Now()
	s.sink.Alarm(a)
}

func (s *Speaker) alarmForeign(peer netip.Addr, prefix, block netip.Prefix) {
	what := formatf("%s, a part of our block %s", prefix, block)
	if prefix == block {
		what = formatf("our block %s", block)
	}
	s.alarm(Alarm{Kind: ForeignOrigin, Prefix: prefix, Peer: peer, Text: formatf("%s announces %s; it is not used", peer, what)})
}

// refuse raises the alarm for a prefix that the peer may not tell us.
func (s *Speaker) refuse(n *peer, prefix netip.Prefix) {
	a := Alarm{Kind: Refused, Prefix: prefix, Peer: n.Address, Text: formatf("%s announces %s, which is none of its allowed prefixes; it is not used", n.Address, prefix)}
	if prefix.Bits() == 0 && !n.AllowDefault {
		a.Kind, a.Text = Default, formatf("%s announces the default route %s and may not; it is not used", n.Address, prefix)
	}
	s.alarm(a)
}

// note takes in what GoBGP's log says of a session.
func (s *Speaker) note(a Alarm) {
	s.mu.Lock()
	n := s.peers[a.Peer]
	if n != nil {
		n.status.LastError = a.Text
	}
	s.mu.Unlock()
	s.alarm(a)
}

// tickEvery is how often alarms are aged, limits looked at and passwords checked.
const tickEvery = time.Second

func (s *Speaker) tick() {
	for _, n := range s.peers {
		for key, at := range n.told {
			if time.Since(at) > alarmEvery {
				delete(n.told, key)
			}
		}
	}
	s.promote()
	s.checkPasswords()
}

// checkPasswords blames passwords when the kernel refuses segments for their MD5 signature. It does so without a word to
// us and does not say whose they were, so all peers that have no session are suspected.
func (s *Speaker) checkPasswords() {
	data, err := os.ReadFile("/proc/thread-self/net/netstat")
	if err != nil {
		return // nothing to tell from
	}
	now, before := md5Refusals(data), s.refusals
	s.refusals = now
	if now <= before || before == unknownRefusals {
		return
	}
	for _, n := range s.peers {
		if n.established {
			continue
		}
		text := formatf("no session with %s, and TCP segments come with a wrong MD5 signature or none: the passwords differ", n.Address)
		if n.Password == "" {
			text = formatf("no session with %s, and TCP segments come with an MD5 signature or a wrong one: a password may be missing here", n.Address)
		}
		s.note(Alarm{Kind: Session, Peer: n.Address, Text: text})
	}
}

const unknownRefusals = ^uint64(0)

// md5Refusals adds up the counters of refused signatures in /proc/net/netstat: a line of names, then a line of numbers.
func md5Refusals(netstat []byte) uint64 {
	var names [][]byte
	sum := uint64(0)
	for line := range bytes.Lines(netstat) {
		fields := bytes.Fields(line)
		if len(fields) == 0 || string(fields[0]) != "TcpExt:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i := 1; i < min(len(names), len(fields)); i++ {
			switch string(names[i]) {
			case "TCPMD5NotFound", "TCPMD5Unexpected", "TCPMD5Failure":
				n, _ := strconv.ParseUint(string(fields[i]), 10, 64)
				sum += n
			}
		}
		break
	}
	return sum
}
