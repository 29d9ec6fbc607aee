package kube

import (
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

// The groups and versions that are asked for.
var (
	coreVersion    = corev1.SchemeGroupVersion
	networkVersion = networkingv1.SchemeGroupVersion
	calicoVersion  = schema.GroupVersion{Group: "projectcalico.org", Version: "v3"}
	ownVersion     = schema.GroupVersion{Group: "caracal.dev", Version: "v1"}
	admin1Version  = schema.GroupVersion{Group: "policy.networking.k8s.io", Version: "v1alpha1"}
	admin2Version  = schema.GroupVersion{Group: "policy.networking.k8s.io", Version: "v1alpha2"}

	versions = []schema.GroupVersion{coreVersion, networkVersion, calicoVersion, ownVersion, admin1Version, admin2Version}
)

// object is a custom resource, of whatever kind. What it says stays JSON.
type object struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              json.RawMessage `json:"spec,omitempty"`
	Status            json.RawMessage `json:"status,omitempty"`
}

func (o *object) DeepCopyObject() runtime.Object {
	c := *o
	o.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return &c
}

// objects is a list of custom resources of one kind.
type objects struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []object `json:"items"`
}

func (l *objects) DeepCopyObject() runtime.Object {
	c := *l
	return &c
}

// scheme has the few types that are asked for: the whole of client-go's own would be some megabytes for nothing.
var scheme = func() *runtime.Scheme {
	scheme := runtime.NewScheme()
	scheme.AddKnownTypes(coreVersion,
		&corev1.Pod{}, &corev1.PodList{}, &corev1.Namespace{}, &corev1.NamespaceList{}, &corev1.ServiceAccount{}, &corev1.ServiceAccountList{},
		&corev1.Service{}, &corev1.ServiceList{}, &corev1.Node{}, &corev1.NodeList{}, &corev1.Event{})
	scheme.AddKnownTypes(networkVersion, &networkingv1.NetworkPolicy{}, &networkingv1.NetworkPolicyList{})
	for _, k := range kinds {
		if k.custom {
			scheme.AddKnownTypeWithName(k.version.WithKind(k.object), &object{})
			scheme.AddKnownTypeWithName(k.version.WithKind(k.object+"List"), &objects{})
		}
	}
	for _, v := range versions {
		metav1.AddToGroupVersion(scheme, v)
	}
	return scheme
}()

var codecs = serializer.NewCodecFactory(scheme).WithoutConversion()

// newObject is an empty object of the kind, to decode into.
func (k *kind) newObject() runtime.Object { return k.empty(k.object) }

// newList is an empty list of the kind's objects, to decode into.
func (k *kind) newList() runtime.Object { return k.empty(k.object + "List") }

func (k *kind) empty(name string) runtime.Object {
	o, err := scheme.New(k.version.WithKind(name))
	if err != nil {
		panic(err) // the scheme has every kind
	}
	return o
}
