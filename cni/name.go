package cni

import (
	"crypto/sha1"
	"encoding/hex"
)

// HostIfName is the name of an attachment's host interface: "cali" and 11 hex digits.
//
// For a Kubernetes pod's eth0 they are the first of SHA-1("namespace.pod"), as Calico derives them; for another container's
// eth0 of its id's SHA-1, because ids of one runtime may begin alike; for other interfaces network and interface are hashed
// with them. K8S_POD_NAME without K8S_POD_NAMESPACE does not mean Kubernetes: podman sends it.
func HostIfName(env *Env, network string) string {
	workload := env.ContainerID
	if ns, pod := env.Args["K8S_POD_NAMESPACE"], env.Args["K8S_POD_NAME"]; ns != "" && pod != "" {
		workload = ns + "." + pod
	}
	if env.IfName != "eth0" {
		workload += "." + network + "." + env.IfName
	}
	sum := sha1.Sum([]byte(workload))
	return "cali" + hex.EncodeToString(sum[:])[:11]
}
