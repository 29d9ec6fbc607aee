package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/api/selector"
)

// Group is the group and version of all resources. It is Calico's, whose YAML is read as it is.
const Group = "projectcalico.org/v3"

// ErrUnsupported says that a resource asks for something that Caracal does not do.
var ErrUnsupported = errors.New("not supported")

// Kind is a kind of resource.
type Kind struct {
	Name   string // "IPPool"
	Plural string // "ippools": in store keys and on the command line
	Short  []string
	new    func() Spec
}

// Kinds are all kinds that people write.
var Kinds = []Kind{
	{"IPPool", "ippools", []string{"pool", "pools"}, func() Spec { return &IPPool{} }},
	{"Node", "nodes", nil, func() Spec { return &Node{} }},
	{"BGPConfiguration", "bgpconfigurations", []string{"bgpconfig", "bgpconfigs"}, func() Spec { return &BGPConfiguration{} }},
	{"BGPPeer", "bgppeers", nil, func() Spec { return &BGPPeer{} }},
	{"BGPFilter", "bgpfilters", nil, func() Spec { return &BGPFilter{} }},
}

// FindKind finds a kind by its name, its plural or a short form, in any case.
func FindKind(word string) (Kind, error) {
	for _, k := range Kinds {
		names := append([]string{k.Name, k.Plural}, k.Short...)
		if slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, word) }) {
			return k, nil
		}
	}
	var known []string
	for _, k := range Kinds {
		known = append(known, k.Name)
	}
	return Kind{}, fmt.Errorf("kind %q: %w; known are %s", word, ErrUnsupported, strings.Join(known, ", "))
}

// Spec is what a kind says. Complete validates it and fills in defaults; name is the resource's.
type Spec interface {
	Complete(name string) error
}

// Metadata is a resource's name and what hangs on it.
type Metadata struct {
	Name        string            `json:"name"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Revision    string            `json:"resourceVersion,omitempty"` // of the store it was read from
	Created     string            `json:"creationTimestamp,omitempty"`
	UID         string            `json:"uid,omitempty"`
}

// Resource is one thing that people write: JSON or, by package manifest, YAML.
type Resource struct {
	Kind     Kind
	Metadata Metadata
	Spec     Spec
}

// String is the resource's kind and name.
func (r Resource) String() string { return r.Kind.Name + " " + r.Metadata.Name }

// envelope is a Resource as it is written.
type envelope struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Metadata   Metadata        `json:"metadata"`
	Spec       json.RawMessage `json:"spec"`
}

// MarshalJSON writes the resource with its apiVersion and kind.
func (r Resource) MarshalJSON() ([]byte, error) {
	spec, err := json.Marshal(r.Spec)
	if err != nil {
		return nil, err
	}
	return json.Marshal(envelope{Group, r.Kind.Name, r.Metadata, spec})
}

// UnmarshalJSON reads and completes a resource. A key that nobody knows is an error: a misspelt one would change nothing,
// silently. The error is ErrInvalid or ErrUnsupported.
func (r *Resource) UnmarshalJSON(data []byte) error {
	var e envelope
	if err := Strict(data, &e); err != nil {
		return err
	}
	if e.APIVersion != Group {
		return fmt.Errorf("apiVersion %q: %w; write %s", e.APIVersion, ErrUnsupported, Group)
	}
	kind, err := FindKind(e.Kind)
	if err != nil {
		return err
	}
	if !validName(e.Metadata.Name) {
		return fmt.Errorf("%s: %w: metadata.name %q: it must begin and end with a letter or digit and hold only lower case letters, digits, '-', '.' and ':'", kind.Name, ErrInvalid, e.Metadata.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(e.Metadata.Labels)) {
		if !selector.ValidKey(key) {
			return fmt.Errorf("%s %s: %w: metadata.labels %q: no selector could name it; a label's name has letters, digits and \"_./-\"", kind.Name, e.Metadata.Name, ErrInvalid, key)
		}
	}
	spec := kind.new()
	if len(e.Spec) > 0 {
		if err := Strict(e.Spec, spec); err != nil {
			return fmt.Errorf("%s %s: %w", kind.Name, e.Metadata.Name, err)
		}
	}
	if err := spec.Complete(e.Metadata.Name); err != nil {
		return fmt.Errorf("%s %s: %w", kind.Name, e.Metadata.Name, err)
	}
	*r = Resource{kind, e.Metadata, spec}
	return nil
}

// Strict decodes JSON in which every key must be known. The error is ErrInvalid.
func Strict(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something follows its end")
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %s", ErrInvalid, strings.TrimPrefix(err.Error(), "json: "))
	}
	return nil
}

// Selects tells whether a selector, in Calico's language, selects labels; "" is all. One that can't be read, and that Complete
// so refuses, selects nothing.
func Selects(text string, labels map[string]string) bool {
	s, err := selector.Parse(text)
	return err == nil && s.Matches(labels)
}

func checkSelector(key, text string) error {
	if _, err := selector.Parse(text); err != nil {
		return fmt.Errorf("%w: %s %q: %w", ErrInvalid, key, text, err)
	}
	return nil
}

func validName(s string) bool {
	if s == "" || len(s) > 253 {
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
