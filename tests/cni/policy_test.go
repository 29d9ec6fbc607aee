package cni

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/node"
)

// TestRecorded: what policy goes by is in the record: labels from all that may bring them, in both of their forms, and what
// Kubernetes calls the pod.
func TestRecorded(t *testing.T) {
	h := newHost(t)
	for _, labels := range []any{
		object{"app": "web", "tier": "front"}, []object{{"key": "app", "value": "web"}, {"key": "tier", "value": "front"}},
	} {
		p := h.pod()
		p.args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=" + p.id
		p.conf = object{
			"labels": object{"app": "overridden", "from": "conflist"},
			"args":   object{"labels": object{"tier": "overridden", "zone": "a"}, "cni": object{"labels": labels}},
		}
		p.add()
		must(t, h.db(func(tx *node.Tx) error {
			e, err := tx.Endpoint(node.Key{Network: "pods", ContainerID: p.id, IfName: "eth0"})
			if l := e.Labels; len(l) != 4 || l["app"] != "web" || l["tier"] != "front" || l["from"] != "conflist" || l["zone"] != "a" {
				t.Errorf("labels %v", l)
			}
			if e.PodNamespace != "shop" || e.PodName != "web-0" || e.PodUID != "u-1" {
				t.Errorf("%s/%s, %s", e.PodNamespace, e.PodName, e.PodUID)
			}
			return err
		}))
		p.del()
	}
	h.clean()
}

// pings tells whether a ping from the pod is answered.
func (p *pod) pings(to netip.Addr) error {
	out, err := try(p.ns, "ping", "-n", "-c", "1", "-W", "1", to.String())
	if err != nil {
		return errors.New(out)
	}
	return nil
}

// TestUnknownPolicy: what pods do where nobody knows of any policy is a setting.
func TestUnknownPolicy(t *testing.T) {
	h := newHost(t)
	none, open, shut := h.pod().add(), h.pod(), h.pod()
	open.conf, shut.conf = object{"policy": object{"unknown": "allow"}}, object{"policy": object{"unknown": "deny", "type": "k8s"}}
	open.add()
	shut.add()
	for _, v6 := range []bool{false, true} {
		none.ping(open.addr(v6))
		open.ping(none.addr(v6))
		for _, pair := range [][2]*pod{{shut, open}, {open, shut}} {
			if pair[0].pings(pair[1].addr(v6)) == nil {
				t.Errorf("%s reaches %s", pair[0].addr(v6), pair[1].addr(v6))
			}
		}
		run(t, h.name, "ping", "-n", "-c", "1", "-W", "3", shut.addr(v6).String()) // as the kubelet does
	}
	check := *shut
	check.conf = object{"policy": object{"unknown": "deny"}, "prevResult": shut.raw}
	must(t, check.do("CHECK"))
	wrong := h.pod()
	wrong.conf = object{"policy": object{"unknown": "perhaps"}}
	wrong.fails(7, "policy.unknown", "ADD")
	shut.conf = wrong.conf // spoilt since
	for _, p := range []*pod{none, open, shut} {
		p.del()
	}
	h.clean()
}
