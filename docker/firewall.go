package docker

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
)

// forwarded are the rules by which the host's firewall leaves containers' packets to policy.
var forwarded = []string{
	"FORWARD -i cali+ -m comment --comment caracal -j ACCEPT",
	"FORWARD -o cali+ -m comment --comment caracal -j ACCEPT",
}

// allowForwarding adds rules behind all others where the firewall drops what no rule accepts: Docker makes it do so. A program
// that is not there is passed by: then nothing is known.
func allowForwarding(ctx context.Context) (added []string, err error) {
	for _, program := range []string{"iptables", "ip6tables"} {
		path, err := exec.LookPath(program)
		if err != nil {
			continue
		}
		out, err := exec.CommandContext(ctx, path, "-w", "5", "-S", "FORWARD").Output()
		if err != nil {
			return added, fmt.Errorf("%s: list what is forwarded: %w", program, err)
		}
		for _, rule := range missing(string(out)) {
			args := append([]string{"-w", "5", "-A"}, strings.Fields(rule)...)
			if out, err := exec.CommandContext(ctx, path, args...).CombinedOutput(); err != nil {
				return added, fmt.Errorf("%s -A %s: %w: %s", program, rule, err, strings.TrimSpace(string(out)))
			}
			added = append(added, program+" -A "+rule)
		}
	}
	return added, nil
}

// missing are the rules that a chain lacks, as "iptables -S" lists it.
func missing(chain string) []string {
	lines := strings.Split(chain, "\n")
	has := func(want string) bool {
		for _, l := range lines {
			if strings.TrimSpace(l) == want {
				return true
			}
		}
		return false
	}
	if !has("-P FORWARD DROP") {
		return nil
	}
	var rules []string
	for _, r := range forwarded {
		if !has("-A " + r) {
			rules = append(rules, r)
		}
	}
	return rules
}
