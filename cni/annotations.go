package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// AnnotationPrefix begins the names of Calico's annotations of pods and namespaces of Kubernetes's.
const AnnotationPrefix = "cni.projectcalico.org/"

// Those that are read here. A list is one of JSON.
const (
	annotationIPs    = AnnotationPrefix + "ipAddrs"   // addresses
	annotationMAC    = AnnotationPrefix + "hwAddr"    // MAC address
	annotationPools4 = AnnotationPrefix + "ipv4pools" // names or CIDRs; also a namespace's, for pods that say nothing
	annotationPools6 = AnnotationPrefix + "ipv6pools" // likewise
)

// unsupported are annotations without which a pod would not be what somebody wants.
var unsupported = []struct{ name, instead string }{
	{AnnotationPrefix + "ipAddrsNoIpam", "an address outside all pools is no pod's here; ask for one of a pool (" + annotationIPs + ")"},
	{AnnotationPrefix + "floatingIPs", "a pod has one address of each family; have a Service give it another"},
}

// Annotations are those of a pod of Kubernetes's.
type Annotations map[string]string

// list reads an annotation that is a list of what is named; nil: there is none.
func (a Annotations) list(name, what, example string) ([]string, error) {
	text, ok := a[name]
	if !ok {
		return nil, nil
	}
	var list []string
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return nil, fail(codeConfig, `annotation %s: %.80q is not a JSON list of %s such as [%q]`, name, text, what, example)
	}
	return list, nil
}

// check refuses what is not done.
func (a Annotations) check() error {
	for _, u := range unsupported {
		if text, ok := a[u.name]; ok && text != "[]" {
			return fail(codeConfig, "annotation %s is not supported: %s", u.name, u.instead)
		}
	}
	return nil
}

// AnnotatedPools are the pools that annotations of a pod or a namespace name. The error is an *Error.
func AnnotatedPools(a Annotations) (only ipam.Only, err error) {
	if only.V4, err = a.list(annotationPools4, "pools", "default-ipv4-ippool"); err == nil {
		only.V6, err = a.list(annotationPools6, "pools", "default-ipv6-ippool")
	}
	return only, err
}

// annotationPatience is how long an agent that listens is given to find a pod's annotations. It waits less itself.
const annotationPatience = 2 * time.Second

// PodQuestion is what an agent is asked of a pod of Kubernetes's: what it knows of its annotations.
type PodQuestion struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// PodAnswer is what it knows. Found: it has heard of the pod.
type PodAnswer struct {
	Found       bool        `json:"found"`
	Annotations Annotations `json:"annotations,omitempty"`
}

// findAnnotations asks the node's agent for the pod's annotations where the runtime does not send them: it does not for a
// network that does not declare the capability, and Calico's does not. A pod that nobody can tell of has none.
func (a *adding) findAnnotations(ctx context.Context) {
	q := PodQuestion{a.env.Args["K8S_POD_NAMESPACE"], a.env.Args["K8S_POD_NAME"], a.env.Args["K8S_POD_UID"]}
	if !a.c.ownIPAM() || a.c.RuntimeConfig.PodAnnotations != nil || q.Namespace == "" || q.Name == "" || q.UID == "" {
		return
	}
	body, err := query(ctx, a.c.AgentSocket, "/v1/pod", a.trace.Values(), q, annotationPatience)
	var got PodAnswer
	switch {
	case errors.Is(err, errNoAgent), errors.Is(err, errNotFound): // there is none, or not of a cluster of Kubernetes's
		return
	case err == nil:
		err = json.Unmarshal(body, &got)
	}
	if err == nil && !got.Found {
		a.unheard = true
		err = fmt.Errorf("the agent has not heard of pod %s/%s", q.Namespace, q.Name)
	}
	if err != nil {
		a.log.Warn("the pod's annotations are not known", "error", err)
		return
	}
	a.c.RuntimeConfig.PodAnnotations = got.Annotations
}

// only are the pools that the pod's addresses are to come from: by its own annotations, then by its namespace's.
func (a *adding) only(tx *node.Tx) (ipam.Only, error) {
	if a.record.PodNamespace == "" {
		return a.pools.Only, nil
	}
	namespace, err := ipam.NamespacePools(tx, a.record.PodNamespace)
	return a.pools.Only.Or(namespace), err
}
