package cni

import (
	"crypto/sha1"
	"encoding/hex"
	"strings"
)

// HostIfName is the name of an attachment's host interface: "cali" and 11 hex digits.
//
// For a Kubernetes pod's eth0 they are the first of SHA-1("namespace.pod"), as Calico derives them. For another
// container's eth0 they are the first of its id, when that is hexadecimal as runtimes make it, and of the id's SHA-1
// otherwise. For other interfaces network and interface are hashed with them. K8S_POD_NAME without
// K8S_POD_NAMESPACE does not mean Kubernetes: podman sends it.
func HostIfName(env *Env, network string) string {
	workload := env.ContainerID
	if ns, pod := env.Args["K8S_POD_NAMESPACE"], env.Args["K8S_POD_NAME"]; ns != "" && pod != "" {
		workload = ns + "." + pod
		if env.IfName == "eth0" {
			return "cali" + digits(workload)
		}
	} else if env.IfName == "eth0" {
		if len(workload) >= 12 && strings.Trim(workload, "0123456789abcdef") == "" {
			return "cali" + workload[:11]
		}
		return "cali" + digits(workload)
	}
	return "cali" + digits(workload+"."+network+"."+env.IfName)
}

func digits(s string) string {
	sum := sha1.Sum([]byte(s))
	return hex.EncodeToString(sum[:])[:11]
}
