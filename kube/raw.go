package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/caracal-net/caracal/store"
)

// Raw reads what is not in the store: JSON, from a path such as "/apis/apps/v1/namespaces/kube-system/daemonsets". ErrNotFound,
// ErrDenied, whose text names verb and resource, ErrUnavailable.
func (s *Store) Raw(ctx context.Context, path string, query url.Values) ([]byte, error) {
	return s.raw(ctx, "GET", path, query, nil)
}

// RawList reads all pages of a list as Raw does, and returns its items.
func (s *Store) RawList(ctx context.Context, path string) ([]json.RawMessage, error) {
	var all []json.RawMessage
	query := url.Values{"limit": {strconv.Itoa(page)}}
	for {
		text, err := s.Raw(ctx, path, query)
		if err != nil {
			return nil, err
		}
		var part struct {
			Metadata struct {
				Continue string `json:"continue"`
			} `json:"metadata"`
			Items []json.RawMessage `json:"items"`
		}
		if err := json.Unmarshal(text, &part); err != nil {
			return nil, fmt.Errorf("%s of the Kubernetes API: %w", path, err)
		}
		if all = append(all, part.Items...); part.Metadata.Continue == "" {
			return all, nil
		}
		query.Set("continue", part.Metadata.Continue)
	}
}

// Allowed tells whether the API lets us do something: a SelfSubjectAccessReview. resource may have a subresource, "pods/status"; a group
// "" is the core's; a namespace "" all of them.
func (s *Store) Allowed(ctx context.Context, verb, group, resource, namespace string) (bool, error) {
	attributes := map[string]string{"verb": verb, "group": group, "resource": resource, "namespace": namespace}
	if of, sub, is := strings.Cut(resource, "/"); is {
		attributes["resource"], attributes["subresource"] = of, sub
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": map[string]any{"resourceAttributes": attributes}})
	if err != nil {
		return false, err
	}
	text, err := s.raw(ctx, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", nil, body)
	if err != nil {
		return false, err
	}
	var answer struct {
		Status struct {
			Allowed bool `json:"allowed"`
		} `json:"status"`
	}
	err = json.Unmarshal(text, &answer)
	return answer.Status.Allowed, err
}

func (s *Store) raw(ctx context.Context, verb, path string, query url.Values, body []byte) ([]byte, error) {
	if err := s.alive(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	request := s.core().Verb(verb).AbsPath(path).SetHeader("Accept", "application/json")
	for key, values := range query {
		for _, value := range values {
			request.Param(key, value)
		}
	}
	if body != nil {
		request.SetHeader("Content-Type", "application/json").Body(body)
	}
	answer := request.Do(ctx)
	text, _ := answer.Raw()
	switch err := answer.Error(); { // with what the API says of it
	case err == nil:
		return text, nil
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%s of the Kubernetes API at %s: %w", path, s.where(), store.ErrNotFound)
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return nil, fmt.Errorf("Kubernetes API at %s: %w: %w", s.where(), store.ErrDenied, err)
	default:
		return nil, fmt.Errorf("Kubernetes API at %s: %w: %w", s.where(), store.ErrUnavailable, err)
	}
}
