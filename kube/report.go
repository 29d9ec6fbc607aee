package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// component is who our events are from.
const component = "caracal"

// Reasons of events and conditions.
const (
	reasonDenied   = "NetworkDenied"
	reasonInvalid  = "Invalid"    // nobody can put it in force
	reasonRefused  = "NotInForce" // a node can't
	reasonAccepted = "Accepted"
)

// Of the events of one object so many are told, then one in so long. The same again raises the first one's count.
const (
	eventBurst = 10
	eventEvery = time.Minute
)

// newRecorder sends events beside all else, as long as the store is open.
func (s *Store) newRecorder() record.EventRecorder {
	b := record.NewBroadcaster(record.WithContext(s.open), record.WithCorrelatorOptions(record.CorrelatorOptions{
		BurstSize: eventBurst, QPS: float32(1 / eventEvery.Seconds()),
	}))
	b.StartRecordingToSink(sink{s})
	context.AfterFunc(s.open, b.Shutdown)
	return b.NewRecorder(runtime.NewScheme(), s.source()) // of objects it is told a reference
}

// SetNode says which node this is, before anything is told of it.
func (s *Store) SetNode(name string) { s.cfg.Node = name }

func (s *Store) source() corev1.EventSource {
	return corev1.EventSource{Component: component, Host: s.cfg.Node}
}

// Denied tells of a pod that could not be added, by an event on it. It does not wait, and leaves out what comes too often.
func (s *Store) Denied(namespace, name, uid, message string) {
	s.recording.Do(func() { s.recorder = s.newRecorder() })
	pod := &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: name, UID: types.UID(uid)}
	s.recorder.Event(pod, corev1.EventTypeWarning, reasonDenied, message)
}

// sink is where events go.
type sink struct{ s *Store }

func (e sink) Create(event *corev1.Event) (*corev1.Event, error) {
	return e.send(e.s.core().Post(), event, event)
}

func (e sink) Update(event *corev1.Event) (*corev1.Event, error) {
	return e.send(e.s.core().Put().Name(event.Name), event, event)
}

func (e sink) Patch(event *corev1.Event, data []byte) (*corev1.Event, error) {
	return e.send(e.s.core().Patch(types.StrategicMergePatchType).Name(event.Name), event, data)
}

// send has the store's timeout: the next event waits for this one.
func (e sink) send(r *rest.Request, event *corev1.Event, body any) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(e.s.open, e.s.timeout)
	defer cancel()
	out := &corev1.Event{}
	return out, r.Namespace(event.Namespace).Resource("events").Body(body).Do(ctx).Into(out)
}

// conditionAccepted is the condition that a resource has of which something was reported.
const conditionAccepted = "Accepted"

// status is what of a custom resource's is ours, and what of it others have written beside.
type status struct {
	Conditions []metav1.Condition `json:"conditions"`
}

// statusOf reads a custom resource's status. One that is of another form counts as none.
func statusOf(o *object) (s status, accepted metav1.Condition) {
	_ = json.Unmarshal(o.Status, &s)
	if c := meta.FindStatusCondition(s.Conditions, conditionAccepted); c != nil {
		accepted = *c
	}
	return s, accepted
}

// hasStatus tells whether resources of the kind have conditions: policies, but for Kubernetes's own.
func (k *kind) hasStatus() bool { return k.custom && strings.HasSuffix(k.api.Name, "NetworkPolicy") }

// Report says of a resource, by its key, what keeps it from being in force on this node: by the condition Accepted of its status if
// the kind has that, else by an event. Where some node has said so already, of the resource as it is, nothing is written. nil takes back
// what this node has said. ErrNotFound.
func (s *Store) Report(ctx context.Context, key string, problem error) error {
	k, namespace, name, err := s.find(key)
	switch {
	case err != nil:
		return err
	case k.hasStatus():
		for range 3 {
			if err = s.setCondition(ctx, k, namespace, name, problem); !errors.Is(err, store.ErrConflict) {
				break
			}
		}
	case problem != nil:
		err = s.tell(ctx, k, namespace, name, problem)
	}
	return named("report "+key, err)
}

// setCondition makes a resource say whether it is accepted. ErrConflict.
func (s *Store) setCondition(ctx context.Context, k *kind, namespace, name string, problem error) error {
	var o object
	err := s.do(ctx, "get", k, func(ctx context.Context) error {
		o = object{}
		return k.request(s.resource(k).Get(), namespace).Name(name).Do(ctx).Into(&o)
	})
	if err != nil {
		return err
	}
	have, was := statusOf(&o)
	want := metav1.Condition{Type: conditionAccepted, Status: metav1.ConditionTrue, Reason: reasonAccepted, ObservedGeneration: o.Generation}
	refused := was.Status == metav1.ConditionFalse
	switch {
	case problem == nil && !(refused && s.said(was.Message)), problem != nil && refused && was.ObservedGeneration == o.Generation && !s.said(was.Message):
		return nil
	case problem != nil:
		want.Status, want.Reason, want.Message = metav1.ConditionFalse, reasonOf(problem), s.saying(problem)
	}
	if !meta.SetStatusCondition(&have.Conditions, want) {
		return nil
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]string{"resourceVersion": o.ResourceVersion}, "status": have,
	})
	if err != nil {
		return err
	}
	sub := *k
	sub.resource += "/status"
	return s.do(ctx, "patch", &sub, func(ctx context.Context) error {
		return k.request(s.resource(k).Patch(types.MergePatchType), namespace).Name(name).SubResource("status").Body(body).Do(ctx).Error()
	})
}

func reasonOf(problem error) string {
	if errors.Is(problem, api.ErrInvalid) || errors.Is(problem, api.ErrUnsupported) {
		return reasonInvalid
	}
	return reasonRefused
}

// saying is a problem as this node says it.
func (s *Store) saying(problem error) string {
	const most = 1000 // bytes: an event has 1024
	text := s.cfg.Node + ": " + problem.Error()
	return strings.ToValidUTF8(text[:min(most, len(text))], "")
}

// said tells whether a text is what this node says.
func (s *Store) said(text string) bool { return strings.HasPrefix(text, s.cfg.Node+": ") }

// tell makes an event on an object that has no status of ours. Its name is what it says, so that of many nodes one makes it.
func (s *Store) tell(ctx context.Context, k *kind, namespace, name string, problem error) error {
	o := k.newObject()
	err := s.do(ctx, "get", k, func(ctx context.Context) error {
		return k.request(s.resource(k).Get(), namespace).Name(name).Do(ctx).Into(o)
	})
	if err != nil {
		return err
	}
	m, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	if namespace == "" {
		namespace = metav1.NamespaceDefault // where those of what is in none are
	}
	now := metav1.Now()
	sum := sha256.Sum256(fmt.Append(nil, m.GetUID(), m.GetGeneration(), problem))
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%.200s.%x", name, sum[:8]), Namespace: namespace},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: k.version.String(), Kind: k.object, Namespace: m.GetNamespace(), Name: name, UID: m.GetUID(), ResourceVersion: m.GetResourceVersion(),
		},
		Type: corev1.EventTypeWarning, Reason: reasonOf(problem), Message: s.saying(problem),
		Source: s.source(), ReportingController: component, ReportingInstance: s.cfg.Node, FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}
	err = s.do(ctx, "create", eventKind, func(ctx context.Context) error {
		return s.core().Post().Namespace(namespace).Resource("events").Body(event).Do(ctx).Error()
	})
	if errors.Is(err, store.ErrExists) {
		return nil
	}
	return err
}

var eventKind = &kind{version: coreVersion, object: "Event", resource: "events", namespaced: true}

// Reported are the keys, of those that begin with one of the prefixes, of which this node has said that something is wrong with them.
func (s *Store) Reported(ctx context.Context, prefixes []string) ([]string, error) {
	var keys []string
	for _, prefix := range prefixes {
		k := s.space.kind(prefix)
		if !k.hasStatus() {
			continue
		}
		for next := ""; ; {
			var list objects
			err := s.do(ctx, "list", k, func(ctx context.Context) error {
				list = objects{}
				return k.request(s.resource(k).Get(), "").Param("limit", fmt.Sprint(page)).Param("continue", next).Do(ctx).Into(&list)
			})
			if k.optional && errors.Is(err, errAbsent) {
				break
			}
			if err != nil {
				return nil, named("list "+prefix, err)
			}
			for _, o := range list.Items {
				if _, c := statusOf(&o); c.Status == metav1.ConditionFalse && s.said(c.Message) {
					keys = append(keys, k.api.Key(o.Namespace, o.Name))
				}
			}
			if next = list.Continue; next == "" {
				break
			}
		}
	}
	return keys, nil
}
