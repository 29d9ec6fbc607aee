package ctl

import (
	"fmt"
	"strings"
	"testing"
)

func TestParseQuestion(t *testing.T) {
	isPod := func(s string) bool { return s == "default/tcp" || s == "default/web" }
	for ask, want := range map[string]string{
		"web default/web":            "web:0 TCP default/web:0",
		"web db:80":                  "web:0 TCP db:80",
		"web:4000 db:53/udp":         "web:4000 UDP db:53",
		"web default/web:80/TCP":     "web:0 TCP default/web:80",
		"web default/tcp":            "web:0 TCP default/tcp:0",
		"web default/tcp/udp":        "web:0 UDP default/tcp:0",
		"web default/web/icmp":       "web:0 ICMP default/web:0 8.0",
		"10.0.0.1 10.0.0.2:3.1/icmp": "10.0.0.1:0 ICMP 10.0.0.2:0 3.1",
		"2001:db8::1 2001:db8::2":    "2001:db8::1:0 TCP 2001:db8::2:0",
		"[2001:db8::1]:9 [::2]:80/6": "2001:db8::1:9 TCP ::2:80",
		"a 2001:db8::2/icmpv6":       "a:0 ICMPv6 2001:db8::2:0 8.0",
		"a 10.0.0.2/47":              "a:0 47 10.0.0.2:0",
		"a web/sctp":                 "a:0 SCTP web:0",
		"web other/db":               "web:0 TCP other/db:0",
		"10.0.0.1:65535 10.0.0.1:1":  "10.0.0.1:65535 TCP 10.0.0.1:1",
	} {
		src, dst, _ := strings.Cut(ask, " ")
		q, err := parseQuestion(src, dst, isPod)
		got := fmt.Sprintf("%s:%d %s %s:%d", q.source, q.sourcePort, q.protocol, q.destination, q.port)
		if q.isICMP() {
			kind := uint8(8)
			if q.kind != nil {
				kind = *q.kind
			}
			got += fmt.Sprintf(" %d.%d", kind, q.code)
		}
		if err != nil || got != want {
			t.Errorf("%s: %s (%v), want %s", ask, got, err, want)
		}
	}
	for ask, want := range map[string]string{
		"web 10.0.0.0/24":   "is a network",
		"web 10.0.0.0/999":  "is a network",
		"web 2001:db8::/64": "is a network",
		"web db:0":          `port "0": not a number from 1 to 65535`,
		"web db:65536":      "not a number from 1 to 65535",
		"web db:http":       "not a number from 1 to 65535",
		"web db:80/http":    `protocol "http"`,
		"web db:80/0":       `protocol "0"`,
		"web db:80/256":     `protocol "256"`,
		"web db:":           "write it as POD:PORT",
		"web :80":           "write it as POD:PORT",
		"web [::1]80":       "write it as [2001:db8::1]:80",
		"web [::1":          "write it as [2001:db8::1]:80",
		"web [db]:80":       "write it as [2001:db8::1]:80",
		"web ::1:x:80":      "write that as [2001:db8::1]:80",
		"web db:80/47":      "47 has no ports; leave :80 out",
		"web:80 db/icmp":    "ICMP has no ports; leave :80 out",
		"web db:300/icmp":   `type "300" of ICMP`,
		"web db:3./icmp":    `type "3." of ICMP`,
		"web db:3.1.2/icmp": `type "3.1.2" of ICMP`,
		"web ":              "an end is empty",
	} {
		src, dst, _ := strings.Cut(ask, " ")
		if q, err := parseQuestion(src, dst, isPod); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v (%v), want %s", ask, q, err, want)
		}
	}
}

// Whatever is asked, it is taken or refused with a sentence; what is taken has its parts in range.
func FuzzParseQuestion(f *testing.F) {
	f.Add("web:1", "[::1]:80/tcp")
	f.Add("a", "b:8.0/icmp")
	f.Fuzz(func(t *testing.T, source, destination string) {
		q, err := parseQuestion(source, destination, func(string) bool { return false })
		if err != nil {
			return
		}
		if q.source == "" || q.destination == "" || q.protocol == 0 || !q.protocol.HasPorts() && (q.port != 0 || q.sourcePort != 0) {
			t.Errorf("%q %q: %+v", source, destination, q)
		}
	})
}
