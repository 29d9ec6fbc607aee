package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// makePools makes the pools that the agent was told of, of families of which the cluster has none. Agents that do so at once
// make one: it has a fixed name. A pool that somebody made meanwhile under another name is one more problem of theirs only if
// the two overlap.
func (a *Agent) makePools(ctx context.Context, v *view) error {
	var errs []error
	for _, r := range a.Pools {
		want, ok := r.Spec.(*api.IPPool)
		if !ok || slices.ContainsFunc(v.pools, func(p api.IPPool) bool { return p.CIDR.Addr().Is6() == want.CIDR.Addr().Is6() }) {
			continue
		}
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		revision, err := a.store.Create(ctx, r.Key(), text)
		if errors.Is(err, store.ErrExists) { // another agent was faster; it will be heard of
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("make pool %s: %w", r.Metadata.Name, err))
			continue
		}
		a.cluster.wrote(store.KV{Key: r.Key(), Value: text, Revision: revision})
		a.changed()
		a.Log.Info("made a pool", "name", r.Metadata.Name, "cidr", want.CIDR)
	}
	return errors.Join(errs...)
}
