package kube

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

const (
	// annotationPrefix begins the annotations that are for a network.
	annotationPrefix = "cni.projectcalico.org/"
	// podIPsAnnotation are a pod's addresses as its node's agent announces them, before its kubelet does.
	podIPsAnnotation = annotationPrefix + "podIPs"
	// spaceLabel is on each entry and says of which space it is.
	spaceLabel = "caracal.dev/space"
	// appliedAnnotation is what kubectl apply remembers of its file: the resource once more.
	appliedAnnotation = "kubectl.kubernetes.io/last-applied-configuration"
)

// read is what the store says of an object; false when that is nothing: a pod on its node's own network, an entry of another space.
func (s space) read(k *kind, o runtime.Object) (kv store.KV, there bool, err error) {
	m, err := meta.Accessor(o)
	if err != nil {
		return kv, false, err
	}
	if kv.Revision, err = revision(m.GetResourceVersion()); err != nil {
		return kv, false, err
	}
	if e, ok := o.(*object); ok && k == entries {
		kv.Key, kv.Value, there = s.entry(e)
		return kv, there, nil
	}
	kv.Key = k.prefix + m.GetName()
	if k.namespaced {
		kv.Key = k.prefix + m.GetNamespace() + "/" + m.GetName()
	}
	if cidr, is := api.BlockOfObject(m.GetName()); is && k.prefix == blocksPrefix { // whatever it says
		kv.Key = api.BlockKey(cidr)
	}
	kv.Value, there, err = k.value(m, o)
	return kv, there, err
}

// revision reads a resourceVersion.
func revision(text string) (store.Revision, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("the Kubernetes API says resourceVersion %.80q, which is no number", text)
	}
	return store.Revision(n), nil
}

// value is an object's value in the store.
func (k *kind) value(m metav1.Object, o runtime.Object) (value []byte, there bool, err error) {
	r := api.Resource{Kind: k.api, Metadata: api.Metadata{Name: m.GetName(), Namespace: m.GetNamespace(), Labels: m.GetLabels()}}
	switch o := o.(type) {
	case *corev1.Pod:
		if ended(o) || o.Spec.HostNetwork {
			return nil, false, nil
		}
		r.Metadata.UID, r.Metadata.Annotations = string(o.UID), ours(o.Annotations)
		r.Metadata.Created = o.CreationTimestamp.UTC().Format(time.RFC3339)
		r.Spec = pod(o)
	case *corev1.Service:
		r.Spec = service(o)
	case *corev1.Namespace:
		r.Metadata.Annotations = ours(o.Annotations)
		r.Spec = &api.Namespace{}
	case *corev1.ServiceAccount:
		r.Spec = &api.ServiceAccount{}
	case *networkingv1.NetworkPolicy:
		spec, err := json.Marshal(o.Spec)
		if err != nil {
			return nil, false, err
		}
		return resource(r, o.Annotations, spec)
	case *object:
		if k.prefix == blocksPrefix {
			return block(o.Spec)
		}
		return resource(r, o.Annotations, o.Spec)
	default:
		return nil, false, fmt.Errorf("%T is none of the %s", o, k)
	}
	value, err = json.Marshal(r)
	return value, true, err
}

// resource is the value of a resource whose spec people have written. What can't be read stays as it is, for who reads the value to
// say what is wrong with it.
func resource(r api.Resource, annotations map[string]string, spec json.RawMessage) (value []byte, there bool, err error) {
	r.Metadata.Annotations = make(map[string]string)
	for key, v := range annotations {
		if key != appliedAnnotation {
			r.Metadata.Annotations[key] = v
		}
	}
	if len(spec) == 0 {
		spec = json.RawMessage("{}")
	}
	written, err := json.Marshal(struct {
		APIVersion string          `json:"apiVersion"`
		Kind       string          `json:"kind"`
		Metadata   api.Metadata    `json:"metadata"`
		Spec       json.RawMessage `json:"spec"`
	}{r.Kind.APIVersion, r.Kind.Name, r.Metadata, spec})
	if err != nil {
		return nil, false, err
	}
	var canonical api.Resource
	if json.Unmarshal(written, &canonical) != nil {
		return written, true, nil
	}
	value, err = json.Marshal(canonical)
	return value, true, err
}

// ours are the annotations that are for a network, and that by which a pod which a kubelet runs from a file is known.
func ours(annotations map[string]string) map[string]string {
	var all map[string]string
	for key, v := range annotations {
		if strings.HasPrefix(key, annotationPrefix) || key == corev1.MirrorPodAnnotationKey {
			if all == nil {
				all = make(map[string]string)
			}
			all[key] = v
		}
	}
	return all
}

// ended tells whether a pod has ended: its addresses may be another's already.
func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func pod(p *corev1.Pod) *api.Pod {
	out := &api.Pod{Node: p.Spec.NodeName, ServiceAccount: p.Spec.ServiceAccountName}
	add := func(text string) {
		text, _, _ = strings.Cut(strings.TrimSpace(text), "/") // Calico writes 10.0.0.1/32
		a, err := netip.ParseAddr(text)
		if err == nil && a.Zone() == "" && !slices.Contains(out.IPs, a.Unmap()) {
			out.IPs = append(out.IPs, a.Unmap())
		}
	}
	for _, a := range p.Status.PodIPs {
		add(a.IP)
	}
	if out.Announced = len(out.IPs) == 0; out.Announced { // whoever may make pods can write annotations, the status only kubelets
		for text := range strings.SplitSeq(p.Annotations[podIPsAnnotation], ",") {
			add(text)
		}
		out.Announced = len(out.IPs) > 0
	}
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for _, c := range list {
			for _, port := range c.Ports {
				if number, proto, ok := portOf(port.ContainerPort, port.Protocol); ok && port.Name != "" {
					out.Ports = append(out.Ports, api.EndpointPort{Name: port.Name, Protocol: proto, Port: number})
				}
			}
		}
	}
	return out
}

// portOf is a port of the API; false when it is none.
func portOf(port int32, protocol corev1.Protocol) (uint16, api.Protocol, bool) {
	number := uint16(port)
	if int32(number) != port || number == 0 {
		return 0, 0, false
	}
	switch protocol {
	case corev1.ProtocolTCP, "":
		return number, api.TCP, true
	case corev1.ProtocolUDP:
		return number, api.UDP, true
	case corev1.ProtocolSCTP:
		return number, api.SCTP, true
	}
	return 0, 0, false
}

func service(s *corev1.Service) *api.Service {
	out := &api.Service{}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return out
	}
	add := func(text string) {
		a, err := netip.ParseAddr(text) // "None" is that of a headless one; :: would be any of the host's own
		if err == nil && a.Zone() == "" && !a.IsUnspecified() && !slices.Contains(out.IPs, a.Unmap()) {
			out.IPs = append(out.IPs, a.Unmap())
		}
	}
	for _, text := range slices.Concat([]string{s.Spec.ClusterIP}, s.Spec.ClusterIPs, s.Spec.ExternalIPs) {
		add(text)
	}
	for _, i := range s.Status.LoadBalancer.Ingress {
		if i.IPMode == nil || *i.IPMode == corev1.LoadBalancerIPModeVIP { // else nodes send it to the load balancer
			add(i.IP)
		}
	}
	for _, p := range s.Spec.Ports {
		number, proto, ok := portOf(p.Port, p.Protocol)
		if !ok {
			continue
		}
		node, _, _ := portOf(p.NodePort, p.Protocol)
		out.Ports = append(out.Ports, api.ServicePort{Name: p.Name, Protocol: proto, Port: number, NodePort: node})
	}
	return out
}

// claim is what a block's value says; it is the agent's.
type claim struct {
	CIDR string `json:"cidr"`
	Pool string `json:"pool"`
	Node string `json:"node"`
}

// block is the value of a block, its keys in the order in which the agent writes them.
func block(spec json.RawMessage) (value []byte, there bool, err error) {
	var c claim
	d := json.NewDecoder(bytes.NewReader(spec))
	d.DisallowUnknownFields()
	if len(spec) > 0 && d.Decode(&c) != nil {
		return append([]byte{}, spec...), true, nil
	}
	value, err = json.Marshal(c)
	return value, true, err
}

// entrySpec is what an entry says.
type entrySpec struct {
	Prefix string `json:"prefix,omitempty"` // the space's
	Key    string `json:"key"`
	Value  []byte `json:"value"`
}

// entry is a key of the space; false when it is of another.
func (s space) entry(o *object) (key string, value []byte, there bool) {
	var e entrySpec
	if json.Unmarshal(o.Spec, &e) != nil || e.Prefix != string(s) || o.Name != s.entryName(e.Key) {
		return "", nil, false // nobody of ours wrote it
	}
	if e.Value == nil {
		e.Value = []byte{}
	}
	return e.Key, e.Value, true
}

// entryName is the name of a key's object: keys have characters that names have not.
func (s space) entryName(key string) string {
	sum := sha256.Sum256([]byte(string(s) + "\x00" + key))
	return hex.EncodeToString(sum[:16])
}

// label is the space's, by which its entries are found.
func (s space) label() string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}

// written is what of an object a value says.
type written struct {
	Labels      map[string]string
	Annotations map[string]string
	Spec        json.RawMessage // nil: the kind's objects have none, or none of ours
	Node        string          // whose end is the object's end; "": none's
}

// write is what the object of a key says for a value. ErrInvalid.
func (s space) write(k *kind, key, name string, value []byte) (w written, err error) {
	switch {
	case k.readOnly:
		return w, fmt.Errorf("%w: %s are Kubernetes's own; change them by kubectl", store.ErrInvalid, k)
	case k == entries:
		w.Labels = map[string]string{spaceLabel: s.label()}
		w.Spec, err = json.Marshal(entrySpec{string(s), key, append([]byte{}, value...)}) // nil would be null
		return w, err
	case k.prefix == blocksPrefix:
		var c claim
		if err := api.Strict(value, &c); err != nil {
			return w, fmt.Errorf("%w: %s: %w", store.ErrInvalid, key, err)
		}
		w.Spec, w.Node = value, c.Node
		return w, nil
	}
	var r api.Resource
	if err := json.Unmarshal(value, &r); err != nil {
		return w, fmt.Errorf("%w: %s: %w", store.ErrInvalid, key, err)
	}
	if r.Key() != key {
		return w, fmt.Errorf("%w: %s can't hold %s", store.ErrInvalid, key, r)
	}
	w.Labels, w.Annotations = r.Metadata.Labels, r.Metadata.Annotations
	switch r.Spec.(type) {
	case *api.Namespace, *api.ServiceAccount: // of which Kubernetes says more than we know
		return w, nil
	case *api.Node:
		w.Node = name
	}
	w.Spec, err = json.Marshal(r.Spec)
	return w, err
}
