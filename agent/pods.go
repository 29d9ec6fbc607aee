package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/pause"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// KubernetesReports is what is told of pods and of policy in the API server.
type KubernetesReports interface {
	// Announce says which addresses a Pod has, the one of eth0 first. ErrNotFound: there is none of that uid.
	Announce(ctx context.Context, namespace, name, uid string, addrs []netip.Addr) error
	// Denied tells of a pod that could not be added. It does not wait, and leaves out what comes too often.
	Denied(namespace, name, uid, message string)
	// Report says of a resource, by its key in the store, what keeps it from being in force on this node; nil: nothing does, which
	// takes back what this node has said, and nothing else.
	Report(ctx context.Context, key string, problem error) error
	// Reported are the keys, of those that begin with one of the prefixes, of which this node has said so.
	Reported(ctx context.Context, prefixes []string) ([]string, error)
}

// DefaultPodWait is how long a new pod waits for Kubernetes to tell of it: less than the plugin waits for the agent.
const DefaultPodWait = 1500 * time.Millisecond

// MaxPodWait is the longest that PodWait may be: the plugin does not wait longer than 2 s.
const MaxPodWait = 1700 * time.Millisecond

func (c *Config) podWait() time.Duration { return min(cmp.Or(c.PodWait, DefaultPodWait), MaxPodWait) }

// split parts this node's pods into those that Kubernetes knows, and others.
func split(pods []node.Endpoint) (known, others []node.Endpoint) {
	for _, pod := range pods {
		if enforce.OfKubernetes(pod) {
			known = append(known, pod)
		} else {
			others = append(others, pod)
		}
	}
	return known, others
}

// announce tells Kubernetes which addresses its pods have, as soon as these are known: a kubelet does when all containers run, or
// later. mine are this node's Pods, by key. Nothing is taken back: what is gone is no Pod any more.
func (s *policies) announce(ctx context.Context, pods []node.Endpoint, mine map[string]api.Resource) error {
	pods = slices.SortedStableFunc(slices.Values(pods), func(a, b node.Endpoint) int { // kubelets take eth0's for the pod's
		return cmp.Compare(min(1, len(strings.TrimPrefix(a.IfName, "eth0"))), min(1, len(strings.TrimPrefix(b.IfName, "eth0"))))
	})
	addrs := make(map[string][]netip.Addr)
	for _, pod := range pods {
		addrs[pod.PodUID] = append(addrs[pod.PodUID], pod.Addrs...)
	}
	for uid := range s.announced {
		if addrs[uid] == nil {
			delete(s.announced, uid)
		}
	}
	var errs []error
	for _, pod := range pods {
		r, heard := mine[podKind.Key(pod.PodNamespace, pod.PodName)]
		spec, _ := r.Spec.(*api.Pod)
		if !heard || !enforce.IsPod(&r, pod) {
			continue // when it is heard of
		}
		all := addrs[pod.PodUID]
		text := fmt.Sprint(all)
		if s.announced[pod.PodUID] == text || slices.Equal(spec.IPs, all) {
			continue
		}
		err := s.a.Kubernetes.Announce(ctx, pod.PodNamespace, pod.PodName, r.Metadata.UID, all)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			if errs = append(errs, fmt.Errorf("announce pod %s/%s: %w", pod.PodNamespace, pod.PodName, err)); errors.Is(err, store.ErrUnavailable) {
				break // it will not be there for the next one
			}
			continue
		}
		s.announced[pod.PodUID] = text
	}
	return errors.Join(errs...)
}

var podKind = policyKinds["pods"]

// maxMessage is how much of a message is told, bytes: Kubernetes takes 1024.
const maxMessage = 1000

// serveDenied takes what a plugin could not add, and answers at once.
func (a *Agent) serveDenied(w http.ResponseWriter, r *http.Request) {
	var d cni.Denied
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxEndpoint)).Decode(&d); err != nil || d.Namespace == "" || d.Name == "" {
		http.Error(w, "a pod's namespace, name and uid, and a message are expected", http.StatusBadRequest)
		return
	}
	if a.Kubernetes != nil {
		d.Message = d.Message[:min(maxMessage, len(d.Message))]
		a.Kubernetes.Denied(d.Namespace, d.Name, d.UID, strings.ToValidUTF8(d.Message, ""))
	}
	w.WriteHeader(http.StatusNoContent)
}

// What keeps policies from being in force all nodes may find out at once. The first one says it, and the others find it said:
// each looks after a random time, so many in a second of all, and now and then again as long as it finds the same.
const (
	reportsPerSecond = 100
	reportAgain      = 5 * time.Minute
)

// trouble is a resource that is not in force as people want it.
type trouble struct {
	err   error
	after time.Time // when to look whether that is said
}

// report keeps Kubernetes told of what is not in force on this node until ctx ends.
func (s *policies) report(ctx context.Context) {
	told := make(map[string]*trouble) // nil: it is over
	known := false
	tick := time.NewTicker(localLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		wrong, listed := s.wrong, s.listed
		s.mu.Unlock()
		if !listed {
			continue
		}
		if !known { // what an earlier agent of this node said may be over
			var prefixes []string
			for _, k := range policyKinds {
				prefixes = append(prefixes, k.Prefix(""))
			}
			keys, err := s.a.Kubernetes.Reported(ctx, prefixes)
			if s.a.problem("reports", err); err != nil {
				pause.For(ctx, retryTo)
				continue
			}
			known = true
			for _, key := range keys {
				told[key] = &trouble{}
			}
		}
		s.tellTroubles(ctx, told, wrong)
	}
}

func (s *policies) tellTroubles(ctx context.Context, told map[string]*trouble, wrong map[string]error) {
	now := time.Now()
	spread := sync.OnceValue(s.a.reportSpread) // reads all that is known of the cluster
	for key, err := range wrong {
		if have := told[key]; have == nil || have.err == nil || have.err.Error() != err.Error() {
			told[key] = &trouble{err, now.Add(rand.N(spread()))}
		}
	}
	var failed error
	looked := false
	for key, t := range told {
		if wrong[key] == nil && t.err != nil {
			*t = trouble{}
		}
		if now.Before(t.after) || ctx.Err() != nil {
			continue
		}
		err := s.a.Kubernetes.Report(ctx, key, t.err)
		looked = true
		switch {
		case errors.Is(err, store.ErrNotFound):
			delete(told, key)
		case err != nil:
			failed = fmt.Errorf("report %s: %w", key, err)
			t.after = now.Add(retryTo)
		case t.err == nil:
			delete(told, key)
		default:
			t.after = now.Add(reportAgain + rand.N(reportAgain))
		}
	}
	if ctx.Err() == nil && looked {
		s.a.problem("reports", failed)
	}
}

// reportSpread is the time over which all nodes spread what all of them want to say.
func (a *Agent) reportSpread() time.Duration {
	nodes := 1
	if v, known := a.cluster.view(); known {
		nodes = max(1, len(v.nodes))
	}
	return time.Duration(nodes) * time.Second / reportsPerSecond
}
