package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/node"
)

// DefaultLeakedAfter is how long a pod must be gone, from its node and from Kubernetes, before its address is taken back.
const DefaultLeakedAfter = 5 * time.Minute

// collect takes back the addresses of pods of which no DEL came, now and then until ctx ends.
func (a *Agent) collect(ctx context.Context) {
	after := cmp.Or(a.LeakedAfter, DefaultLeakedAfter)
	tick := time.NewTicker(max(min(after/5, time.Minute), time.Second))
	defer tick.Stop()
	c := &collector{Agent: a, after: after, dead: make(map[node.Key]death)}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.look(ctx); ctx.Err() == nil {
			a.problem("leaked addresses", err)
		}
	}
}

// collector is what collect knows of the pods that it may take back.
type collector struct {
	*Agent
	after time.Duration
	dead  map[node.Key]death
}

// death is when an attachment was first found without its interface.
type death struct {
	mac   string // tells it from a successor of the same key
	since time.Time
}

// look removes the attachments of Kubernetes's pods whose interface has been gone for long, with the network namespace that the
// other end was in, and whose pod the API server does not know. It asks that for each, and never goes by what it heard before.
func (c *collector) look(ctx context.Context) error {
	pods, err := c.pods(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	dead := make(map[node.Key]death)
	var errs []error
	for _, e := range pods {
		if e.PodUID == "" || e.PodNamespace == "" || e.PodName == "" || e.Docker != nil {
			continue
		}
		there, err := cni.Exists(e)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if there {
			continue
		}
		d, known := c.dead[e.Key]
		if !known || d.mac != e.MAC {
			d = death{e.MAC, now}
		}
		dead[e.Key] = d
		if now.Sub(d.since) < c.after {
			continue
		}
		exists, err := c.Kubernetes.PodExists(ctx, e.PodNamespace, e.PodName, e.PodUID)
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("pod %s/%s has no interface any more; whether Kubernetes has it can't be told: %w", e.PodNamespace, e.PodName, err))...)
		}
		if exists {
			continue // its kubelet makes it anew, and its runtime removes this one
		}
		if err := c.step("collect"); err != nil {
			return err
		}
		if err := cni.Collect(ctx, cni.Config{StateDir: c.StateDir, BPFFSDir: c.BPFFSDir, BootIDFile: c.BootIDFile}, c.Log, e.Key); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", e.Key, err))
			continue
		}
		delete(dead, e.Key)
		c.mu.Lock()
		c.collected += uint64(len(e.Addrs))
		c.mu.Unlock()
		c.Log.Info("took back leaked addresses", "endpoint", e.Key.String(), "namespace", e.PodNamespace, "pod", e.PodName, "uid", e.PodUID, "addresses", e.Addrs)
		c.changed()
	}
	c.dead = dead
	return errors.Join(errs...)
}
