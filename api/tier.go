package api

import "math"

// Tiers that are there without a resource, in the order of their names' orders.
const (
	AdminTier    = "adminnetworkpolicy" // of AdminNetworkPolicy, and of ClusterNetworkPolicy with tier Admin
	DefaultTier  = "default"
	BaselineTier = "baselineadminnetworkpolicy"
)

// Tier is a place in the order of policies.
type Tier struct {
	Order         *float64 `json:"order,omitempty"`         // the lower comes first; nil: last. Of the same order the names decide
	DefaultAction string   `json:"defaultAction,omitempty"` // Deny (default) or Pass: what befalls what a policy selects and no rule matches
}

// BuiltinTier is what a tier is that is there without a resource.
func BuiltinTier(name string) (Tier, bool) {
	order, action := 0.0, "Pass"
	switch name {
	case AdminTier:
		order = 1000
	case DefaultTier:
		order, action = 1_000_000, "Deny"
	case BaselineTier:
		order = 10_000_000
	default:
		return Tier{}, false
	}
	return Tier{&order, action}, true
}

// Complete validates the tier and fills in what it leaves open.
func (t *Tier) Complete(name string) error {
	if builtin, ok := BuiltinTier(name); ok {
		if t.Order != nil && *t.Order != *builtin.Order {
			return invalid("order", "that of tier %s is %.0f; leave it out", name, *builtin.Order)
		}
		if t.DefaultAction != "" && t.DefaultAction != builtin.DefaultAction {
			return invalid("defaultAction", "that of tier %s is %s; leave it out", name, builtin.DefaultAction)
		}
		*t = builtin
	}
	switch t.DefaultAction {
	case "":
		t.DefaultAction = "Deny"
	case "Deny", "Pass":
	default:
		return invalid("defaultAction", "%.80q: Deny or Pass", t.DefaultAction)
	}
	return nil
}

// OrderOf is an order as a number to compare: one that is not there comes last.
func OrderOf(order *float64) float64 {
	if order == nil {
		return math.Inf(1)
	}
	return *order
}
