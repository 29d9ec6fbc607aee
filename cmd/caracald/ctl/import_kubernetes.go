package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
)

// calicoAPI is where Calico keeps its resources in a cluster.
const calicoAPI = "/apis/crd.projectcalico.org/v1"

// fromKubernetes reads all of Calico's resources in the API that the flags name, as a list that read takes.
func (g *globals) fromKubernetes(ctx context.Context) ([]byte, error) {
	api, err := kube.Open(g.kubernetes())
	if err != nil {
		return nil, err
	}
	all, err := calicoResources(ctx, api)
	return all, errors.Join(err, api.Close())
}

func calicoResources(ctx context.Context, api *kube.Store) ([]byte, error) {
	text, err := api.Raw(ctx, calicoAPI, nil)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("the cluster has no resources of Calico's (%s): its datastore is an etcd, then export from that", calicoAPI)
	}
	if err != nil {
		return nil, err
	}
	var served struct {
		Resources []struct {
			Name, Kind string
			Verbs      []string
		} `json:"resources"`
	}
	if err := json.Unmarshal(text, &served); err != nil {
		return nil, fmt.Errorf("%s: %w", calicoAPI, err)
	}
	var list struct {
		APIVersion string            `json:"apiVersion"`
		Kind       string            `json:"kind"`
		Items      []json.RawMessage `json:"items"`
	}
	list.APIVersion, list.Kind = "v1", "List"
	for _, kind := range served.Resources {
		if !slices.Contains(kind.Verbs, "list") {
			continue
		}
		items, err := api.RawList(ctx, calicoAPI+"/"+kind.Name)
		if err != nil {
			return nil, err
		}
		list.Items = append(list.Items, items...)
	}
	if len(list.Items) == 0 {
		return nil, errors.New("the cluster knows Calico's kinds, but has no resource of them")
	}
	out := new(bytes.Buffer)
	e := json.NewEncoder(out)
	e.SetIndent("", " ") // so that its lines are short
	err = e.Encode(list)
	return out.Bytes(), err
}
