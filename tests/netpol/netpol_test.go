package netpol

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/policy"
)

// TestModel holds the model against the table: every probe of every step of every situation.
func TestModel(t *testing.T) {
	addresses := make(map[string]netip.Addr)
	for i, end := range Ends() {
		addresses[end] = netip.AddrFrom4([4]byte{10, 65, 0, byte(i + 1)})
	}
	for i, node := range Nodes {
		addresses[node] = netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
	}
	all, err := Situations(addresses)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 60 {
		t.Errorf("%d situations", len(all))
	}
	titles := make(map[string]bool)
	for _, s := range all {
		if titles[s.Title()] {
			t.Errorf("%q is there twice", s.Title())
		}
		titles[s.Title()] = true
		t.Run(s.Title(), func(t *testing.T) {
			c := newCluster(t, addresses)
			for i, step := range s.Steps {
				c.change(t, step)
				model, err := policy.FromResources(c.resources())
				if err != nil {
					t.Fatal(err)
				}
				ports := append(append([]string{}, Ports...), SCTPPorts...)
				want, err := step.Wanted(ports)
				if err != nil {
					t.Fatalf("step %d: %v", i+1, err)
				}
				got := make(Matrix)
				for p := range want {
					packet := policy.Packet{SourcePort: 40000, Source: addresses[p.From], Destination: addresses[p.To]}
					var word string
					if _, err := fmt.Sscanf(strings.Replace(p.Port, "/", " ", 1), "%s %d", &word, &packet.TargetPort); err != nil {
						t.Fatal(err)
					}
					packet.Protocol = map[string]uint8{"TCP": 6, "UDP": 17, "SCTP": 132}[word]
					got[p] = p.From == p.To || p.From == NodeOf(p.To) || model.Flow(packet).Action() == policy.Allow
				}
				if wrong := got.Compare(want); wrong != nil {
					t.Errorf("step %d: %d of %d are not as wanted:\n%s", i+1, len(wrong), len(want), strings.Join(wrong, "\n"))
				}
			}
		})
	}
}

// cluster is what the API has.
type cluster struct {
	labels   map[string]map[string]any // of namespaces and pods
	address  map[string]netip.Addr
	policies map[string]api.Resource // by key
}

func newCluster(t *testing.T, address map[string]netip.Addr) *cluster {
	c := &cluster{make(map[string]map[string]any), address, make(map[string]api.Resource)}
	for _, ns := range Namespaces {
		c.labels[ns] = map[string]any{"ns": ns}
		for _, pod := range Pods {
			c.labels[ns+"/"+pod] = map[string]any{"pod": pod}
		}
	}
	return c
}

// change does what a step says.
func (c *cluster) change(t *testing.T, s Step) {
	t.Helper()
	text, err := s.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if text != "" {
		all, err := manifest.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range all {
			c.policies[r.Key()] = r
		}
	}
	kind, err := api.FindKind("networkpolicies.networking.k8s.io")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range s.Delete {
		namespace, name, _ := strings.Cut(name, "/")
		key := kind.Key(namespace, name)
		if _, there := c.policies[key]; !there {
			t.Fatalf("no policy %s", key)
		}
		delete(c.policies, key)
	}
	for of, labels := range s.Label {
		for key, value := range labels {
			c.labels[of][key] = value
			if value == nil {
				delete(c.labels[of], key)
			}
		}
	}
}

func (c *cluster) resources() []api.Resource {
	var all []api.Resource
	for _, r := range c.policies {
		all = append(all, r)
	}
	add := func(version, kind string, metadata, spec map[string]any) {
		text, err := json.Marshal(map[string]any{"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})
		var r api.Resource
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err != nil {
			panic(err)
		}
		all = append(all, r)
	}
	for _, ns := range Namespaces {
		add("v1", "Namespace", map[string]any{"name": ns, "labels": c.labels[ns]}, map[string]any{})
		for _, pod := range Pods {
			name := ns + "/" + pod
			ports := []map[string]any{}
			for _, port := range append(append([]string{}, Ports...), SCTPPorts...) {
				protocol, number, _ := strings.Cut(port, "/")
				ports = append(ports, map[string]any{"name": PortName(port), "protocol": protocol, "port": json.Number(number)})
			}
			add(api.Group, "WorkloadEndpoint", map[string]any{"name": pod, "namespace": ns, "labels": c.labels[name]},
				map[string]any{"node": NodeOf(name), "orchestrator": "k8s", "pod": pod, "ipNetworks": []netip.Addr{c.address[name]}, "ports": ports})
		}
	}
	return all
}
