package kube

//go:generate go run ../tools/crds ../deploy/kubernetes/crds.yaml

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// kind is where the keys of some prefix lie in the API.
type kind struct {
	api      api.Kind // of its values; none of blocks and entries
	prefix   string   // of its keys: "/ippools/"
	version  schema.GroupVersion
	object   string // the kind of its objects: "CaracalNode"
	resource string // their plural: "caracalnodes"

	namespaced bool
	custom     bool   // a custom resource; else one of Kubernetes's own
	optional   bool   // it may not be served
	readOnly   bool   // it is others' business alone
	selector   string // of fields: which objects are asked for
}

// blocksPrefix begins the keys of address blocks.
const blocksPrefix = api.BlocksPrefix

// kinds are all but entries, whose prefix is everything else.
var kinds = func() []*kind {
	all := []*kind{{prefix: blocksPrefix, version: ownVersion, object: "AddressBlock", resource: "addressblocks", custom: true}}
	for _, a := range api.Kinds {
		version, err := schema.ParseGroupVersion(a.APIVersion)
		if err != nil {
			panic(err) // they are constants
		}
		k := &kind{api: a, prefix: a.Prefix(""), version: version, object: a.Name, resource: a.Plural, namespaced: a.Namespaced}
		switch version {
		case coreVersion:
			k.readOnly = a.Name == "Pod" || a.Name == "Service"
			if a.Name == "Pod" {
				k.selector = "status.phase!=Succeeded,status.phase!=Failed"
			}
		case networkVersion:
		case admin1Version, admin2Version:
			k.custom, k.optional = true, true
		default:
			k.custom = true
			if a.Name == "Node" { // Kubernetes has its own
				k.version, k.object, k.resource = ownVersion, "CaracalNode", "caracalnodes"
			}
		}
		all = append(all, k)
	}
	return append(all, entries)
}()

// entries are what is of no kind.
var entries = &kind{version: ownVersion, object: "Entry", resource: "entries", custom: true}

// nodes are Kubernetes's own, which are no keys.
var nodes = &kind{version: coreVersion, object: "Node", resource: "nodes"}

// String names the kind's resource as a ClusterRole does.
func (k *kind) String() string {
	if k.version.Group == "" {
		return k.resource
	}
	return k.resource + "." + k.version.Group
}

// name is the namespace and name of a key of the kind. ErrInvalid.
func (k *kind) name(key string) (namespace, name string, err error) {
	name = strings.TrimPrefix(key, k.prefix)
	if k.namespaced {
		var more bool
		if namespace, name, more = strings.Cut(name, "/"); !more || namespace == "" {
			return "", "", fmt.Errorf("%w: key %s names no namespace", store.ErrInvalid, key)
		}
	}
	if name == "" || strings.Contains(name, "/") || name == "." || name == ".." || strings.Contains(name, "%") {
		return "", "", fmt.Errorf("%w: key %s is no name of one of the %s", store.ErrInvalid, key, k)
	}
	if cidr, is := api.BlockOfKey(key); is && k.prefix == blocksPrefix {
		name = api.BlockObject(cidr)
	}
	return namespace, name, nil
}

// space is a store apart from the cluster's own resources: all of it are entries. "" is those resources.
type space string

// kind finds where a key lies.
func (s space) kind(key string) *kind {
	if s == "" {
		for _, k := range kinds[:len(kinds)-1] {
			if strings.HasPrefix(key, k.prefix) {
				return k
			}
		}
	}
	return entries
}

// covered are the kinds that may have keys which begin with prefix.
func (s space) covered(prefix string) []*kind {
	if s != "" {
		return []*kind{entries}
	}
	var all []*kind
	for _, k := range kinds {
		switch {
		case k != entries && strings.HasPrefix(prefix, k.prefix):
			return []*kind{k}
		case strings.HasPrefix(k.prefix, prefix) || k == entries:
			all = append(all, k)
		}
	}
	return all
}

// CustomResource is a kind of objects that the API serves because Caracal has defined it.
type CustomResource struct {
	Group, Version string
	Kind, Plural   string
	Short          []string
	Namespaced     bool
	Spec           any // an empty one
	Status         bool
}

// CustomResources are all there are.
func CustomResources() []CustomResource {
	var all []CustomResource
	for _, k := range kinds {
		if !k.custom || k.optional {
			continue
		}
		c := CustomResource{Group: k.version.Group, Version: k.version.Version, Kind: k.object, Plural: k.resource, Namespaced: k.namespaced}
		switch {
		case k == entries:
			c.Spec = &entrySpec{}
		case k.prefix == blocksPrefix:
			c.Spec, c.Short = &claim{}, []string{"block", "blocks"}
		default:
			c.Spec, c.Short, c.Status = k.api.NewSpec(), k.api.Short, k.api.Name != "WorkloadEndpoint"
		}
		all = append(all, c)
	}
	return all
}
