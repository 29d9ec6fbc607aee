package manifest

import (
	"encoding/json"
	"errors"
	"net/netip"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
)

func TestParseIPPool(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       string // "": api.ErrInvalid
		size       int
	}{
		{"yaml", "cidr: 10.1.0.0/16\n", "10.1.0.0/16", 26},
		{"json", `{"cidr": "10.1.0.0/16"}`, "10.1.0.0/16", 26},
		{"v6", "cidr: 2001:db8::/64\n", "2001:db8::/64", 122},
		{"one block", "cidr: 10.1.0.0/26\n", "10.1.0.0/26", 26},
		{"small with small blocks", "{cidr: 10.1.0.0/31, blockSize: 31}", "10.1.0.0/31", 31},
		{"blocks of one", "{cidr: 10.1.0.0/24, blockSize: 32}", "10.1.0.0/24", 32},
		{"largest blocks", "{cidr: 10.1.0.0/16, blockSize: 20}", "10.1.0.0/16", 20},
		{"largest v6 blocks", "{cidr: '2001:db8::/64', blockSize: 116}", "2001:db8::/64", 116},
		{"class E", "cidr: 240.0.0.0/8", "240.0.0.0/8", 26},
		{"disabled", "{cidr: 10.1.0.0/16, disabled: true}", "10.1.0.0/16", 26},
		{"a key of another program", "{cidr: 10.1.0.0/16, natOutgoing: true}", "10.1.0.0/16", 26},

		{"empty", "", "", 0},
		{"no cidr", "blockSize: 26", "", 0},
		{"not yaml", "{", "", 0},
		{"a list", "[]", "", 0},
		{"address", "cidr: 10.1.0.0", "", 0},
		{"host bits", "cidr: 10.1.0.1/16", "", 0},
		{"/31 with default blocks", "cidr: 10.1.0.0/31", "", 0},
		{"/27 with default blocks", "cidr: 10.1.0.0/27", "", 0},
		{"v6 smaller than a block", "cidr: 2001:db8::/123", "", 0},
		{"blocks too large", "{cidr: 10.0.0.0/8, blockSize: 19}", "", 0},
		{"v6 blocks too large", "{cidr: '2001:db8::/64', blockSize: 115}", "", 0},
		{"blocks too small", "{cidr: 10.0.0.0/8, blockSize: 33}", "", 0},
		{"negative blocks", "{cidr: 10.0.0.0/8, blockSize: -1}", "", 0},
		{"v4 block size for v6", "{cidr: '2001:db8::/64', blockSize: 26}", "", 0},
		{"v4-mapped", "cidr: ::ffff:10.1.0.0/112", "", 0},
		{"zone", "cidr: fd00::%eth0/64", "", 0},
		{"multicast", "cidr: 224.0.0.0/8", "", 0},
		{"multicast inside", "cidr: 192.0.0.0/2", "", 0},
		{"loopback", "cidr: 127.0.0.0/8", "", 0},
		{"loopback inside", "cidr: 64.0.0.0/2", "", 0},
		{"link-local", "cidr: 169.254.0.0/16", "", 0},
		{"link-local inside", "cidr: 168.0.0.0/5", "", 0},
		{"this network", "cidr: 0.0.0.0/8", "", 0},
		{"everything", "cidr: 0.0.0.0/0", "", 0},
		{"broadcast", "cidr: 255.255.255.0/24", "", 0},
		{"v6 everything", "cidr: ::/0", "", 0},
		{"v6 loopback", "cidr: ::/96", "", 0},
		{"v6 multicast", "cidr: ff05::/16", "", 0},
		{"v6 link-local", "cidr: fe80::/64", "", 0},
		{"v6 multicast inside", "cidr: fe00::/7", "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, err := ParseIPPool([]byte(test.text))
			if test.want == "" {
				if !errors.Is(err, api.ErrInvalid) {
					t.Fatalf("%+v, %v, want api.ErrInvalid", p, err)
				}
				return
			}
			if err != nil || p.CIDR.String() != test.want || p.BlockSize != test.size {
				t.Fatalf("%+v, %v, want %s with blocks of /%d", p, err, test.want, test.size)
			}
		})
	}
}

func FuzzParseIPPool(f *testing.F) {
	for _, s := range []string{"cidr: 10.1.0.0/16", `{"cidr":"2001:db8::/64","blockSize":124,"disabled":true}`, "cidr: &a [*a]", "a: b: c", "{cidr: ::ffff:1.2.3.4/99}"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseIPPool(data)
		if err != nil {
			if !errors.Is(err, api.ErrInvalid) {
				t.Fatalf("no sentinel: %v", err)
			}
			return
		}
		if p.CIDR != p.CIDR.Masked() || p.BlockSize < p.CIDR.Bits() || p.BlockSize > p.CIDR.Addr().BitLen() {
			t.Fatalf("accepted: %+v", p)
		}
		for _, a := range []string{"127.0.0.1", "224.0.0.1", "169.254.1.1", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1"} {
			if p.CIDR.Contains(netip.MustParseAddr(a)) {
				t.Fatalf("%s has %s", p.CIDR, a)
			}
		}
		for _, write := range []func(any) ([]byte, error){json.Marshal, func(v any) ([]byte, error) { return yaml.Marshal(v) }} {
			text, err := write(p)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := ParseIPPool(text); err != nil || again != p {
				t.Fatalf("%+v became %+v, %v", p, again, err)
			}
		}
	})
}
