package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/caracal-net/caracal/store"
)

// podIPAnnotation is a pod's address for those who take one.
const podIPAnnotation = annotationPrefix + "podIP"

// podStatus is where annotations of a pod are written by those who may not change its spec.
var podStatus = &kind{version: coreVersion, object: "Pod", resource: "pods/status", namespaced: true}

// Announce says which addresses a pod has before its kubelet does, in Calico's annotations of it, the first one as the pod's. A pod of
// another uid is not touched: ErrNotFound.
func (s *Store) Announce(ctx context.Context, namespace, name, uid string, addrs []netip.Addr) error {
	var all []string
	for _, a := range addrs {
		all = append(all, netip.PrefixFrom(a, a.BitLen()).String())
	}
	var body struct {
		Metadata struct {
			UID         string            `json:"uid"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	body.Metadata.UID = uid
	body.Metadata.Annotations = map[string]string{podIPAnnotation: strings.Join(all[:min(1, len(all))], ""), podIPsAnnotation: strings.Join(all, ",")}
	patch, err := json.Marshal(body)
	if err != nil {
		return err
	}
	err = s.do(ctx, "patch", podStatus, func(ctx context.Context) error {
		return s.core().Patch(types.MergePatchType).Namespace(namespace).Resource("pods").Name(name).SubResource("status").Body(patch).Do(ctx).Error()
	})
	if another(err) {
		err = fmt.Errorf("with uid %s: %w", uid, store.ErrNotFound)
	}
	return named("announce pod "+namespace+"/"+name, err)
}

// another tells whether something was not done because the object is not the one of that uid.
func another(err error) bool {
	status := apierrors.APIStatus(nil)
	if errors.Is(err, store.ErrConflict) || !errors.As(err, &status) || status.Status().Details == nil {
		return errors.Is(err, store.ErrConflict)
	}
	return slices.ContainsFunc(status.Status().Details.Causes, func(c metav1.StatusCause) bool { return c.Field == "metadata.uid" })
}
