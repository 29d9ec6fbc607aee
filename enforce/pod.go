package enforce

import (
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// MirrorAnnotation is on the Pod by which a kubelet shows one that it read from a file: the uid under which it runs it.
const MirrorAnnotation = "kubernetes.io/config.mirror"

// OfKubernetes tells whether an attachment says that it is a Pod's, of which labels and all else come from Kubernetes.
func OfKubernetes(e node.Endpoint) bool {
	return e.PodUID != "" && e.PodName != "" && api.ValidNamespace(e.PodNamespace) && e.Docker == nil
}

// podName is the full name of the Pod that an attachment is of.
func podName(e node.Endpoint) string { return e.PodNamespace + "/" + e.PodName }

// IsPod tells whether a resource is the Pod that an attachment is of, rather than one of the same name before or after it.
func IsPod(r *api.Resource, e node.Endpoint) bool {
	if r == nil || r.Metadata.FullName() != podName(e) {
		return false
	}
	return r.Metadata.UID == e.PodUID || r.Metadata.Annotations[MirrorAnnotation] == e.PodUID
}

// podPrefix is before the names of Pods among those of WorkloadEndpoints, of which none that an agent gives has a colon.
const podPrefix = "pod:"

// podID is how the model names the endpoint that a Pod of another node is.
func podID(meta api.Metadata) string { return meta.Namespace + "/" + podPrefix + meta.Name }

// cutPodID is the full name of the Pod of another node that an endpoint is. false: it is none.
func cutPodID(id string) (string, bool) {
	namespace, name, _ := strings.Cut(id, "/")
	name, is := strings.CutPrefix(name, podPrefix)
	return namespace + "/" + name, is
}

// PodEndpoint is the WorkloadEndpoint that a Pod of another node is. false: it has no address yet.
func PodEndpoint(r api.Resource) (api.Resource, bool) {
	pod, is := r.Spec.(*api.Pod)
	if !is || pod.Node == "" || len(pod.IPs) == 0 {
		return api.Resource{}, false
	}
	meta := r.Metadata
	meta.Name = podPrefix + meta.Name
	return api.Resource{Kind: endpointKind, Metadata: meta, Spec: &api.WorkloadEndpoint{
		Node: pod.Node, Orchestrator: "k8s", Pod: r.Metadata.Name, ServiceAccount: pod.ServiceAccount, IPNetworks: singles(pod.IPs), Ports: pod.Ports,
	}}, true
}

// nodeOf is the node that an endpoint is on, as the store has it: a WorkloadEndpoint, or a Pod.
func nodeOf(r *api.Resource) string {
	if r == nil {
		return ""
	}
	switch spec := r.Spec.(type) {
	case *api.WorkloadEndpoint:
		return spec.Node
	case *api.Pod:
		return spec.Node
	}
	return ""
}

// Awaits tells whether nothing can be said of a pod of this node before the Pod is heard of that it is of: where Kubernetes has the
// pods' labels. It has no policy until then, and what is in the maps of it stays.
func (p *Policy) Awaits(e node.Endpoint) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.model.awaits(e)
}

func (m *model) awaits(e node.Endpoint) bool {
	return m.kubernetes && OfKubernetes(e) && m.podOf(EndpointID(m.node, e), e) == nil
}

// podOf is the Pod that a pod of this node is of, nil: it was never heard of. One that Kubernetes has no more, or another of its name
// in the place of, counts as long as its containers are here.
func (m *model) podOf(id string, e node.Endpoint) *api.Resource {
	if r := m.pods[podName(e)]; IsPod(r, e) {
		return r
	}
	if r := m.left[id]; IsPod(r, e) {
		return r
	}
	return nil
}

// setPod makes a Pod another one.
func (m *model) setPod(was, now *api.Resource) error {
	r := now
	if r == nil {
		r = was
	}
	full := r.Metadata.FullName()
	m.pods[full] = now
	if now == nil {
		delete(m.pods, full)
	} else {
		m.kubernetes = true
	}
	err := m.place(podID(r.Metadata))
	for _, id := range m.ofPod[full] {
		if e := *m.local[id]; IsPod(was, e) && !IsPod(now, e) {
			m.left[id] = was
		}
		if err1 := m.place(id); err == nil {
			err = err1
		}
	}
	return err
}

// setLocal makes a pod of this node another one.
func (m *model) setLocal(id string, now *node.Endpoint) error {
	drop := func(other string) bool { return other == id }
	if was := m.local[id]; was != nil {
		if m.ofPod[podName(*was)] = slices.DeleteFunc(m.ofPod[podName(*was)], drop); len(m.ofPod[podName(*was)]) == 0 {
			delete(m.ofPod, podName(*was))
		}
	}
	m.local[id] = now
	if now == nil {
		delete(m.local, id)
		delete(m.left, id)
	} else {
		m.ofPod[podName(*now)] = append(m.ofPod[podName(*now)], id)
	}
	return m.place(id)
}
