package ctl

import (
	"encoding/json"
	"fmt"
	"testing"
)

func TestParseService(t *testing.T) {
	for text, want := range map[string]string{
		"x/web":           "x web  ",
		"web":             "default web  ",
		"x/web:80":        "x web 80 ",
		"x/web:http/tcp":  "x web http TCP",
		"x/web:53/udp":    "x web 53 UDP",
		"/web:80":         "error",
		"x/:80":           "error",
		"":                "error",
		"x/web/more:80":   "error",
		"x/..%2fsecrets":  "error",
		"x/web?limit=100": "error",
	} {
		namespace, name, port, protocol, err := parseService(text)
		got := fmt.Sprintf("%s %s %s %s", namespace, name, port, protocol)
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: %q (%v), want %q", text, got, err, want)
		}
	}
}

func TestServicePort(t *testing.T) {
	var two, one, none apiService
	two.Spec.Ports = []servicePort{{"dns", "UDP", 53}, {"dns-tcp", "TCP", 53}, {"metrics", "", 9153}}
	one.Spec.Ports = two.Spec.Ports[2:]
	for _, c := range []struct {
		of             apiService
		port, protocol string
		want           string
	}{
		{two, "53", "UDP", "dns UDP 53"},
		{two, "dns-tcp", "", "dns-tcp TCP 53"},
		{two, "9153", "", "metrics TCP 9153"},
		{two, "", "", "say which of its ports: 53/UDP, 53/TCP, 9153/TCP"},
		{two, "80", "", "it has the ports 53/UDP, 53/TCP, 9153/TCP alone: kube-proxy translates no other"},
		{two, "9153", "UDP", "it has the ports 53/UDP, 53/TCP, 9153/TCP alone: kube-proxy translates no other"},
		{one, "", "", "metrics TCP 9153"},
		{none, "80", "", "it has no ports: it is a name alone"},
	} {
		p, err := c.of.port(c.port, c.protocol)
		got := fmt.Sprintf("%s %s %d", p.Name, p.Protocol, p.Port)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("port %q %q: %q, want %q", c.port, c.protocol, got, c.want)
		}
	}
}

func TestBackends(t *testing.T) {
	var s apiSlice
	err := json.Unmarshal([]byte(`{"ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
		"endpoints": [{"addresses": ["10.1.0.1"], "conditions": {"ready": true}}, {"addresses": ["10.1.0.2"], "conditions": {"ready": false}},
			{"addresses": ["10.1.0.3"], "conditions": {}}, {"addresses": ["nonsense"]}]}`), &s)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(s.backends(servicePort{"http", "TCP", 80})), "[10.1.0.1:8080 10.1.0.3:8080]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := s.backends(servicePort{"dns", "TCP", 53}); got != nil {
		t.Errorf("%v of another protocol", got)
	}
}
