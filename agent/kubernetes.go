package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// Calico's annotations of a Node of Kubernetes that are followed.
const (
	ip4Annotation       = "projectcalico.org/IPv4Address" // with its network's length
	ip6Annotation       = "projectcalico.org/IPv6Address"
	asAnnotation        = "projectcalico.org/ASNumber"
	clusterIDAnnotation = "projectcalico.org/RouteReflectorClusterID"
)

// uidAnnotation is on a Node resource: the uid of the Node of Kubernetes that it and the node's blocks go with.
const uidAnnotation = "caracal.dev/node-uid"

var (
	// ErrNoNode says that Kubernetes has no Node of this node's name.
	ErrNoNode = errors.New("Kubernetes has no node of this name")
	// ErrNotHeard says that the API server has not said yet whether there is one.
	ErrNotHeard = errors.New("the API server was not heard yet")
)

// Kubernetes is what an agent hears of the cluster that its node is of, and tells it, beside what is in the store. Package kube
// has one.
type Kubernetes interface {
	KubernetesNode
	KubernetesPods
	KubernetesReports
}

// KubernetesNode is this node's Node in the API server.
type KubernetesNode interface {
	// WatchSelf follows the Node until ctx ends, and calls changed when there is something new of it.
	WatchSelf(ctx context.Context, changed func())
	// Self is the Node as it was heard last; nil: there is none of this name. ErrUnavailable when the API server was not heard
	// yet, or what else keeps it from being heard.
	Self() (self *api.CoreNode, err error)
	// SetNetworkAvailable says, by the Node's condition NetworkUnavailable, that its network works.
	SetNetworkAvailable(ctx context.Context) error
}

// KubernetesPods is what the API server is asked of single pods.
type KubernetesPods interface {
	// PodExists asks for a pod of that uid, whatever was heard before. An error says that it can't be told.
	PodExists(ctx context.Context, namespace, name, uid string) (bool, error)
}

// core is this node's Node of Kubernetes; nil without Kubernetes. ErrNoNode, ErrNotHeard.
func (a *Agent) core() (*api.CoreNode, error) {
	if a.Kubernetes == nil {
		return nil, nil
	}
	core, err := a.Kubernetes.Self()
	if errors.Is(err, store.ErrUnavailable) {
		return nil, fmt.Errorf("%w: %w", ErrNotHeard, err)
	}
	if err == nil && core == nil {
		err = fmt.Errorf("%s: %w; name it as its kubelet does (--node-name or NODENAME here, --hostname-override there), or start its kubelet", a.Node, ErrNoNode)
	}
	return core, err
}

// preferCore are the addresses that a Node of Kubernetes says, as far as this host has them, else the ones that were found.
func preferCore(core *api.CoreNode, found4, found6 netip.Prefix) (ip4, ip6 netip.Prefix, err error) {
	all, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return found4, found6, fmt.Errorf("list this host's addresses: %w", err)
	}
	said := []netip.Addr{}
	for _, annotation := range []string{ip4Annotation, ip6Annotation} {
		if p, err := netip.ParsePrefix(core.Annotations[annotation]); err == nil {
			said = append(said, p.Addr())
		}
	}
	for _, a := range append(said, core.Addresses...) {
		at := slices.IndexFunc(all, func(have netlink.Addr) bool {
			p, ok := prefixOf(have)
			return ok && p.Addr() == a && a.IsGlobalUnicast()
		})
		if at < 0 {
			continue
		}
		p, _ := prefixOf(all[at])
		switch {
		case a.Is4() && !ip4.IsValid():
			ip4 = p
		case a.Is6() && !ip6.IsValid():
			ip6 = p
		}
	}
	if !ip4.IsValid() {
		ip4 = found4
	}
	if !ip6.IsValid() {
		ip6 = found6
	}
	return ip4, ip6, nil
}

// followBGP makes a node's BGP what Calico's annotations of its Node of Kubernetes say. What they said is noted among the node's own
// annotations, so that one which goes is taken back, and what somebody else has set stays.
func followBGP(core *api.CoreNode, annotations map[string]string, b *api.NodeBGP) error {
	says := func(name string) (value string, says bool) {
		value, was := core.Annotations[name], annotations[name]
		delete(annotations, name)
		if value != "" {
			annotations[name] = value
		}
		return value, value != "" || was != ""
	}
	if as, ok := says(asAnnotation); ok {
		b.ASNumber = 0
		if as != "" {
			if err := json.Unmarshal([]byte(strconv.Quote(as)), &b.ASNumber); err != nil {
				return fmt.Errorf("annotation %s of its node in Kubernetes: %w", asAnnotation, err)
			}
		}
	}
	if id, ok := says(clusterIDAnnotation); ok {
		b.ClusterID = id
		if err := (&api.Node{BGP: b}).Complete(""); err != nil {
			return fmt.Errorf("annotation %s of its node in Kubernetes: %w", clusterIDAnnotation, err)
		}
	}
	return nil
}

// inherits makes sure that a node which begins takes over no blocks of an earlier one of its name: pods may have addresses of
// these on a host that is only cut off. Kubernetes removes them with the earlier Node.
func (a *Agent) inherits(ctx context.Context, v *view) error {
	if a.Kubernetes == nil {
		return nil
	}
	here, err := a.local(ctx)
	if err != nil {
		return err
	}
	for _, c := range v.claims(a.Node) {
		if !here.has(c.CIDR) {
			return fmt.Errorf("block %s is of an earlier node %s, with which Kubernetes removes it; if it does not, and that node's pods are gone, do (kubectl delete %s)", c.CIDR, a.Node, blockObject(c.CIDR))
		}
	}
	return nil
}

// blockObject is what kubectl calls a claim.
func blockObject(cidr netip.Prefix) string {
	return "addressblock " + api.BlockObject(cidr)
}

// byHand says how people change or remove a claim, where they can: " (kubectl edit addressblock 10.244.0.0-26)".
func (a *Agent) byHand(verb string, cidr netip.Prefix) string {
	if a.Kubernetes == nil {
		return ""
	}
	return " (kubectl " + verb + " " + blockObject(cidr) + ")"
}

// reown writes this node's claims anew, which gives them to the Node that there is in Kubernetes now: with the one that was
// there when they were written they would go.
func (a *Agent) reown(ctx context.Context, v *view) error {
	for _, c := range v.claims(a.Node) {
		if err := a.claimOne(ctx, c.Block); err != nil {
			return err
		}
	}
	return nil
}

// reportAvailable tells Kubernetes that pods can run here.
func (a *Agent) reportAvailable(ctx context.Context) error {
	core, err := a.core()
	if err != nil || core == nil || core.NetworkUnavailable == "False" {
		return err
	}
	return a.Kubernetes.SetNetworkAvailable(ctx)
}

// servePod answers what the plugin asks of a pod whose annotations it was not given. It waits a while for Kubernetes to tell of it.
func (a *Agent) servePod(w http.ResponseWriter, r *http.Request) {
	if a.Kubernetes == nil {
		http.NotFound(w, r)
		return
	}
	var q cni.PodQuestion
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxEndpoint)).Decode(&q); err != nil || q.Namespace == "" || q.Name == "" || q.UID == "" {
		http.Error(w, "a pod's namespace, name and uid are expected", http.StatusBadRequest)
		return
	}
	begin := time.Now()
	deadline := begin.Add(a.podWait())
	answer := cni.PodAnswer{}
	for {
		if answer.Annotations, answer.Found = a.policies.annotations(q); answer.Found || time.Now().After(deadline) || r.Context().Err() != nil {
			break
		}
		pause.For(r.Context(), annotationsTick)
	}
	a.traced(r, "annotations of a new pod", begin, nil, "namespace", q.Namespace, "pod", q.Name, "found", answer.Found)
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // who asks may be gone
}

// annotationsTick is how often a pod is looked for that was not heard of.
const annotationsTick = 10 * time.Millisecond

// annotations are those of one of this node's Pods, as long as Kubernetes is away as it told last. false: it was not heard of.
func (s *policies) annotations(q cni.PodQuestion) (cni.Annotations, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, heard := s.mine[podKind.Key(q.Namespace, q.Name)]
	if !s.listed && s.loaded != nil {
		r, heard = s.loaded.Resource(podKind, q.Namespace, q.Name)
	}
	if !heard || !enforce.IsPod(&r, node.Endpoint{PodNamespace: q.Namespace, PodName: q.Name, PodUID: q.UID}) {
		return nil, false
	}
	return r.Metadata.Annotations, true
}
