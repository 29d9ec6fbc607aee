package cni

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/node"
)

func env(values map[string]string) func(string) string {
	return func(name string) string { return values[name] }
}

func TestHostIfName(t *testing.T) {
	kubernetes := map[string]string{"K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0"}
	seen := map[string]string{}
	for _, c := range []struct {
		name, network string
		env           Env
	}{
		{"pod", "pods", Env{ContainerID: "a", IfName: "eth0", Args: kubernetes}},
		{"pod's second interface", "pods", Env{ContainerID: "a", IfName: "eth1", Args: kubernetes}},
		{"second network", "other", Env{ContainerID: "a", IfName: "eth1", Args: kubernetes}},
		{"container", "pods", Env{ContainerID: "a", IfName: "eth0"}},
		{"podman's container", "pods", Env{ContainerID: "b", IfName: "eth0", Args: map[string]string{"K8S_POD_NAME": "web-0"}}},
	} {
		got := HostIfName(&c.env, c.network)
		if len(got) != 15 || seen[got] != "" {
			t.Errorf("%s: %q, as for %q", c.name, got, seen[got])
		}
		seen[got] = c.name
	}
	a := HostIfName(&Env{ContainerID: "a", IfName: "eth0", Args: kubernetes}, "x")
	b := HostIfName(&Env{ContainerID: "b", IfName: "eth0", Args: kubernetes}, "y")
	if a != b {
		t.Errorf("one workload, two names: %s and %s", a, b)
	}
	// SHA-1 of "default.web-0", as Calico has it.
	if a != "cali0d7763386da" {
		t.Errorf("default/web-0 is %s", a)
	}
}

func TestErrorCodes(t *testing.T) {
	for _, c := range codes {
		if got := asError(errors.Join(errors.New("context"), c.err)); got.Code != c.code || got.Msg == "" {
			t.Errorf("%v: code %d, want %d", c.err, got.Code, c.code)
		}
	}
	if got := asError(errors.New("other")); got.Code != codeInternal {
		t.Errorf("an unknown error has code %d", got.Code)
	}
}

// TestPolicyConfig: what is not clearly said about unknown policy is refused, by ADD; Calico's object is as good as none.
func TestPolicyConfig(t *testing.T) {
	for policy, want := range map[string]string{
		`{}`: "allow", `null`: "allow", `{"unknown":"allow"}`: "allow", `{"unknown":"deny"}`: "deny", `{ "unknown" : "deny" }`: "deny",
		`{"type":"k8s"}`: "allow", `{"type":"k8s","k8s_api_root":"https://192.0.2.1","k8s_auth_token":"t","unknown":"deny"}`: "deny",
		`{"unknown":"maybe"}`: `policy.unknown: neither "allow" nor "deny" but "maybe"`, `{"unknown":""}`: `policy.unknown: neither`, `{"unknown":null}`: "policy.unknown: neither",
		`{"unknown":7}`: "policy.unknown: neither", `{"unknown":["deny"]}`: "policy.unknown: neither", `{"unkown":"deny"}`: `policy: no key "unkown"`,
		`{"Unknown":"deny"}`: `policy: no key "Unknown"`, `7`: `"policy": a number where a object belongs`, `[]`: `"policy": a array where a object belongs`, `"deny"`: `"policy": a string`,
	} {
		config := []byte(`{"cniVersion":"1.0.0","name":"n","policy":` + policy + `}`)
		c, err := ParseConfig(config)
		switch {
		case err != nil:
			if e := new(Error); !errors.As(err, &e) || e.Code != codeConfig || !strings.Contains(e.Msg, want) {
				t.Errorf("%s: %v, want %s", policy, err, want)
			}
		case c.Policy.deniesUnknown() != (want == "deny") || want != "allow" && want != "deny":
			t.Errorf("%s denies: %t, want %s", policy, c.Policy.deniesUnknown(), want)
		}
		if _, err := parseForDel(config); err != nil && policy[0] == '{' {
			t.Errorf("DEL with %s: %v", policy, err)
		}
	}
}

func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.1.0","name":"pods","type":"caracal","ipam":{"type":"caracal-ipam","ipv4_pools":["10.244.0.0/16"],"ipv6_pools":["fd00:10::/64"],"reservations":["10.244.0.0/30"]}}`,
		`{"cniVersion":"0.3.1","name":"k8s-pod-network","type":"calico","log_level":"info","ipam":{"type":"calico-ipam","assign_ipv4":"true"},"policy":{"type":"k8s"},"args":{"labels":{"labels":[{"key":"a","value":"b"}]}}}`,
		`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"ips":["10.0.0.1/8","fd00::1"],"mac":"02:00:00:00:00:01","bandwidth":{"ingressRate":1},"dns":{"Servers":["x"]}},"labels":{"a":"b"},"mtu":9000}`,
		`{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],"cni.dev/attachments":null}`,
		`{"cniVersion":"1.0.0","name":"n","prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"address":"10.0.0.1/32","interface":0}]}}`,
		`{"cniVersion":"0.2.0","name":"n","prevResult":{"ip4":{"ip":"10.0.0.1/24"}}}`,
		`{"cniVersion":"1.0.0","name":"n","policy":{"unknown":"deny","type":"k8s"}}`,
		`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"cni.projectcalico.org/ipAddrs":"[\"10.0.0.1\"]","cni.projectcalico.org/hwAddr":"02:00:00:00:00:01"}}}`,
		`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"cni.projectcalico.org/ipAddrs":"10.0.0.1"}}}`,
		`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":"0.0.0.0"},{"hostPort":0},{"hostPort":53,"protocol":"udp","hostIP":"::"}]}}`,
		`{"name":"n"}`, `[]`, `{`, `null`, "\x00",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseConfig(data)
		if err != nil {
			if e := new(Error); !errors.As(err, &e) || e.Code == 0 || e.Msg == "" {
				t.Fatalf("error without code or words: %#v", err)
			}
			return
		}
		e := &Env{Args: map[string]string{}}
		addrs, err := c.requested(e)
		if err == nil && slices.ContainsFunc(addrs, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() }) {
			t.Fatalf("requested %v", addrs)
		}
		if mac, err := c.mac(e); err == nil && mac != nil && (len(mac) != 6 || mac[0]&1 == 1) {
			t.Fatalf("MAC %s", mac)
		}
		if valid, ok := c.valid(); !ok && valid != nil {
			t.Fatal("no list, yet one")
		}
		if ports, err := c.ports(); err == nil && slices.ContainsFunc(ports, func(p node.HostPort) bool { return p.Port == 0 || p.String() == "" || !p.Overlaps(p) }) {
			t.Fatalf("ports %v", ports)
		}
		c.shaped()
		c.labels()
		c.dns()
		if cfg, err := c.pools(); err == nil {
			cfg.Validate()
		}
		if !filepath.IsAbs(c.StateDir) || !filepath.IsAbs(c.BPFFSDir) {
			t.Fatalf("relative: %q %q", c.StateDir, c.BPFFSDir)
		}
	})
}

func FuzzArgs(f *testing.F) {
	for _, s := range []string{"", "IgnoreUnknown=1;K8S_POD_NAME=a;IP=10.0.0.1", "a", "a=b=c;;", "=", "IP=;MAC="} {
		f.Add(s, "c1", "eth0")
	}
	f.Fuzz(func(t *testing.T, args, id, ifname string) {
		e, err := ParseEnv(env(map[string]string{
			"CNI_COMMAND": "ADD", "CNI_ARGS": args, "CNI_CONTAINERID": id, "CNI_IFNAME": ifname, "CNI_NETNS": "/x",
		}))
		if err != nil {
			return
		}
		if len(ifname) > 15 || filepath.Base(ifname) != ifname || id == "" {
			t.Fatalf("accepted container %q, interface %q", id, ifname)
		}
		if name := HostIfName(e, "n"); len(name) != 15 {
			t.Fatalf("interface %q", name)
		}
	})
}

func FuzzVersion(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0"}`))
	f.Add([]byte(``))
	f.Fuzz(func(t *testing.T, data []byte) {
		answer, _, err := versions(data)
		if err != nil {
			return
		}
		if _, err := json.Marshal(answer); err != nil {
			t.Fatal(err)
		}
	})
}

// TestForwardingListsOnlyDifferences reads the machine, and writes nothing.
func TestForwardingListsOnlyDifferences(t *testing.T) {
	if _, err := os.Stat(sysctlPath("ipv4/ip_forward")); err != nil {
		t.Skip(err)
	}
	todo, err := forwarding(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range todo {
		if s.value == s.before {
			t.Errorf("%s is %s already", s.name, s.value)
		}
	}
}
