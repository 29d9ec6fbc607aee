// Package deploy is what Caracal is run with: the unit for systemd, the recipe of the container image, and the
// manifests for Kubernetes.
package deploy

import _ "embed"

// Unit is caracald.service.
//
//go:embed caracald.service
var Unit []byte

// Roles is kubernetes/rbac.yaml: what a node may do in a cluster.
//
//go:embed kubernetes/rbac.yaml
var Roles []byte
