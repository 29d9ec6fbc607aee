package migrate

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

// calicoNetworks are network configurations as Calico's manifests, its image and its documentation have them; %s is the node's name.
var calicoNetworks = []struct{ name, text string }{
	{"kubernetes", strings.Replace(network, `"%s",`, `"0.3.1",`, 1)},
	{"operator", `{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [{
    "container_settings": {"allow_ip_forwarding": false},
    "datastore_type": "kubernetes",
    "endpoint_status_dir": "/var/run/calico/endpoint-status",
    "ipam": {"assign_ipv4": "true", "assign_ipv6": "false", "type": "calico-ipam"},
    "kubernetes": {"k8s_api_root": "https://10.96.0.1:443", "kubeconfig": "/etc/cni/net.d/calico-kubeconfig"},
    "log_file_max_age": 30, "log_file_max_count": 10, "log_file_max_size": 100,
    "log_file_path": "/var/log/calico/cni/cni.log", "log_level": "Info",
    "mtu": 0, "nodename_file_optional": false,
    "policy": {"type": "k8s"}, "policy_setup_timeout_seconds": 0,
    "type": "calico"
  }, {
    "capabilities": {"bandwidth": true}, "type": "bandwidth"
  }, {
    "capabilities": {"portMappings": true}, "snat": true, "type": "portmap"
  }]
}`},
	{"etcd", `{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [{
    "type": "calico",
    "log_level": "info", "log_file_path": "/var/log/calico/cni/cni.log",
    "etcd_endpoints": "https://192.0.2.77:2379,https://192.0.2.78:2379",
    "etcd_key_file": "/calico-secrets/etcd-key", "etcd_cert_file": "/calico-secrets/etcd-cert", "etcd_ca_cert_file": "/calico-secrets/etcd-ca",
    "mtu": 1440,
    "ipam": {"type": "calico-ipam"},
    "policy": {"type": "k8s"},
    "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"}
  }, {
    "type": "portmap", "snat": true, "capabilities": {"portMappings": true}
  }]
}`},
	{"pools and features", `{
  "name": "any_name", "cniVersion": "1.0.0",
  "plugins": [{
    "type": "calico", "datastore_type": "etcdv3", "etcd_endpoints": "http://192.0.2.77:2379", "nodename": "%s", "nodename_file": "/nowhere",
    "ipam": {"type": "calico-ipam", "assign_ipv4": "true", "assign_ipv6": "false", "ipv4_pools": ["10.244.0.0/16"]},
    "container_settings": {"allow_ip_forwarding": true}, "feature_control": {"ip_addrs_no_ipam": true, "floating_ips": true},
    "include_default_routes": true, "num_queues": 2, "require_mtu_file": true, "readiness_gates": ["http://localhost:9099/readiness"],
    "ipam_lock_file": "/nowhere", "windows_use_single_network": true, "mode": "vxlan", "vxlan_vni": 4096, "vxlan_mac_prefix": "0E-2A", "qps": 100, "burst": 200
  }]
}`},
	{"0.3.0", `{
  "name": "calico-k8s-network", "cniVersion": "0.3.0",
  "plugins": [{
    "type": "calico", "etcd_authority": "127.0.0.1:2379", "etcd_scheme": "http", "hostname": "%s", "log_level": "debug",
    "ipam": {"type": "calico-ipam"},
    "policy": {"type": "k8s", "k8s_api_root": "https://10.96.0.1:443", "k8s_auth_token": "abc"},
    "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"}
  }]
}`},
}

// chain runs a network's plugins one after the other as libcni does: each with what the one before it answered, and with the
// capabilities that it declares.
func (h *host) chain(command, id, name, conf string, capabilities map[string]any, prev json.RawMessage) (json.RawMessage, error) {
	h.t.Helper()
	var list struct {
		CNIVersion string                       `json:"cniVersion"`
		Name       string                       `json:"name"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}
	must(h.t, json.Unmarshal([]byte(conf), &list))
	for i := range list.Plugins {
		plugin := list.Plugins[i]
		if command == "DEL" {
			plugin = list.Plugins[len(list.Plugins)-1-i]
		}
		plugin["name"], _ = json.Marshal(list.Name)
		plugin["cniVersion"], _ = json.Marshal(list.CNIVersion)
		if prev != nil {
			plugin["prevResult"] = prev
		}
		var declared map[string]bool
		json.Unmarshal(plugin["capabilities"], &declared)
		given := make(map[string]any)
		for name, value := range capabilities {
			if declared[name] {
				given[name] = value
			}
		}
		if len(given) > 0 {
			plugin["runtimeConfig"], _ = json.Marshal(given)
		}
		stdin, err := json.Marshal(plugin)
		must(h.t, err)
		binary := strings.Trim(string(plugin["type"]), `"`)
		cmd := h.Command(h.t.Context(), "sh", "-c", fmt.Sprintf("if [ -x /opt/cni/bin/%[1]s ]; then exec /opt/cni/bin/%[1]s; else exec /usr/lib/cni/%[1]s; fi 2>/dev/null", binary))
		cmd.Env = append(cmd.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+id, "CNI_NETNS=/run/netns/cni-"+name, "CNI_IFNAME=eth0",
			"CNI_PATH=/opt/cni/bin:/usr/lib/cni", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+name)
		cmd.Stdin = strings.NewReader(string(stdin))
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w: %s", command, binary, err, out)
		}
		if command == "ADD" {
			prev = out
		}
	}
	return prev, nil
}

// TestDropIn: Calico's own networks, unmodified, with Caracal's plugins under Calico's names.
func TestDropIn(t *testing.T) {
	testenv.NeedRoot(t)
	hosts := newMachines(t, 1, testenv.Bin(t, "caracal"))
	h := hosts[0]
	h.sh("mkdir -p /opt/cni/bin")
	h.installPlugins()
	text := func(conf string) string { return strings.ReplaceAll(conf, "%s", h.Name) }

	// Without pools in it the network is the cluster's: nothing is given out before an agent has said what that has.
	h.namespace("early")
	if _, err := h.chain("ADD", "early", "early", text(calicoNetworks[0].text), nil, nil); err == nil || !strings.Contains(err.Error(), "start caracald") || !strings.Contains(err.Error(), `"code": 11`) {
		t.Errorf("without an agent: %v", err)
	}
	h.write("/root/pool.yaml", "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: p}\nspec: {cidr: 10.244.0.0/16, natOutgoing: true}\n")
	h.ctl("apply -f /root/pool.yaml")
	h.startAgent()
	eventually(t, "the agent has recorded the pools", func() error {
		prev, err := h.chain("ADD", "early", "early", text(calicoNetworks[0].text), nil, nil)
		if err != nil {
			return err
		}
		_, err = h.chain("DEL", "early", "early", text(calicoNetworks[0].text), nil, prev)
		return err
	})
	for i, n := range calicoNetworks {
		t.Run(n.name, func(t *testing.T) {
			h := &host{t: t, Machine: h.Machine}
			conf, name := text(n.text), fmt.Sprintf("pod%d", i)
			h.write("/root/10-calico.conflist", conf)
			h.ctl("validate /root/10-calico.conflist")
			h.namespace(name)
			ports := map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080 + i, "containerPort": 80, "protocol": "tcp"}}}
			prev, err := h.chain("ADD", name, name, conf, ports, nil)
			must(t, err)
			if !strings.Contains(string(prev), `"10.244.0.`) {
				t.Errorf("ADD answered %s", prev)
			}
			mtu := map[bool]string{true: "mtu 1440", false: "mtu 1500"}[n.name == "etcd"]
			if link := h.sh("ip -n cni-%s link show eth0", name); !strings.Contains(link, mtu) {
				t.Errorf("not %s: %s", mtu, link)
			}
			h.sh("nsenter --net=/run/netns/cni-%s ping -n -c 1 -W 2 %s", name, h.Addr())
			if strings.Contains(conf, "portmap") && !strings.Contains(h.sh("iptables-save -t nat"), fmt.Sprint(8080+i)) {
				t.Error("portmap has published nothing")
			}
			if strings.Contains(conf, "1.0.0") {
				if _, err := h.chain("CHECK", name, name, conf, ports, prev); err != nil {
					t.Error(err)
				}
			}
			for range 2 {
				if _, err := h.chain("DEL", name, name, conf, ports, prev); err != nil {
					t.Error(err)
				}
			}
			h.sh("ip netns del cni-%s", name)
			if pods := h.ctl("pods"); strings.Contains(pods, name) {
				t.Errorf("after DEL:\n%s", pods)
			}
		})
	}
	if log := h.sh("cat /var/log/calico/cni/cni.log"); !strings.Contains(log, "command=ADD") && !strings.Contains(log, "ADD") {
		t.Errorf("log_file_path has\n%s", log)
	}
	t.Run("bandwidth", func(t *testing.T) {
		h := &host{t: t, Machine: h.Machine}
		if _, err := h.Sh(t.Context(), "ip link add probe type ifb && ip link del probe"); err != nil {
			t.Skip("this kernel has no ifb")
		}
		h.namespace("shaped")
		limits := map[string]any{"bandwidth": map[string]any{"ingressRate": 32000000, "ingressBurst": 1000000, "egressRate": 32000000, "egressBurst": 1000000}}
		prev, err := h.chain("ADD", "shaped", "shaped", text(calicoNetworks[1].text), limits, nil)
		must(t, err)
		eventually(t, "the pod's packets take the way through its qdiscs", func() error {
			if out := h.ctl("pods -o json"); !strings.Contains(out, `"shaped": true`) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		_, err = h.chain("DEL", "shaped", "shaped", text(calicoNetworks[1].text), limits, prev)
		must(t, err)
	})
}
