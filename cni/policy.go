package cni

import (
	"encoding/json"
	"maps"
	"slices"

	caracal "github.com/caracal-net/caracal/maps"
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
	for _, key := range slices.Sorted(maps.Keys(p)) {
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

// whenUnknown are the policy ids of a pod whose policy is not known.
func (p PolicyConfig) whenUnknown() *policy.PodPolicies {
	if p.deniesUnknown() {
		return &policy.PodPolicies{Ingress: caracal.PolicyUnknown, Egress: caracal.PolicyUnknown}
	}
	return &policy.PodPolicies{}
}
