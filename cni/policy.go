package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	stdmaps "maps"
	"os"
	"slices"
	"time"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

// PolicyConfig is the policy object: unknown, which says what a pod gets whose policy is not known, "allow" (as when there is
// none) or "deny" until it is known; absent: "allow". Beside it Calico's keys may stand, which have no effect.
type PolicyConfig map[string]json.RawMessage

var calicoPolicy = []string{
	"type", "k8s_api_root", "k8s_auth_token", "k8s_certificate_authority", "k8s_client_certificate", "k8s_client_key",
}

// check is strict about keys too: one that is spelt wrong would leave pods open.
func (p PolicyConfig) check() error {
	for _, key := range slices.Sorted(stdmaps.Keys(p)) {
		if key != "unknown" && !slices.Contains(calicoPolicy, key) {
			return fail(codeConfig, `policy: no key %s is known; there is unknown, which is "allow" or "deny"`, quoted(key))
		}
	}
	value := string(p["unknown"])
	if p["unknown"] != nil && value != `"allow"` && value != `"deny"` {
		return fail(codeConfig, `policy.unknown: neither "allow" nor "deny" but %s`, shortened(value))
	}
	return nil
}

// deniesUnknown tells whether a pod whose policy is not known is cut off.
func (p PolicyConfig) deniesUnknown() bool { return string(p["unknown"]) == `"deny"` }

// deniesUnknown tells whether the pod is cut off as long as its policy is not known. One that names profiles is: these are its policy.
func (a *adding) deniesUnknown() bool {
	return a.c.Policy.deniesUnknown() || len(a.record.Profiles) > 0
}

// unknownPolicy are the policy ids of a pod whose policy is not known: all is dropped.
var unknownPolicy = policy.PodPolicies{Ingress: maps.PolicyUnknown, Egress: maps.PolicyUnknown}

const (
	agentPatience = 2 * time.Second  // with an agent that listens and does not answer
	otherPatience = 10 * time.Second // with another ADD that keeps the policy: the worst is a large one from nothing
	lookAgain     = 5 * time.Millisecond
)

// enforce puts the pod's policy in force, before the pod can send or be sent anything: by the agent if there is one, else
// here, as it was known last. Until then the maps have the pod as one of unknown policy; if it stays that, the configuration
// says what becomes of it; but a pod about which policy was known to have something to say is never let do everything. An agent
// that knows better mends it later.
func (a *adding) enforce(ctx context.Context) error {
	if !a.judged {
		return nil
	}
	why := a.findPolicy(ctx)
	known, err := a.policyKnown()
	if err != nil {
		return err
	}
	if known {
		if why != nil { // about something else
			a.log.Warn("policy", "error", why)
		}
		return nil
	}
	if why == nil {
		why = fmt.Errorf("who answers on %s has not put it in force; is that the agent of the node with this bpffs_dir and state_dir? Set agent_socket", a.c.AgentSocket)
	}
	if (errors.Is(why, enforce.ErrRefused) || errors.Is(why, errRefused)) && !a.c.Policy.deniesUnknown() { // known, and not for this pod
		return fail(codeTryAgain, "%s: its policy can't be put in force: %s", a.key, why)
	}
	denied := a.deniesUnknown()
	if !denied { // what was known last is about the pod: then it waits for who keeps policy
		denied, err = enforce.Selects(ctx, a.c.StateDir, a.record)
		if errors.Is(err, enforce.ErrNoDatabase) || errors.Is(err, enforce.ErrCorrupt) {
			err = nil
		}
	}
	a.log.Warn("the pod's policy is not known", "endpoint", a.key.String(), "error", errors.Join(why, err), "denied", denied)
	if denied {
		return nil
	}
	return a.openUnknown(ctx)
}

// findPolicy asks whoever keeps this node's policy, or keeps it for the moment. nil: the maps should have the pod's by now.
func (a *adding) findPolicy(ctx context.Context) error {
	for deadline := time.Now().Add(otherPatience); ; {
		p, err := enforce.Load(ctx, enforce.Config{Dir: a.c.StateDir, Maps: a.maps, Log: a.log})
		if err == nil {
			return errors.Join(a.commitPolicy(ctx, p), p.Close())
		}
		if !errors.Is(err, enforce.ErrHeld) {
			return err
		}
		path := "/v1/policy/endpoint"
		if a.unheard {
			path += "?waited"
		}
		if err := ask(ctx, a.c.AgentSocket, path, a.trace.Values(), a.record, agentPatience); !errors.Is(err, errNoAgent) || time.Now().After(deadline) {
			return err
		}
		// Another ADD, or an agent that begins or has just ended. An ADD does it for all pods that are recorded.
		if known, err := a.policyKnown(); known || err != nil {
			return err
		}
		select {
		case <-time.After(lookAgain):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// mayHear tells whether an agent may know more of the pod by now than this node did ever: one of Kubernetes that begins.
func (a *adding) mayHear() bool {
	if !enforce.OfKubernetes(a.record) {
		return false
	}
	_, err := os.Stat(a.c.AgentSocket)
	return err == nil
}

// commitPolicy puts the last known policy in force for the pods that are recorded by now.
func (a *adding) commitPolicy(ctx context.Context, p *enforce.Policy) error {
	var pods []node.Endpoint
	err := a.read(ctx, a.c, func(tx *node.Tx) (err error) {
		pods, err = tx.AllEndpoints()
		return err
	})
	if err != nil {
		return err
	}
	p.SetLocal(pods)
	if _, err = p.Commit(ctx); err == nil && p.Awaits(a.record) {
		err = fmt.Errorf("Pod %s/%s with uid %s was not heard of before the agent went", a.record.PodNamespace, a.record.PodName, a.record.PodUID)
	}
	return err
}

// policyKnown tells whether somebody has given the pod its policy.
func (a *adding) policyKnown() (bool, error) {
	pod, err := a.maps.Pod(uint32(a.veth.hostIndex))
	if errors.Is(err, maps.ErrNotFound) {
		return false, a.removed()
	}
	return pod.PolicyIngress != maps.PolicyUnknown && pod.PolicyEgress != maps.PolicyUnknown, err
}

// openUnknown lets the pod do everything, unless its policy has become known.
func (a *adding) openUnknown(ctx context.Context) error {
	lock, err := node.LockNode(ctx, a.c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if known, err := a.policyKnown(); known || err != nil {
		return err
	}
	return commit.AddPod(a.maps, a.pod(policy.PodPolicies{}))
}
