package api

import (
	"encoding/json"
	"errors"
	"testing"
)

// reads what JSON says and writes it, twice; what it is refused with is ErrInvalid.
func roundTrip[T comparable](t *testing.T, text []byte) (v T, ok bool) {
	t.Helper()
	var resource struct {
		V T `json:"v"`
	}
	data := []byte(`{"v":` + string(text) + `}`)
	if err := Strict(data, &resource); err != nil {
		if !errors.Is(err, ErrInvalid) {
			t.Fatalf("%s: no sentinel: %v", data, err)
		}
		return v, false
	}
	again, err := json.Marshal(resource)
	if err != nil {
		t.Fatalf("%s: %v", data, err)
	}
	first := resource.V
	if err := Strict(again, &resource); err != nil || resource.V != first {
		t.Fatalf("%s became %s: %v", data, again, err)
	}
	return first, true
}

func TestPorts(t *testing.T) {
	for text, want := range map[string]Ports{
		"1": {1, 1, ""}, `"65535"`: {65535, 65535, ""}, `"1:65535"`: {1, 65535, ""}, `"http"`: {0, 0, "http"}, `"a.B_1-2"`: {0, 0, "a.B_1-2"}, `"7:7"`: {7, 7, ""},
		"0": {}, "65536": {}, "-1": {}, "1.0": {}, "1e3": {}, "true": {}, "[1]": {}, "{}": {}, `""`: {}, `":"`: {}, `"1:"`: {}, `":1"`: {}, `"0:1"`: {}, `"2:1"`: {}, `"1:2:3"`: {}, `"1:65536"`: {}, `"a:b"`: {}, `" 1"`: {}, `"é"`: {}, "null": {},
	} {
		if got, _ := roundTrip[Ports](t, []byte(text)); got != want {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
}

func TestProtocol(t *testing.T) {
	for text, want := range map[string]Protocol{
		`"TCP"`: TCP, `"udp"`: UDP, `"icmpv6"`: ICMPv6, "6": TCP, `"132"`: SCTP, "255": 255, "1": ICMP, "0": 0, "256": 0, `"FTP"`: 0, `""`: 0, "-1": 0, "[]": 0, "null": 0,
	} {
		if got, _ := roundTrip[Protocol](t, []byte(text)); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func FuzzPorts(f *testing.F) {
	for _, s := range []string{"80", `"1:2"`, `"http"`, `"TCP"`, "47", `"10.0.0.0/8"`, `"2001:db8::1"`, `"::ffff:1.2.3.4"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, ok := roundTrip[Ports](t, text); ok && (p.Name == "") == (p.First == 0) || p.First > p.Last {
			t.Fatalf("%q: %+v", text, p)
		}
		roundTrip[Protocol](t, text)
		if n, ok := roundTrip[Net](t, text); ok && n.IsValid() && (n.Prefix != n.Masked() || n.Addr().Is4In6()) {
			t.Fatalf("%q: %s", text, n)
		}
	})
}
