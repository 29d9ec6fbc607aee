package kube

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	apiwatch "k8s.io/apimachinery/pkg/watch"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/store"
)

// nodeStatus is where conditions of a node are written.
var nodeStatus = &kind{version: coreVersion, object: "Node", resource: "nodes/status"}

// self is what was heard of this node's Node.
type self struct {
	mu   sync.Mutex
	node *api.CoreNode // nil: there is none
	err  error         // why it was not heard; nil: it was
}

func (s *self) get() (*api.CoreNode, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.node == nil && s.err != nil {
		return nil, s.err
	}
	return s.node, nil
}

// set notes what was heard, and tells whether that is something new.
func (s *self) set(n *api.CoreNode) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && reflect.DeepEqual(s.node, n) {
		return false
	}
	s.node, s.err = n, nil
	return true
}

// failed notes why nothing was heard, and tells whether that is something new. What was heard before stays, also that there is none.
func (s *self) failed(err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil || s.err.Error() == err.Error() {
		return false
	}
	s.err = err
	return true
}

// Self is this node's Node as it was heard last; nil: there is none of its name. An error says why it was not heard: ErrUnavailable,
// ErrDenied.
func (s *Store) Self() (*api.CoreNode, error) { return s.self.get() }

// WatchSelf follows this node's Node until ctx ends, and calls changed when there is something new of it.
func (s *Store) WatchSelf(ctx context.Context, changed func()) {
	for pauses := backoff(); ctx.Err() == nil && s.open.Err() == nil; {
		begin := time.Now()
		err := s.watchSelf(ctx, changed)
		if time.Since(begin) > short {
			pauses = backoff()
		}
		if err != nil && ctx.Err() == nil && s.self.failed(err) {
			changed()
		}
		pause.For(ctx, pauses.Step())
	}
}

// watchSelf lists the Node, which there may not be, and watches it until the API ends that.
func (s *Store) watchSelf(ctx context.Context, changed func()) error {
	var list corev1.NodeList
	selector := "metadata.name=" + s.cfg.Node
	err := s.do(ctx, "list", nodes, func(ctx context.Context) error {
		return s.core().Get().Resource("nodes").Param("fieldSelector", selector).Do(ctx).Into(&list)
	})
	if err != nil {
		return err
	}
	var n *api.CoreNode
	for _, item := range list.Items {
		n = coreNode(&item)
	}
	if s.self.set(n) {
		changed()
	}
	err = s.events(ctx, s.core().Get().Resource("nodes").Param("fieldSelector", selector), list.ResourceVersion, func() {}, func(e apiwatch.Event) error {
		o, is := e.Object.(*corev1.Node)
		switch {
		case e.Type == apiwatch.Error:
			return apierrors.FromObject(e.Object)
		case !is:
			return nil
		case e.Type == apiwatch.Deleted:
			n = nil
		default:
			n = coreNode(o)
		}
		if s.self.set(n) {
			changed()
		}
		return nil
	})
	return s.explain(ctx, "watch", nodes, err)
}

// coreNode is what a network wants to know of a Node.
func coreNode(o *corev1.Node) *api.CoreNode {
	n := &api.CoreNode{UID: string(o.UID), Labels: o.Labels, Annotations: make(map[string]string), Unschedulable: o.Spec.Unschedulable}
	for key, value := range o.Annotations {
		if strings.HasPrefix(key, calicoVersion.Group+"/") { // others are nothing to a network, and may change often
			n.Annotations[key] = value
		}
	}
	cidrs := o.Spec.PodCIDRs
	if len(cidrs) == 0 && o.Spec.PodCIDR != "" {
		cidrs = []string{o.Spec.PodCIDR}
	}
	for _, text := range cidrs {
		if p, err := netip.ParsePrefix(text); err == nil {
			n.PodCIDRs = append(n.PodCIDRs, p.Masked())
		}
	}
	for _, a := range o.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			n.Addresses = append(n.Addresses, addr.Unmap())
		}
	}
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable {
			n.NetworkUnavailable = string(c.Status)
		}
	}
	return n
}

// SetNetworkAvailable says that pods on this node have a network: the Node's condition NetworkUnavailable is False, as Calico and
// flannel have it. Clouds begin with another one.
func (s *Store) SetNetworkAvailable(ctx context.Context) error {
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionFalse, Reason: "CaracalIsUp", Message: "Caracal runs on this node",
		LastHeartbeatTime: now, LastTransitionTime: now,
	}}}})
	if err != nil {
		return err
	}
	return named("set condition NetworkUnavailable of node "+s.cfg.Node, s.do(ctx, "patch", nodeStatus, func(ctx context.Context) error {
		return s.core().Patch(types.StrategicMergePatchType).Resource("nodes").Name(s.cfg.Node).SubResource("status").Body(patch).Do(ctx).Error()
	}))
}

// PodExists asks the API for a pod of that uid. An error says that it can't be told.
func (s *Store) PodExists(ctx context.Context, namespace, name, uid string) (bool, error) {
	var p corev1.Pod
	pods := &kind{version: coreVersion, object: "Pod", resource: "pods", namespaced: true}
	err := s.do(ctx, "get", pods, func(ctx context.Context) error {
		return s.core().Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(&p)
	})
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, named("get pod "+namespace+"/"+name, err)
	}
	return string(p.UID) == uid || p.Annotations[corev1.MirrorPodAnnotationKey] == uid, nil
}
