package cni

import (
	"strings"

	"github.com/caracal-net/caracal/node"
)

// Env is the CNI parameters in the environment (CNI specification 1.1.0, section 2).
type Env struct {
	Command     string
	ContainerID string
	Netns       string
	IfName      string
	Args        map[string]string
	Path        string
}

// knownArgs are the keys of CNI_ARGS that mean something here.
var knownArgs = map[string]bool{
	"IgnoreUnknown": true, "IP": true, "MAC": true,
	"K8S_POD_NAME": true, "K8S_POD_NAMESPACE": true, "K8S_POD_INFRA_CONTAINER_ID": true, "K8S_POD_UID": true,
}

// ParseEnv reads and validates the parameters that the command needs, and names all that are missing or wrong at once.
func ParseEnv(getenv func(string) string) (*Env, error) {
	e := &Env{
		Command: getenv("CNI_COMMAND"), ContainerID: getenv("CNI_CONTAINERID"), Netns: getenv("CNI_NETNS"),
		IfName: getenv("CNI_IFNAME"), Path: getenv("CNI_PATH"),
	}
	var bad []string
	need := func(name, value string) bool {
		if value == "" {
			bad = append(bad, name+" is missing")
		}
		return value != ""
	}
	switch e.Command {
	case "ADD", "DEL", "CHECK":
		if need("CNI_CONTAINERID", e.ContainerID) && !validName(e.ContainerID) {
			bad = append(bad, "CNI_CONTAINERID "+quoted(e.ContainerID)+" must begin with a letter or digit and hold only letters, digits, '_', '.' and '-'")
		}
		if need("CNI_IFNAME", e.IfName) && !validIfName(e.IfName) {
			bad = append(bad, "CNI_IFNAME "+quoted(e.IfName)+" is no interface name: 1 to 15 bytes, not . or .., without '/', ':' and white space")
		} else if e.Command == "ADD" && !isVerbatim(e.IfName) {
			bad = append(bad, "CNI_IFNAME "+quoted(e.IfName)+" is no name that the kernel gives an interface: all, default, or one with a '%'")
		}
		if e.Command != "DEL" {
			need("CNI_NETNS", e.Netns)
		}
	case "GC", "STATUS", "VERSION":
	case "":
		bad = append(bad, "CNI_COMMAND is missing: a container runtime calls this program, with its parameters in the environment and the configuration on stdin")
	default:
		bad = append(bad, "CNI_COMMAND "+quoted(e.Command)+" is none of ADD, DEL, CHECK, GC, STATUS, VERSION")
	}
	args, problem := parseArgs(getenv("CNI_ARGS"))
	if problem != "" && e.Command != "VERSION" && e.Command != "DEL" {
		bad = append(bad, "CNI_ARGS: "+problem)
	}
	e.Args = args
	if len(bad) > 0 {
		return e, &Error{Code: codeEnvironment, Msg: "invalid environment: " + strings.Join(bad, "; ")}
	}
	return e, nil
}

// parseArgs reads CNI_ARGS, KEY=VALUE pairs between semicolons.
func parseArgs(s string) (map[string]string, string) {
	args := make(map[string]string)
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return args, "no '=' in " + quoted(pair)
		}
		args[k] = v
	}
	if ignore := strings.ToLower(args["IgnoreUnknown"]); ignore == "1" || ignore == "true" {
		return args, ""
	}
	for k := range args {
		if !knownArgs[k] {
			return args, "unknown key " + quoted(k) + "; add IgnoreUnknown=1 to pass it by"
		}
	}
	return args, ""
}

func quoted(s string) string { return `"` + shortened(s) + `"` }

func shortened(s string) string {
	if len(s) > 64 {
		s = s[:64] + "..."
	}
	return s
}

// key names the attachment.
func (e *Env) key(c *Config) node.Key {
	return node.Key{Network: c.Name, ContainerID: e.ContainerID, IfName: e.IfName}
}
