package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	corev1 "k8s.io/api/core/v1"

	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/store"
)

var _ store.Store = (*Store)(nil)

const (
	// page is how many objects are listed at once.
	page = 500
	// manager is what we are called among those who manage an object's fields.
	manager = "caracal"
)

// backoff are the pauses before something is tried again: of many nodes not all at once.
func backoff() wait.Backoff {
	return wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 1 << 30, Cap: 5 * time.Second}
}

// do runs one operation with the store's deadline.
func (s *Store) do(ctx context.Context, verb string, k *kind, fn func(context.Context) error) error {
	if err := s.alive(ctx); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	defer context.AfterFunc(s.open, cancel)()
	var last error
	for pauses := backoff(); ; {
		err := fn(bounded)
		if err == nil {
			return nil
		}
		if bounded.Err() == nil || last == nil {
			last = err
		}
		if !again(verb, err) || !pause.For(bounded, pauses.Step()) {
			return s.explain(ctx, verb, k, last)
		}
	}
}

// alive says why nothing can be asked: the store is closed, or the caller gave up.
func (s *Store) alive(ctx context.Context) error {
	if s.open.Err() != nil {
		return store.ErrClosed
	}
	return ctx.Err()
}

// named says what was tried.
func named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// resource is the client of a kind.
func (s *Store) resource(k *kind) rest.Interface { return s.groups[k.version] }

// request says which kind a request is about, and in which namespace.
func (k *kind) request(r *rest.Request, namespace string) *rest.Request {
	return r.NamespaceIfScoped(namespace, k.namespaced && namespace != "").Resource(k.resource)
}

// Get returns a key.
func (s *Store) Get(ctx context.Context, key string) (kv store.KV, err error) {
	k, namespace, name, err := s.find(key)
	if err != nil {
		return store.KV{}, err
	}
	err = s.do(ctx, "get", k, func(ctx context.Context) error {
		o := k.newObject()
		if err := k.request(s.resource(k).Get(), namespace).Name(name).Do(ctx).Into(o); err != nil {
			return err
		}
		var there bool
		kv, there, err = s.space.read(k, o)
		if err == nil && !there {
			return apierrors.NewNotFound(k.version.WithResource(k.resource).GroupResource(), name)
		}
		return err
	})
	if err != nil {
		return store.KV{}, named("get "+key, err)
	}
	return kv, nil
}

// find is where a key's object is. ErrInvalid.
func (s *Store) find(key string) (k *kind, namespace, name string, err error) {
	if err := store.CheckKey(key); err != nil {
		return nil, "", "", err
	}
	if k = s.space.kind(key); k == entries {
		return k, "", s.space.entryName(key), nil
	}
	namespace, name, err = k.name(key)
	return k, namespace, name, err
}

// List returns the keys that begin with prefix: kind after kind and in parts, but all at the revision of the first.
func (s *Store) List(ctx context.Context, prefix string) (kvs []store.KV, at store.Revision, err error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, 0, err
	}
	for range 3 {
		kvs, at, err = s.list(ctx, prefix, 0)
		if !errors.Is(err, store.ErrCompacted) { // by the API, between two parts
			break
		}
	}
	if err != nil {
		return nil, 0, named("list "+prefix, err)
	}
	return kvs, at, nil
}

// list lists at a revision; 0 is the present one. ErrCompacted.
func (s *Store) list(ctx context.Context, prefix string, at store.Revision) (kvs []store.KV, _ store.Revision, err error) {
	for _, k := range s.space.covered(prefix) {
		take := func(kv store.KV) {
			if strings.HasPrefix(kv.Key, prefix) {
				kvs = append(kvs, kv)
			}
		}
		if at, err = s.listKind(ctx, k, prefix, at, take); err != nil {
			return nil, 0, err
		}
	}
	slices.SortFunc(kvs, func(a, b store.KV) int { return strings.Compare(a.Key, b.Key) })
	s.saw(at)
	return kvs, at, nil
}

// listKind lists one kind's objects at a revision, or, when that is 0, at the present one, which it returns.
func (s *Store) listKind(ctx context.Context, k *kind, prefix string, at store.Revision, take func(store.KV)) (store.Revision, error) {
	for next := ""; ; {
		list := k.newList()
		err := s.do(ctx, "list", k, func(ctx context.Context) error {
			r := s.selecting(k, prefix).Param("limit", fmt.Sprint(page))
			switch {
			case next != "":
				r.Param("continue", next)
			case at != 0:
				r.Param("resourceVersion", fmt.Sprint(at)).Param("resourceVersionMatch", "Exact")
			}
			return r.Do(ctx).Into(list)
		})
		if k.optional && errors.Is(err, errAbsent) {
			return at, nil
		}
		if err != nil {
			return 0, err
		}
		l, err := meta.ListAccessor(list)
		if err != nil {
			return 0, err
		}
		// Each page is turned into values at once: what else the objects say is not kept.
		err = meta.EachListItem(list, func(o runtime.Object) error {
			kv, there, err := s.space.read(k, o)
			if err == nil && there {
				take(kv)
			}
			return err
		})
		if err != nil {
			return 0, fmt.Errorf("list %s: %w", k, err)
		}
		if at == 0 {
			if at, err = revision(l.GetResourceVersion()); err != nil {
				return 0, err
			}
		}
		if next = l.GetContinue(); next == "" {
			return at, nil
		}
	}
}

// selecting asks for the objects of a kind, no more than need be for those whose keys begin with prefix.
func (s *Store) selecting(k *kind, prefix string) *rest.Request {
	namespace, _, whole := strings.Cut(strings.TrimPrefix(prefix, k.prefix), "/")
	if !k.namespaced || !whole || !strings.HasPrefix(prefix, k.prefix) {
		namespace = ""
	}
	r := k.request(s.resource(k).Get(), namespace)
	if k.selector != "" {
		r.Param("fieldSelector", k.selector)
	}
	if k == entries {
		r.Param("labelSelector", spaceLabel+"="+s.space.label())
	}
	return r
}

// metadata is an object's, as it is written.
type metadata struct {
	Name        string                  `json:"name"`
	Namespace   string                  `json:"namespace,omitempty"`
	Labels      map[string]string       `json:"labels,omitempty"`
	Annotations map[string]string       `json:"annotations,omitempty"`
	Owners      []metav1.OwnerReference `json:"ownerReferences,omitempty"`
}

// Create writes a key that is not there.
func (s *Store) Create(ctx context.Context, key string, value []byte) (store.Revision, error) {
	at, err := s.write(ctx, key, value, func(k *kind, namespace, name string, w written) (store.Revision, error) {
		return s.create(ctx, k, namespace, name, w)
	})
	return at, named("create "+key, err)
}

// write finds out what an object is to say, and lets fn say it.
func (s *Store) write(ctx context.Context, key string, value []byte, fn func(k *kind, namespace, name string, w written) (store.Revision, error)) (store.Revision, error) {
	if err := store.CheckWrite(key, value); err != nil {
		return 0, err
	}
	k, namespace, name, err := s.find(key)
	if err != nil {
		return 0, err
	}
	w, err := s.space.write(k, key, name, value)
	if err != nil {
		return 0, err
	}
	return fn(k, namespace, name, w)
}

func (s *Store) create(ctx context.Context, k *kind, namespace, name string, w written) (at store.Revision, err error) {
	owners, err := s.owners(ctx, w.Node)
	if err != nil {
		return 0, err
	}
	body, err := json.Marshal(struct {
		metav1.TypeMeta
		Metadata metadata        `json:"metadata"`
		Spec     json.RawMessage `json:"spec,omitempty"`
	}{metav1.TypeMeta{APIVersion: k.version.String(), Kind: k.object}, metadata{name, namespace, w.Labels, w.Annotations, owners}, w.Spec})
	if err != nil {
		return 0, err
	}
	err = s.do(ctx, "create", k, func(ctx context.Context) error {
		r := k.request(s.resource(k).Post(), namespace).SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body)
		at, err = s.change(ctx, r)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		return 0, fmt.Errorf("%w: there is no namespace %s", store.ErrInvalid, namespace)
	}
	return at, err
}

// change sends a change and returns its revision. Of the object that it results in nothing else is asked for.
func (s *Store) change(ctx context.Context, r *rest.Request) (store.Revision, error) {
	answer := r.SetHeader("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1").Param("fieldManager", manager).Do(ctx)
	if err := answer.Error(); err != nil { // Raw's own says less
		return 0, err
	}
	body, err := answer.Raw()
	if err != nil {
		return 0, err
	}
	var o metav1.PartialObjectMetadata
	if err := json.Unmarshal(body, &o); err != nil {
		return 0, err
	}
	at, err := revision(o.ResourceVersion)
	s.saw(at - 1)
	return at, err
}

// owners are the references by which Kubernetes deletes what is a node's when the node is deleted. A node that Kubernetes does not
// know owns nothing.
func (s *Store) owners(ctx context.Context, node string) ([]metav1.OwnerReference, error) {
	if node == "" {
		return nil, nil
	}
	var n corev1.Node
	err := s.do(ctx, "get", nodes, func(ctx context.Context) error {
		return s.core().Get().Resource("nodes").Name(node).Do(ctx).Into(&n)
	})
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrInvalid) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up node %s: %w", node, err)
	}
	return []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}}, nil
}

// operation is one of a JSON patch (RFC 6902). To add what is there replaces it.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// Update writes a key that is at revision was. What an object says beyond its value stays: who else holds or manages it, its status.
// An update that changes nothing has the revision of the last one that did.
func (s *Store) Update(ctx context.Context, key string, value []byte, was store.Revision) (store.Revision, error) {
	if err := store.CheckRevision(was); err != nil {
		return 0, err
	}
	at, err := s.write(ctx, key, value, func(k *kind, namespace, name string, w written) (at store.Revision, err error) {
		if was != 0 {
			return s.patch(ctx, k, namespace, name, w, was)
		}
		for range 5 {
			if at, err = s.create(ctx, k, namespace, name, w); !errors.Is(err, store.ErrExists) {
				return at, err
			}
			if at, err = s.patch(ctx, k, namespace, name, w, 0); !errors.Is(err, store.ErrNotFound) {
				return at, err
			}
		}
		return at, fmt.Errorf("%w: it comes and goes", store.ErrConflict)
	})
	return at, named("update "+key, err)
}

func (s *Store) patch(ctx context.Context, k *kind, namespace, name string, w written, was store.Revision) (at store.Revision, err error) {
	var ops []operation
	add := func(path string, value any) { ops = append(ops, operation{"add", path, value}) }
	if was != 0 {
		add("/metadata/resourceVersion", fmt.Sprint(was))
	}
	if k != entries {
		add("/metadata/labels", w.Labels)
		add("/metadata/annotations", w.Annotations)
	}
	if w.Node != "" {
		owners, err := s.owners(ctx, w.Node)
		if err != nil {
			return 0, err
		}
		add("/metadata/ownerReferences", owners)
	}
	if w.Spec != nil {
		add("/spec", w.Spec)
	}
	body, err := json.Marshal(ops)
	if err != nil {
		return 0, err
	}
	err = s.do(ctx, "patch", k, func(ctx context.Context) error {
		r := k.request(s.resource(k).Patch(types.JSONPatchType), namespace).Name(name).Body(body)
		at, err = s.change(ctx, r)
		return err
	})
	return at, err
}

// Delete removes a key that is at revision was.
func (s *Store) Delete(ctx context.Context, key string, was store.Revision) error {
	k, namespace, name, err := s.find(key)
	if err == nil {
		err = store.CheckRevision(was)
	}
	if err != nil {
		return err
	}
	if k.readOnly {
		return fmt.Errorf("%w: %s are Kubernetes's own; delete them by kubectl", store.ErrInvalid, k)
	}
	options := metav1.DeleteOptions{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"}}
	if was != 0 {
		version := fmt.Sprint(was)
		options.Preconditions = &metav1.Preconditions{ResourceVersion: &version}
	}
	body, err := json.Marshal(options)
	if err != nil {
		return err
	}
	return named("delete "+key, s.do(ctx, "delete", k, func(ctx context.Context) error {
		return k.request(s.resource(k).Delete(), namespace).Name(name).SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).Do(ctx).Error()
	}))
}

// saw notes the first revision that the store was heard of at.
func (s *Store) saw(at store.Revision) {
	if at > 0 {
		s.first.CompareAndSwap(0, int64(at))
	}
}
