package cni

import (
	"encoding/json"
	"testing"
)

const cachedEntry = `{"kind":"cniCacheV1","containerId":"c1","config":"eyJuYW1lIjoiazhzLXBvZC1uZXR3b3JrIiwiY25pVmVyc2lvbiI6IjAuMy4xIiwicGx1Z2lucyI6W3sidHlwZSI6ImNhbGljbyIsImlwYW0iOnsidHlwZSI6ImNhbGljby1pcGFtIn19LHsidHlwZSI6ImJhbmR3aWR0aCIsImNhcGFiaWxpdGllcyI6eyJiYW5kd2lkdGgiOnRydWV9fV19","ifName":"eth0","networkName":"k8s-pod-network","cniArgs":[["K8S_POD_NAME","p"]],"capabilityArgs":{"bandwidth":{"ingressRate":8000,"egressRate":0}},"result":{"cniVersion":"0.3.1","interfaces":[{"name":"cali1"}],"ips":[{"version":"4","address":"10.244.1.5/32"}]}}`

func TestCalicoConfig(t *testing.T) {
	entry, ok := parseCached([]byte(cachedEntry))
	if !ok {
		t.Fatal("not read")
	}
	conf, ok := calicoConfig(entry)
	if !ok {
		t.Fatal("not Calico's")
	}
	c, err := ParseConfig(conf)
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "k8s-pod-network" || c.CNIVersion != "0.3.1" || c.Type != "calico" || !c.shaped() {
		t.Errorf("%s", conf)
	}
}

// FuzzCached: whatever libcni's cache has, what is taken out of it can be a pod's key and its configuration be read.
func FuzzCached(f *testing.F) {
	f.Add([]byte(cachedEntry))
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"a","ifName":"eth0","networkName":"n","config":"bnVsbA=="}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		entry, ok := parseCached(text)
		if !ok {
			return
		}
		conf, ok := calicoConfig(entry)
		if !ok {
			return
		}
		if !json.Valid(conf) {
			t.Fatalf("%s", conf)
		}
		if c, err := ParseConfig(conf); err == nil && c.Name != entry.NetworkName {
			t.Fatalf("%s is of network %s", conf, entry.NetworkName)
		}
	})
}
