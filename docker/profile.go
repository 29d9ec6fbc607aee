package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// A network is a Profile in the store: DeleteNetwork, like CreateNetwork, reaches one daemon only, but every one has containers
// on it. What Docker knows of it stands in annotations.
const (
	networkAnnotation = "caracal.dev/docker-network-id"
	nodeAnnotation    = "caracal.dev/docker-network-node" // where it was made
	scopeAnnotation   = "caracal.dev/docker-network-scope"
)

// profileName is the name of a network's profile.
func profileName(networkID string) string { return "docker." + networkID[:shownID] }

var profileKind = func() api.Kind {
	k, err := api.FindKind("Profile")
	if err != nil {
		panic(err) // it is in api.Kinds
	}
	return k
}()

func profileKey(networkID string) string { return profileKind.Key("", profileName(networkID)) }

// newProfile is what a network begins with: who is in it may enter, and everything may leave. Networks that share a name share the
// label of who is in it.
func newProfile(networkID, shared, node, scope string) api.Resource {
	label := api.DockerNetworkLabel + networkID
	meta := api.Metadata{Name: profileName(networkID), Annotations: map[string]string{
		networkAnnotation: networkID, nodeAnnotation: node, scopeAnnotation: scope,
	}}
	if shared != "" {
		label = api.DockerNetworkLabel + shared
		meta.Annotations[api.DockerNetworkAnnotation] = shared
	}
	return api.Resource{Kind: profileKind, Metadata: meta, Spec: &api.Profile{
		Ingress:       []api.Rule{{Action: "Allow", Source: api.EntityRule{Selector: "has(" + label + ")"}}},
		Egress:        []api.Rule{{Action: "Allow"}},
		LabelsToApply: map[string]string{label: ""},
	}}
}

// createProfile makes a network's profile. Made again for the same network it stays as it is.
func (d *Drivers) createProfile(ctx context.Context, networkID, shared string) error {
	text, err := json.Marshal(newProfile(networkID, shared, d.Node, d.Scope))
	if err != nil {
		return err
	}
	_, err = d.store.Create(ctx, profileKey(networkID), text)
	if errors.Is(err, store.ErrExists) {
		have, gerr := d.profile(ctx, networkID)
		if gerr == nil && have.Metadata.Annotations[networkAnnotation] != networkID {
			return fmt.Errorf("%s is another network's (%s); create the network again", have, have.Metadata.Annotations[networkAnnotation])
		}
		err = gerr
	}
	return err
}

// profile reads a network's profile. store.ErrNotFound.
func (d *Drivers) profile(ctx context.Context, networkID string) (api.Resource, error) {
	kv, err := d.store.Get(ctx, profileKey(networkID))
	if err != nil {
		return api.Resource{}, err
	}
	var r api.Resource
	if err := json.Unmarshal(kv.Value, &r); err != nil {
		return r, fmt.Errorf("profile %s in the store: %w", profileName(networkID), err)
	}
	return r, nil
}

// deleteProfile removes a network's profile. None there is not an error.
func (d *Drivers) deleteProfile(ctx context.Context, networkID string) error {
	err := d.store.Delete(ctx, profileKey(networkID), 0)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// nameProfile notes how people call a network.
func (d *Drivers) nameProfile(ctx context.Context, networkID, name string) error {
	kv, err := d.store.Get(ctx, profileKey(networkID))
	if err != nil {
		return err
	}
	var r api.Resource
	if err := json.Unmarshal(kv.Value, &r); err != nil || r.Metadata.Annotations[api.DockerNetworkAnnotation] != "" {
		return err
	}
	if r.Metadata.Annotations == nil {
		r.Metadata.Annotations = make(map[string]string)
	}
	r.Metadata.Annotations[api.DockerNetworkAnnotation] = name
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = d.store.Update(ctx, kv.Key, text, kv.Revision)
	return err
}

// networks are all networks' profiles, by key of the store.
func (d *Drivers) networks(ctx context.Context) ([]api.Resource, error) {
	kvs, _, err := d.store.List(ctx, profileKind.Prefix("")+"docker.")
	if err != nil {
		return nil, err
	}
	var all []api.Resource
	for _, kv := range kvs {
		var r api.Resource
		if json.Unmarshal(kv.Value, &r) == nil && checkID("network id", r.Metadata.Annotations[networkAnnotation]) == nil {
			all = append(all, r)
		}
	}
	return all, nil
}

// soon is how long a store is waited for that need not answer.
const soon = 2 * time.Second

// checkProfile makes sure that a network's profile is there, as far as the store answers. Without it all of its containers' packets
// would be dropped.
func (d *Drivers) checkProfile(ctx context.Context, networkID string) error {
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	_, err := d.profile(ctx, networkID)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("network %s has no profile %s in this node's store: it was made with another store, or somebody removed the profile; remove the network and create it again", networkID[:shownID], profileName(networkID))
	}
	return nil
}
