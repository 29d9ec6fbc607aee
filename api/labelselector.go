package api

import (
	"maps"
	"slices"
	"strings"
)

// LabelSelector is Kubernetes's way to say which labels something must have; all that it says must be true. The zero value
// selects everything.
type LabelSelector struct {
	MatchLabels      map[string]string  `json:"matchLabels,omitempty"`
	MatchExpressions []LabelRequirement `json:"matchExpressions,omitempty"`
}

// LabelRequirement is a condition on one label.
type LabelRequirement struct {
	Key      string   `json:"key"`
	Operator string   `json:"operator"`         // In, NotIn, Exists, DoesNotExist
	Values   []string `json:"values,omitempty"` // of In and NotIn
}

func (s LabelSelector) check() error {
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		if !validLabelKey(key) {
			return invalid("matchLabels", "%.80q is no label's name", key)
		}
		if value := s.MatchLabels[key]; !validLabelValue(value) {
			return invalid("matchLabels."+key, "%.80q is no label's value: it has letters, digits, '-', '_' and '.' between letters or digits, at most 63", value)
		}
	}
	for i, r := range s.MatchExpressions {
		if err := r.check(); err != nil {
			return at(index("matchExpressions", i), err)
		}
	}
	return nil
}

func (r LabelRequirement) check() error {
	if !validLabelKey(r.Key) {
		return invalid("key", "%.80q is no label's name", r.Key)
	}
	switch r.Operator {
	case "In", "NotIn":
		if len(r.Values) == 0 {
			return invalid("values", "operator %s wants at least one", r.Operator)
		}
	case "Exists", "DoesNotExist":
		if len(r.Values) > 0 {
			return invalid("values", "operator %s has none; leave them out or write In or NotIn", r.Operator)
		}
	default:
		return invalid("operator", "%.80q: In, NotIn, Exists or DoesNotExist", r.Operator)
	}
	for i, v := range r.Values {
		if !validLabelValue(v) {
			return invalid(index("values", i), "%.80q is no label's value", v)
		}
	}
	return nil
}

// validLabelKey tells whether a label can have that name in Kubernetes: "app", "kubernetes.io/metadata.name".
func validLabelKey(key string) bool {
	prefix, name, prefixed := strings.Cut(key, "/")
	if !prefixed {
		prefix, name = "a", key
	}
	return name != "" && validLabelValue(name) && validName(prefix) && !strings.Contains(prefix, ":")
}

func validLabelValue(s string) bool {
	if len(s) > 63 {
		return false
	}
	for i, r := range s {
		alphanumeric := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alphanumeric && (i == 0 || i == len(s)-1 || !strings.ContainsRune("-_.", r)) {
			return false
		}
	}
	return true
}
