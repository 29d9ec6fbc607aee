package enforce

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/node"
)

// EndpointName is the name of the WorkloadEndpoint that a node's agent publishes for an attachment. What a resource's name can't
// have is left out of its readable part; a hash of all tells apart what is alike then.
func EndpointName(nodeName string, k node.Key) string {
	sum := sha256.Sum256([]byte(nodeName + "/" + k.String()))
	return strings.Join([]string{part(nodeName, 100), part(k.ContainerID, 16), part(k.IfName, 15), hex.EncodeToString(sum[:5])}, "-")
}

// part is what of s a resource's name can have anywhere, at most n characters, at least one.
func part(s string, n int) string {
	kept := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(s))
	return cmp.Or(kept[:min(n, len(kept))], "x")
}

// EndpointID is how the model names the endpoint of an attachment: namespace and name of its WorkloadEndpoint.
func EndpointID(nodeName string, e node.Endpoint) string {
	return namespace(e) + "/" + EndpointName(nodeName, e.Key)
}

// namespace is that of a pod, or "default" where its runtime names none.
func namespace(e node.Endpoint) string {
	if api.ValidNamespace(e.PodNamespace) {
		return e.PodNamespace
	}
	return api.DefaultNamespace
}

// Endpoint is the WorkloadEndpoint of a node's attachment: what the node recorded of it, and what the store says of it besides. That
// is a Pod, which has the labels; or its WorkloadEndpoint, to which people have added labels, profiles (of a pod that brings
// none), names of ports, a service account. said is nil where the store has neither.
func Endpoint(nodeName string, e node.Endpoint, said *api.Resource) api.Resource {
	r := api.Resource{Kind: endpointKind, Metadata: api.Metadata{
		Name: EndpointName(nodeName, e.Key), Namespace: namespace(e), Labels: make(map[string]string),
	}}
	spec := &api.WorkloadEndpoint{
		Node: nodeName, Orchestrator: "cni", Workload: e.Network, Pod: e.PodName, ContainerID: e.ContainerID, Endpoint: e.IfName, InterfaceName: e.HostIfName, MAC: e.MAC,
	}
	if e.PodName != "" && e.PodNamespace != "" {
		spec.Orchestrator = "k8s"
	}
	if e.Docker != nil {
		spec.Orchestrator, spec.Workload = "libnetwork", cmp.Or(e.Docker.Network, e.Network)
		spec.ContainerID = cmp.Or(e.Docker.Container, e.ContainerID)
	}
	if !e.Created.IsZero() {
		r.Metadata.Created = e.Created.UTC().Format(time.RFC3339)
	}
	var own []string
	pod, ofKubernetes := podSpec(said)
	for key, value := range e.Labels {
		if selector.ValidKey(key) && !ofKubernetes {
			r.Metadata.Labels[key] = value
			own = append(own, key)
		}
	}
	slices.Sort(own)
	if ofKubernetes {
		r.Metadata.Labels, spec.ServiceAccount, spec.Ports = said.Metadata.Labels, pod.ServiceAccount, pod.Ports
	}
	if have, ok := specOf(said); ok {
		given := strings.Split(said.Metadata.Annotations[labelsAnnotation], ",")
		for key, value := range said.Metadata.Labels {
			if _, ours := r.Metadata.Labels[key]; !ours && !slices.Contains(given, key) {
				r.Metadata.Labels[key] = value
			}
		}
		r.Metadata.Annotations = make(map[string]string)
		for key, value := range said.Metadata.Annotations {
			r.Metadata.Annotations[key] = value
		}
		delete(r.Metadata.Annotations, labelsAnnotation)
		spec.ServiceAccount, spec.Profiles, spec.Ports = have.ServiceAccount, have.Profiles, have.Ports
	}
	if len(e.Profiles) > 0 {
		spec.Profiles = slices.Clone(e.Profiles)
	}
	if len(own) > 0 {
		if r.Metadata.Annotations == nil {
			r.Metadata.Annotations = make(map[string]string)
		}
		r.Metadata.Annotations[labelsAnnotation] = strings.Join(own, ",")
	}
	spec.IPNetworks = singles(e.Addrs)
	r.Spec = spec
	return r
}

// singles are addresses as networks.
func singles(addrs []netip.Addr) []api.Net {
	var nets []api.Net
	for _, a := range addrs {
		nets = append(nets, api.Net{Prefix: netip.PrefixFrom(a, a.BitLen())})
	}
	return nets
}

// labelsAnnotation is on a WorkloadEndpoint: the names of the labels that the pod brought itself, between commas. One that it
// does not bring any more is taken away again; what people added stays.
const labelsAnnotation = "caracal.dev/labels"

var endpointKind = func() api.Kind {
	k, err := api.FindKind("WorkloadEndpoint")
	if err != nil {
		panic(err) // it is in api.Kinds
	}
	return k
}()

func specOf(r *api.Resource) (*api.WorkloadEndpoint, bool) {
	if r == nil {
		return nil, false
	}
	spec, ok := r.Spec.(*api.WorkloadEndpoint)
	return spec, ok
}

func podSpec(r *api.Resource) (*api.Pod, bool) {
	if r == nil {
		return nil, false
	}
	spec, ok := r.Spec.(*api.Pod)
	return spec, ok
}
