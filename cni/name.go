package cni

import (
	"crypto/sha1"
	"encoding/hex"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
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

// validName tells whether s is a network name or container id: a letter or digit, then letters, digits, '_', '.' and '-'
// (CNI specification 1.1.0, sections 1 and 2).
func validName(s string) bool {
	for i, r := range s {
		alphanumeric := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alphanumeric && (i == 0 || !strings.ContainsRune("_.-", r)) {
			return false
		}
	}
	return s != ""
}

// validIfName tells whether the kernel takes s as an interface's name (dev_valid_name in net/core/dev.c).
func validIfName(s string) bool {
	return s != "" && len(s) < unix.IFNAMSIZ && s != "." && s != ".." &&
		!strings.ContainsFunc(s, func(r rune) bool { return r == '/' || r == ':' || unicode.IsSpace(r) })
}

// isVerbatim tells whether an interface that is made with a valid name gets that very one: the kernel keeps "all" and
// "default" for sysctls, and takes '%' for the place of a number.
func isVerbatim(s string) bool {
	return s != "all" && s != "default" && !strings.Contains(s, "%")
}
