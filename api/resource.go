package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api/selector"
)

// Group is the group and version of most resources. It is Calico's, whose YAML is read as it is.
const Group = "projectcalico.org/v3"

// The other groups and versions: those of Kubernetes.
const (
	coreGroup    = "v1"
	networkGroup = "networking.k8s.io/v1"
	adminGroup   = "policy.networking.k8s.io/v1alpha1"
	clusterGroup = "policy.networking.k8s.io/v1alpha2"
)

// DefaultNamespace is where a resource is that says no namespace.
const DefaultNamespace = "default"

// Limits of names, in bytes, as Kubernetes has them.
const (
	maxName      = 253
	maxNamespace = 63
)

// ErrUnsupported says that a resource asks for something that Caracal does not do.
var ErrUnsupported = errors.New("not supported")

// Kind is a kind of resource. Two may have the same name; their groups tell them apart.
type Kind struct {
	Name       string // "IPPool"
	Plural     string // "ippools"
	Short      []string
	APIVersion string // group and version: "projectcalico.org/v3"
	Namespaced bool   // true: a name is one of a namespace
	new        func() Spec
}

// Kinds are all kinds there are. People write all of them but WorkloadEndpoint, which the agents do, and Pod and Service, which
// are read from Kubernetes alone.
var Kinds = []Kind{
	{"IPPool", "ippools", []string{"pool", "pools"}, Group, false, func() Spec { return &IPPool{} }},
	{"Node", "nodes", nil, Group, false, func() Spec { return &Node{} }},
	{"BGPConfiguration", "bgpconfigurations", []string{"bgpconfig", "bgpconfigs"}, Group, false, func() Spec { return &BGPConfiguration{} }},
	{"BGPPeer", "bgppeers", nil, Group, false, func() Spec { return &BGPPeer{} }},
	{"BGPFilter", "bgpfilters", nil, Group, false, func() Spec { return &BGPFilter{} }},
	{"NetworkPolicy", "networkpolicies", []string{"netpol"}, networkGroup, true, func() Spec { return &NetworkPolicy{} }},
	{"NetworkPolicy", "networkpolicies", []string{"np"}, Group, true, func() Spec { return &CalicoNetworkPolicy{} }},
	{"GlobalNetworkPolicy", "globalnetworkpolicies", []string{"gnp", "gnps"}, Group, false, func() Spec { return &GlobalNetworkPolicy{} }},
	{"NetworkSet", "networksets", []string{"netset", "netsets"}, Group, true, func() Spec { return &NetworkSet{} }},
	{"GlobalNetworkSet", "globalnetworksets", []string{"gns"}, Group, false, func() Spec { return &NetworkSet{} }},
	{"Tier", "tiers", nil, Group, false, func() Spec { return &Tier{} }},
	{"Profile", "profiles", nil, Group, false, func() Spec { return &Profile{} }},
	{"WorkloadEndpoint", "workloadendpoints", []string{"wep", "weps"}, Group, true, func() Spec { return &WorkloadEndpoint{} }},
	{"Namespace", "namespaces", []string{"ns"}, coreGroup, false, func() Spec { return &Namespace{} }},
	{"ServiceAccount", "serviceaccounts", []string{"sa"}, coreGroup, true, func() Spec { return &ServiceAccount{} }},
	{"Pod", "pods", []string{"po"}, coreGroup, true, func() Spec { return &Pod{} }},
	{"Service", "services", []string{"svc"}, coreGroup, true, func() Spec { return &Service{} }},
	{"AdminNetworkPolicy", "adminnetworkpolicies", []string{"anp"}, adminGroup, false, func() Spec { return &AdminNetworkPolicy{} }},
	{"BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies", []string{"banp"}, adminGroup, false, func() Spec { return &BaselineAdminNetworkPolicy{} }},
	{"ClusterNetworkPolicy", "clusternetworkpolicies", []string{"cnp"}, clusterGroup, false, func() Spec { return &ClusterNetworkPolicy{} }},
}

// Word is the one word that no other kind has, on the command line and in store keys: "ippools",
// "networkpolicies.networking.k8s.io". A group is part of it where it is neither Calico's nor the core's.
func (k Kind) Word() string {
	if group := k.group(); group != "" && k.APIVersion != Group {
		return k.Plural + "." + group
	}
	return k.Plural
}

// NewSpec is an empty one of what the kind says.
func (k Kind) NewSpec() Spec { return k.new() }

func (k Kind) group() string {
	group, _, named := strings.Cut(k.APIVersion, "/")
	if !named {
		return ""
	}
	return group
}

// String is the kind's name, with its group if an earlier kind has the same: "NetworkPolicy.projectcalico.org".
func (k Kind) String() string {
	for _, other := range Kinds {
		if other.Name == k.Name && other.APIVersion != k.APIVersion {
			return k.Name + "." + k.group()
		}
		if other.Name == k.Name {
			break
		}
	}
	return k.Name
}

// Prefix is what the keys in the store begin with of all resources of the kind, or of those of a namespace.
func (k Kind) Prefix(namespace string) string {
	if namespace != "" {
		namespace += "/"
	}
	return "/" + k.Word() + "/" + namespace
}

// Key is where a resource lies in the store. Namespace is "" for a kind without.
func (k Kind) Key(namespace, name string) string { return k.Prefix(namespace) + name }

// FindKinds finds the kinds that a word names: their name, plural or a short form, in any case, or one of the first two with the
// group behind it ("networkpolicies.projectcalico.org").
func FindKinds(word string) ([]Kind, error) {
	var found []Kind
	var known []string
	for _, k := range Kinds {
		if k.named(word) {
			found = append(found, k)
		}
	}
	if len(found) == 0 {
		for _, k := range Kinds {
			known = append(known, k.Name)
		}
		known = slices.Compact(known)
		return nil, fmt.Errorf("kind %.80q: %w; known are %s", word, ErrUnsupported, strings.Join(known, ", "))
	}
	return found, nil
}

func (k Kind) named(word string) bool {
	is := func(name string) bool { return strings.EqualFold(name, word) }
	if is(k.Name) || is(k.Plural) || slices.ContainsFunc(k.Short, is) {
		return true
	}
	name, group, qualified := strings.Cut(word, ".")
	return qualified && strings.EqualFold(group, k.group()) && (strings.EqualFold(name, k.Name) || strings.EqualFold(name, k.Plural))
}

// FindKind is FindKinds for a word that must name one.
func FindKind(word string) (Kind, error) {
	found, err := FindKinds(word)
	if err != nil {
		return Kind{}, err
	}
	if len(found) > 1 {
		var words []string
		for _, k := range found {
			words = append(words, k.Plural+"."+k.group())
		}
		return Kind{}, fmt.Errorf("kind %q: %w: it may be any of %s; write which", word, ErrInvalid, strings.Join(words, ", "))
	}
	return found[0], nil
}

// Spec is what a kind says. Complete validates it and fills in defaults; name is the resource's.
type Spec interface {
	Complete(name string) error
}

// Metadata is a resource's name and what hangs on it.
type Metadata struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace,omitempty"` // of a namespaced kind only; where none was written, "default"
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Revision    string            `json:"resourceVersion,omitempty"` // of the store it was read from
	Created     string            `json:"creationTimestamp,omitempty"`
	UID         string            `json:"uid,omitempty"`
}

// FullName is the name, behind its namespace if it has one: "web/allow".
func (m Metadata) FullName() string {
	if m.Namespace == "" {
		return m.Name
	}
	return m.Namespace + "/" + m.Name
}

// Resource is one thing that people write: JSON or, by package manifest, YAML.
type Resource struct {
	Kind     Kind
	Metadata Metadata
	Spec     Spec
}

// String is the resource's kind, namespace and name: "NetworkPolicy web/allow".
func (r Resource) String() string { return r.Kind.String() + " " + r.Metadata.FullName() }

// Key is where the resource lies in the store.
func (r Resource) Key() string { return r.Kind.Key(r.Metadata.Namespace, r.Metadata.Name) }

// envelope is a Resource as it is written.
type envelope struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   Metadata        `json:"metadata"`
	Spec       json.RawMessage `json:"spec"`
}

// exported is a Resource as it is read: what an API server adds to one is dropped.
type exported struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Spec       json.RawMessage `json:"spec"`
	Status     json.RawMessage `json:"status"`
	Metadata   struct {
		Metadata
		Generation        json.RawMessage `json:"generation"`
		ManagedFields     json.RawMessage `json:"managedFields"`
		OwnerReferences   json.RawMessage `json:"ownerReferences"`
		Finalizers        json.RawMessage `json:"finalizers"`
		SelfLink          json.RawMessage `json:"selfLink"`
		DeletionTimestamp json.RawMessage `json:"deletionTimestamp"`
	} `json:"metadata"`

	// Of a ServiceAccount, which has no spec.
	Secrets          json.RawMessage `json:"secrets"`
	ImagePullSecrets json.RawMessage `json:"imagePullSecrets"`
	AutomountToken   json.RawMessage `json:"automountServiceAccountToken"`
}

// MarshalJSON writes the resource with its apiVersion and kind.
func (r Resource) MarshalJSON() ([]byte, error) {
	spec, err := json.Marshal(r.Spec)
	if err != nil {
		return nil, err
	}
	return json.Marshal(envelope{r.Kind.APIVersion, r.Kind.Name, r.Metadata, spec})
}

// UnmarshalJSON reads and completes a resource. The error is ErrInvalid or ErrUnsupported; where it is one field's, there is
// a *FieldError in it.
func (r *Resource) UnmarshalJSON(data []byte) error {
	var e exported
	if err := Strict(data, &e); err != nil {
		return err
	}
	kind, err := e.kind()
	if err != nil {
		return err
	}
	read := Resource{kind, e.Metadata.Metadata, kind.new()}
	if err := read.Metadata.complete(kind); err != nil {
		return fmt.Errorf("%s %.80s: %w", kind, read.Metadata.FullName(), at("metadata", err))
	}
	if len(e.Spec) > 0 {
		err = Strict(e.Spec, read.Spec)
	}
	if err == nil {
		err = read.Spec.Complete(read.Metadata.Name)
	}
	if field := new(FieldError); errors.As(err, &field) {
		err = at("spec", err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", read, err)
	}
	*r = read
	return nil
}

// kind finds the kind of what was read.
func (e *exported) kind() (Kind, error) {
	kinds, err := FindKinds(e.Kind)
	if err != nil {
		return Kind{}, at("kind", err)
	}
	var versions []string
	for _, k := range kinds {
		if k.Name != "ServiceAccount" && (e.Secrets != nil || e.ImagePullSecrets != nil || e.AutomountToken != nil) {
			return Kind{}, fmt.Errorf("%s: %w: unknown field: secrets, imagePullSecrets and automountServiceAccountToken are a ServiceAccount's", k, ErrInvalid)
		}
		if k.APIVersion == e.APIVersion {
			return k, nil
		}
		versions = append(versions, k.APIVersion)
	}
	return Kind{}, at("apiVersion", fmt.Errorf("%.80q: %w for %s; write %s", e.APIVersion, ErrUnsupported, kinds[0].Name, strings.Join(versions, " or ")))
}

// complete validates the metadata of a resource.
func (m *Metadata) complete(kind Kind) error {
	switch {
	case !validName(m.Name):
		return invalid("name", "%.80q: it must begin and end with a letter or digit and hold only lower case letters, digits, '-', '.' and ':'", m.Name)
	case !kind.Namespaced && m.Namespace != "":
		return invalid("namespace", "a %s is in no namespace; leave it out", kind)
	case kind.Namespaced && m.Namespace == "":
		m.Namespace = DefaultNamespace
	case kind.Namespaced && !ValidNamespace(m.Namespace):
		return invalid("namespace", "%.80q: it must begin and end with a letter or digit and hold only lower case letters, digits and '-', at most %d", m.Namespace, maxNamespace)
	}
	for _, key := range slices.Sorted(maps.Keys(m.Labels)) {
		if !selector.ValidKey(key) {
			return invalid("labels", "%.80q: no selector could name it; a label's name has letters, digits and \"_./-\"", key)
		}
	}
	return nil
}

// ValidNamespace tells whether a namespace can have that name (RFC 1123's label).
func ValidNamespace(s string) bool {
	return validName(s) && len(s) <= maxNamespace && !strings.ContainsAny(s, ".:")
}

// Selects tells whether a selector, in Calico's language, selects labels; "" is all. One that can't be read, and that Complete
// so refuses, selects nothing.
func Selects(text string, labels map[string]string) bool {
	s, err := selector.Parse(text)
	return err == nil && s.Matches(labels)
}

func checkSelector(key, text string) error {
	if _, err := selector.Parse(text); err != nil {
		return fmt.Errorf("%w: %s %.80q: %w", ErrInvalid, key, text, err)
	}
	return nil
}

func validName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for i, r := range s {
		alphanumeric := r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		if !alphanumeric && (i == 0 || i == len(s)-1 || !strings.ContainsRune("-.:", r)) {
			return false
		}
	}
	return true
}
