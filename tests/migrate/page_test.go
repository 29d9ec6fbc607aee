package migrate

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/page"
	"github.com/caracal-net/caracal/tests/testenv"
)

// TestPage runs docs/migrate-from-calico.md. calicoctl and docker are scripts here, of the verbs that the page uses.
func TestPage(t *testing.T) {
	hosts := newHosts(t, 2, testenv.Bin(t, "caracal"))
	h1, h2 := hosts[0], hosts[1]
	a, b := h1.pod(1, 5, "a", "0.3.1", false), h1.pod(1, 6, "b", "0.3.1", false)
	c := h2.pod(2, 7, "c", "0.3.1", false)
	eventually(t, "Calico's hosts route to each other", func() error { return a.ping(c.addr) })
	store(hosts)
	text := export(hosts)
	text = strings.Replace(text, "kind: NodeList\nmetadata: {}\n---\n", `kind: NodeList
metadata: {}
---
apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: GlobalNetworkPolicy
  metadata:
    creationTimestamp: null
    name: default.web
  spec:
    ingress:
    - action: Allow
      destination:
        ports:
        - 80
      protocol: TCP
    order: 100
    selector: app == "web"
    tier: default
    types:
    - Ingress
kind: GlobalNetworkPolicyList
metadata: {}
---
apiVersion: projectcalico.org/v3
items:
- apiVersion: projectcalico.org/v3
  kind: FelixConfiguration
  metadata:
    name: default
  spec:
    ipipEnabled: false
kind: FelixConfigurationList
metadata: {}
---
`, 1)
	h1.write("/root/export", text)
	endpoints := "apiVersion: projectcalico.org/v3\nitems:\n"
	for _, p := range []*pod{a, b, c} {
		endpoints += fmt.Sprintf(`- apiVersion: projectcalico.org/v3
  kind: WorkloadEndpoint
  metadata:
    labels:
      app: %[1]s
      projectcalico.org/namespace: default
    name: %[2]s-k8s-%[1]s-eth0
    namespace: default
  spec:
    containerID: "%[3]s"
    endpoint: eth0
    interfaceName: %[4]s
    ipNetworks:
    - %[5]s/32
    node: %[2]s
    orchestrator: k8s
    pod: %[1]s
    profiles:
    - kns.default
`, p.name, p.host.Name, p.id, p.ifname, p.addr)
	}
	h1.write("/root/endpoints", endpoints+"kind: WorkloadEndpointList\nmetadata: {}\n")
	shells := make(map[string]page.Shell)
	for _, h := range hosts {
		h.sh(`ln -s /root/caracal/caracal /root/caracal/caracald /root/caracal/caracalctl /usr/local/bin/
cat > /usr/local/bin/calicoctl <<'end'
#!/bin/sh
case "$*" in
"datastore migrate lock") echo "Datastore locked." ;;
"datastore migrate export") cat /root/export ;;
"get workloadendpoints"*) cat /root/endpoints ;;
*) exit 1 ;;
esac
end
cat > /usr/local/bin/docker <<'end'
#!/bin/sh
[ "$*" = "start calico-node" ] && exec bird -c /etc/bird.conf -s /run/bird.ctl -P /run/bird.pid
[ "$*" = "kill calico-node" ] && kill -9 $(cat /run/bird.pid) && while kill -0 $(cat /run/bird.pid) 2>/dev/null; do sleep 0.1; done
end
chmod +x /usr/local/bin/calicoctl /usr/local/bin/docker`)
		shells[h.Name] = h.Sh
	}
	talks := []*talk{a.connect(b, b.addr), a.connect(c, c.addr), c.connect(b, b.addr)}
	page.Run(t, "../../docs/migrate-from-calico.md", shells)
	for _, k := range talks {
		k.goesOn("at the end of the page")
	}
}
