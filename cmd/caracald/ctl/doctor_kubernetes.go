package ctl

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/deploy"
	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
)

// proxyMode is where kube-proxy says its mode, unless it was told otherwise.
const proxyMode = "http://127.0.0.1:10249/proxyMode"

// ownResources are what Caracal has beside Calico's kinds.
var ownResources = []string{"addressblocks", "caracalnodes", "entries"}

// checkKubernetes: the API answers, knows Caracal's kinds, lets this node do what it must, and has the node.
func (d *doctor) checkKubernetes() error {
	config, is := d.cluster()
	if !is {
		d.skipped("the store is not a Kubernetes API")
		return nil
	}
	s, err := kube.Open(config)
	if err != nil {
		d.fail("--kubeconfig, KUBECONFIG, or the file that --config names", "%v", err)
		return nil
	}
	defer s.Close()
	ctx := d.cmd.Context()
	text, err := s.Raw(ctx, "/version", nil)
	if err != nil {
		d.fail("running pods go on, and new ones start on addresses that the node has; is kube-apiserver up, and does this host reach it?", "%v", err)
		return nil
	}
	var version struct{ GitVersion string }
	_ = json.Unmarshal(text, &version) // it is only shown
	if err := errors.Join(d.wantKinds(s), d.wantRights(s), d.wantNode(s)); err != nil {
		return err
	}
	d.wantProxy()
	if d.silent() {
		d.ok("Kubernetes %s answers, knows all kinds, allows this node all that it does, and has it", printable(version.GitVersion))
	}
	return nil
}

// wantKinds makes sure that the kinds are served, by the API itself.
func (d *doctor) wantKinds(s *kube.Store) error {
	// An extension API server of Calico's serves the same kinds from its own datastore: then nobody sees ours.
	text, err := s.Raw(d.cmd.Context(), "/apis/apiregistration.k8s.io/v1/apiservices/v3.projectcalico.org", nil)
	var service struct {
		Spec struct {
			Service *struct{ Namespace, Name string }
		}
	}
	if err == nil && json.Unmarshal(text, &service) == nil && service.Spec.Service != nil {
		d.found(statusFail, api.Group, "import what it has (caracalctl import --from-kubernetes), then kubectl delete apiservice v3.projectcalico.org",
			"another API server, %s/%s, serves these kinds: Calico's", printable(service.Spec.Service.Namespace), printable(service.Spec.Service.Name))
		return nil
	}
	want := map[string][]string{"caracal.dev/v1": ownResources}
	for _, k := range api.Kinds {
		if k.APIVersion == api.Group && k.Name != "Node" { // that is a CaracalNode
			want[k.APIVersion] = append(want[k.APIVersion], k.Plural)
		}
	}
	for _, version := range []string{"caracal.dev/v1", api.Group} {
		text, err := s.Raw(d.cmd.Context(), "/apis/"+version, nil)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		var served struct{ Resources []struct{ Name string } }
		if err == nil {
			if err := json.Unmarshal(text, &served); err != nil {
				return fmt.Errorf("/apis/%s: %w", version, err)
			}
		}
		var missing []string
		for _, name := range want[version] {
			if !slices.ContainsFunc(served.Resources, func(r struct{ Name string }) bool { return r.Name == name }) {
				missing = append(missing, name)
			}
		}
		if missing != nil {
			d.found(statusFail, version, "kubectl apply --server-side -f deploy/kubernetes/crds.yaml of this version", "the API does not know %s", strings.Join(missing, ", "))
		}
	}
	return nil
}

// right is what a rule of a ClusterRole allows: one verb on one resource.
type right struct{ verb, group, resource, namespace string }

// rights are all that the roles in manifests allow.
func rights(manifests []byte) ([]right, error) {
	var all []right
	for _, document := range strings.Split(string(manifests), "\n---") {
		var role struct {
			Kind     string
			Metadata struct{ Namespace string }
			Rules    []struct{ APIGroups, Resources, ResourceNames, Verbs []string }
		}
		if err := yaml.Unmarshal([]byte(document), &role); err != nil {
			return nil, err
		}
		if role.Kind != "ClusterRole" && role.Kind != "Role" {
			continue
		}
		for _, rule := range role.Rules {
			if rule.ResourceNames != nil {
				continue // it is asked about one object
			}
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					for _, verb := range rule.Verbs {
						all = append(all, right{verb, group, resource, role.Metadata.Namespace})
					}
				}
			}
		}
	}
	return all, nil
}

// wantRights asks the API of each right that the manifests give a node.
func (d *doctor) wantRights(s *kube.Store) error {
	all, err := rights(deploy.Roles)
	if err != nil {
		return err
	}
	missing := make(map[string][]string) // verbs by resource
	for _, r := range all {
		allowed, err := s.Allowed(d.cmd.Context(), r.verb, r.group, r.resource, r.namespace)
		if err != nil {
			return err
		}
		if !allowed {
			resource := strings.TrimSuffix(r.resource+"."+r.group, ".")
			missing[resource] = append(missing[resource], r.verb)
		}
	}
	for _, resource := range slices.Sorted(maps.Keys(missing)) {
		d.found(statusFail, resource, "kubectl apply -f deploy/kubernetes/rbac.yaml of this version, or ask as the node does (kubectl -n kube-system exec ds/caracal-node -- caracalctl doctor)",
			"the API does not allow us to %s it", strings.Join(missing[resource], ", "))
	}
	return nil
}

// nodeName is what this node is called: by its agent, or as an agent would call it.
func (d *doctor) nodeName() string {
	name, _ := os.Hostname()
	return cmp.Or(d.agent.Node, FromEnv("CARACAL_NODENAME", FromEnv("NODENAME", name)))
}

// wantNode makes sure that the Node of our name is this host.
func (d *doctor) wantNode(s *kube.Store) error {
	name := d.nodeName()
	text, err := s.Raw(d.cmd.Context(), "/api/v1/nodes/"+name, nil)
	if errors.Is(err, store.ErrNotFound) {
		d.found(statusFail, "node "+name, "kubelet --hostname-override and caracald --node-name must be the same; or the kubelet has not registered yet",
			"the cluster has no Node of this name: nothing of this host's pods or blocks is known")
		return nil
	}
	if err != nil {
		return err
	}
	var is struct {
		Status struct {
			Addresses []struct{ Type, Address string }
		}
	}
	if err := json.Unmarshal(text, &is); err != nil {
		return fmt.Errorf("Node %s: %w", name, err)
	}
	own, err := hostAddresses()
	if err != nil {
		return err
	}
	for _, a := range is.Status.Addresses {
		at, err := netip.ParseAddr(a.Address)
		if a.Type == "InternalIP" && err == nil && !slices.Contains(own, at.Unmap()) {
			d.found(statusFail, "node "+name, "is this another host of the same name? then rename one; or its address has changed: restart its kubelet",
				"its InternalIP %s is none of this host's", at)
		}
	}
	return nil
}

// wantProxy looks for what translates Services.
func (d *doctor) wantProxy() {
	client := http.Client{Timeout: d.timeout}
	answer, err := client.Get(proxyMode)
	if err != nil {
		d.found(statusWarn, "kube-proxy", "without one no pod reaches a Service's address; if one runs, let it listen there (metricsBindAddress) to be seen",
			"none answers on %s", proxyMode)
		return
	}
	defer answer.Body.Close()
	mode, _ := io.ReadAll(io.LimitReader(answer.Body, 32))
	switch m := strings.TrimSpace(string(mode)); m {
	case "iptables", "nftables":
	default:
		d.found(statusWarn, "kube-proxy", "mode: nftables, or iptables, in its configuration; Caracal is tried with these", "its mode is %q", printable(m))
	}
}
