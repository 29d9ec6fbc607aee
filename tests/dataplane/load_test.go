package dataplane

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/policy"
)

// trips is one flow on which nothing but the arrival of a packet makes the next be sent, so that one lost packet ends it.
type trips struct {
	name string
	trip func(number uint64) error
	made atomic.Uint64
}

// echoes goes to and fro between two connected sockets.
func echoes(name string, x, y int) *trips {
	return &trips{name: name, trip: func(number uint64) error {
		packet := binary.BigEndian.AppendUint64(nil, number)
		for _, s := range [][2]int{{x, y}, {y, x}} {
			if _, err := writeTo(s[0], packet); err != nil {
				return err
			}
			buf := make([]byte, 16)
			n, err := readFrom(s[1], buf)
			if err != nil {
				return err
			}
			if !bytes.Equal(buf[:n], packet) {
				return fmt.Errorf("%x arrived, not %x", buf[:n], packet)
			}
		}
		return nil
	}}
}

// pings asks the kernel behind an address.
func pings(t testing.TB, name string, a *pod, to netip.Addr) *trips {
	t.Helper()
	fd := rawICMP(t, a)
	dial(t, fd, to, 0)
	tv := unix.NsecToTimeval(int64(patience))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	return &trips{name: name, trip: func(number uint64) error {
		packet := binary.BigEndian.AppendUint64([]byte{8, 0, 0, 0, 0, 78, 0, 1}, number)
		binary.BigEndian.PutUint16(packet[2:], ^sum16(0, packet))
		if _, err := writeTo(fd, packet); err != nil {
			return err
		}
		for {
			buf := make([]byte, 100)
			n, err := readFrom(fd, buf)
			if err != nil {
				return err
			}
			if n == 20+len(packet) && buf[20] == 0 && bytes.Equal(buf[28:n], packet[8:]) {
				return nil
			}
		}
	}}
}

// dialogue connects UDP or TCP sockets of two pods.
func dialogue(t testing.TB, protocol string, a, b *pod, v6 bool) *trips {
	t.Helper()
	name := fmt.Sprintf("%s %s-%s v6=%t", protocol, a.name, b.name, v6)
	if protocol == "tcp" {
		x, y := connect(t, a, b, v6)
		for _, fd := range []int{x, y} {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
				t.Fatal(err)
			}
		}
		return echoes(name, x, y)
	}
	x, y := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
	dial(t, x, b.addr(v6), 7)
	dial(t, y, a.addr(v6), 5000)
	return echoes(name, x, y)
}

// churn makes one model of another. Clients may always speak to servers; servers may open nothing, and nobody may open
// anything to clients.
type churn struct {
	r      *rand.Rand
	pods   []*pod
	denied bool // to the pod "t", what is opened to it
	m      *policy.Model
}

func newChurn(seed uint64, pods ...*pod) *churn {
	c := &churn{r: rand.New(rand.NewPCG(seed, 0)), pods: pods, m: modelOf(nil)}
	for i := range 200 {
		id := fmt.Sprintf("elsewhere/%d", i)
		c.m.Endpoints[id] = &policy.Endpoint{ID: id, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 65, 9, byte(i)})}, Labels: c.labels()}
	}
	for _, p := range pods {
		c.relabel(p)
	}
	c.m.Sets = make(map[string]*policy.Set)
	for i := range 5 {
		c.changeSet(i)
	}
	policies := make([]*policy.Policy, 100)
	for i := range policies {
		policies[i] = c.policy(i)
	}
	c.m.Tiers[0].Policies = policies
	return c
}

func (c *churn) labels(more ...string) map[string]string {
	labels := map[string]string{"tag": fmt.Sprintf("t%d", c.r.IntN(20)), "app": fmt.Sprintf("a%d", c.r.IntN(20))}
	for i := 0; i < len(more); i += 2 {
		labels[more[i]] = more[i+1]
	}
	return labels
}

// relabel gives a pod other labels, beside its role.
func (c *churn) relabel(p *pod) {
	role := map[byte]string{'c': "client", 's': "server", 't': "target"}[p.name[0]]
	c.m.Endpoints[p.name] = &policy.Endpoint{ID: p.name, Addresses: p.commit.Addrs, Labels: c.labels("role", role)}
}

func (c *churn) changeSet(i int) {
	s := &policy.Set{ID: fmt.Sprintf("set%d", i), Labels: c.labels()}
	for range c.r.IntN(4) {
		s.Nets = append(s.Nets, []netip.Prefix{
			netip.MustParsePrefix("10.65.0.0/16"), netip.MustParsePrefix("10.65.1.0/24"), netip.MustParsePrefix("10.65.2.0/30"),
			netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("2001:db8::/32"), netip.MustParsePrefix("192.0.2.0/24"),
		}[c.r.IntN(6)])
	}
	c.m.Sets[s.ID] = s
}

// idle is rules that allow something, or deny what nobody of the test says.
func (c *churn) idle(d policy.Direction) []policy.Rule {
	var all []policy.Rule
	for range c.r.IntN(5) {
		r := labelled(policy.Allow, d, "tag", fmt.Sprintf("t%d", c.r.IntN(20)))
		if c.r.IntN(2) == 0 {
			r.Action = policy.Deny
			tcp := uint8(6)
			port := uint16(20_000 + c.r.IntN(1000))
			r.Protocol, r.Destination.Ports = &tcp, []policy.Ports{{First: port, Last: port + uint16(c.r.IntN(50))}}
		}
		all = append(all, r)
	}
	return all
}

// policy is the i-th: of servers, of clients, of the target, or of others.
func (c *churn) policy(i int) *policy.Policy {
	p := &policy.Policy{ID: fmt.Sprintf("policy %d", i), Selector: selector.In("app", fmt.Sprintf("a%d", c.r.IntN(20)))}
	around := func(d policy.Direction, r policy.Rule) *policy.Rules {
		return rulesOf(append(append(c.idle(d), r), c.idle(d)...)...)
	}
	switch i {
	case 90:
		p.Selector = selector.In("role", "server")
		p.Ingress, p.Egress = around(policy.Ingress, labelled(policy.Allow, policy.Ingress, "role", "client")), rulesOf()
	case 91:
		p.Selector = selector.In("role", "client")
		p.Ingress, p.Egress = rulesOf(), around(policy.Egress, policy.Rule{Action: policy.Allow})
	case 92:
		p.Selector = selector.In("role", "target")
		p.Ingress = rulesOf(policy.Rule{Action: policy.Allow})
		if c.denied {
			p.Ingress = rulesOf()
		}
	default: // of whoever has that label: before the servers' own, but it does not end there
		p.Ingress = rulesOf(c.idle(policy.Ingress)...)
	}
	return p
}

// next changes something: mostly one policy, whose pods may be the test's.
func (c *churn) next() *policy.Model {
	m := modelOf(nil, append([]*policy.Policy(nil), c.m.Tiers[0].Policies...)...)
	for id, e := range c.m.Endpoints {
		m.Endpoints[id] = e
	}
	m.Sets = make(map[string]*policy.Set)
	for id, s := range c.m.Sets {
		m.Sets[id] = s
	}
	c.m = m
	switch i := c.r.IntN(10); {
	case i < 2:
		c.relabel(c.pods[c.r.IntN(len(c.pods))])
	case i < 3:
		c.changeSet(c.r.IntN(5))
	case i < 5:
		c.denied = !c.denied
		m.Tiers[0].Policies[92] = c.policy(92)
	case i < 8:
		j := 90 + c.r.IntN(2)
		m.Tiers[0].Policies[j] = c.policy(j)
	default:
		j := c.r.IntN(90)
		m.Tiers[0].Policies[j] = c.policy(j)
	}
	return m
}

// A thousand changes of policy under load: of connections that every version allows, not one packet is lost. Their servers
// may open nothing, and still answer. The only drops are those of what opens to pod t, which is denied now and then.
//
//	host one: clients c, servers s, target t   --- host two: client cc, server ss
func TestChangesLoseNothing(t *testing.T) {
	changes := 500 // at each host
	if testing.Short() {
		changes = 50
	}
	one, two := newHosts(t, loader.TCX, 1500)
	c, s, target := one.addPod("c", 1, loader.TCX), one.addPod("s", 2, loader.TCX), one.addPod("t", 3, loader.TCX)
	cc, ss := two.addPod("cc", 1, loader.TCX), two.addPod("ss", 2, loader.TCX)
	hosts := []*node{one, two}
	locals := [][]*pod{{c, s, target}, {cc, ss}}
	var enforcers []*enforcer
	var churns []*churn
	for i := range hosts {
		enforcers = append(enforcers, hosts[i].enforce(locals[i]...))
		churns = append(churns, newChurn(uint64(i), c, s, target, cc, ss))
		enforcers[i].set(churns[i].m)
	}
	all := []*trips{
		dialogue(t, "udp", c, s, false), dialogue(t, "tcp", c, s, true), pings(t, "icmp c-s", c, s.v4),
		dialogue(t, "udp", c, ss, true), dialogue(t, "tcp", cc, s, false), pings(t, "icmp cc-s", cc, s.v4), dialogue(t, "tcp", c, ss, true),
	}
	for _, tr := range all {
		for range 10 {
			if err := tr.trip(tr.made.Add(1)); err != nil {
				t.Fatalf("%s: before any change: %v", tr.name, err)
			}
		}
	}
	before := []map[string]uint64{one.counts(), two.counts()}
	stop := make(chan struct{})
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	var load, changing sync.WaitGroup
	for _, tr := range all {
		load.Go(func() {
			for !stopped() {
				if err := tr.trip(tr.made.Add(1)); err != nil {
					t.Errorf("%s: trip %d: %v", tr.name, tr.made.Load(), err)
					return
				}
			}
		})
	}
	xfd, yfd := c.socket(t, unix.SOCK_DGRAM, 6000, false), target.socket(t, unix.SOCK_DGRAM, 6000, false)
	dial(t, xfd, target.v4, 6000)
	var sent, arrived uint64
	load.Go(func() {
		for !stopped() {
			if _, err := writeTo(xfd, []byte("knock")); err != nil {
				t.Errorf("knock: %v", err)
				return
			}
			sent++
			time.Sleep(100 * time.Microsecond)
		}
	})
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(yfd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	quiet, heard := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(heard)
		for {
			var over bool
			select {
			case <-quiet: // what was sent is in the socket
				over = true
			default:
			}
			if n, _ := readFrom(yfd, make([]byte, 10)); n > 0 {
				arrived++
			} else if over {
				return
			}
		}
	}()
	begin := time.Now()
	for i := range hosts {
		changing.Go(func() {
			for range changes {
				delta, err := enforcers[i].compile(churns[i].next())
				if err == nil {
					err = enforcers[i].put(delta)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	changing.Wait()
	took := time.Since(begin)
	close(stop)
	load.Wait()
	close(quiet)
	<-heard
	drops := uint64(0)
	var kinds []string
	for i, n := range hosts {
		for k, v := range n.since(before[i]) {
			if strings.Contains(k, " drop_") {
				drops += v
				kinds = append(kinds, fmt.Sprintf("host %d: %s %d", i+1, k, v))
			}
		}
	}
	if drops != sent-arrived {
		t.Errorf("%d drops, but %d of %d knocks did not arrive; %v", drops, sent-arrived, sent, kinds)
	}
	if drops == 0 || arrived == 0 {
		t.Errorf("%d knocks dropped, %d arrived: nothing was denied, or all", drops, arrived)
	}
	total := uint64(0)
	for _, tr := range all {
		total += 2 * tr.made.Load()
		t.Logf("%s: %d trips", tr.name, tr.made.Load())
	}
	t.Logf("%d changes in %s under %d packets on %d connections: none lost; beside them %d of %d knocks denied", 2*changes, took.Round(time.Millisecond), total, len(all), drops, sent)
}
