package docker

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// forwarded are the rules by which the host's firewall leaves containers' packets to policy.
var forwarded = []string{
	"FORWARD -i cali+ -m comment --comment caracal -j ACCEPT",
	"FORWARD -o cali+ -m comment --comment caracal -j ACCEPT",
}

// allowForwarding adds rules behind all others where the firewall drops what no rule accepts: Docker makes it do so.
func allowForwarding(ctx context.Context) (added []string, err error) {
	return eachFirewall(ctx, "-A", missing)
}

// RemoveForwarding removes the rules that an agent has added to the firewall for containers, and returns them; with dryRun only that.
func RemoveForwarding(ctx context.Context, dryRun bool) (removed []string, err error) {
	verb := "-D"
	if dryRun {
		verb = "-C" // is it there?
	}
	return eachFirewall(ctx, verb, present)
}

// eachFirewall changes the rules that which finds in the chain FORWARD, as "iptables -S" lists it. A program that is not there
// is passed by: then nothing is known.
func eachFirewall(ctx context.Context, verb string, which func(chain string) []string) (done []string, err error) {
	for _, program := range []string{"iptables", "ip6tables"} {
		path, err := exec.LookPath(program)
		if err != nil {
			continue
		}
		out, err := exec.CommandContext(ctx, path, "-w", "5", "-S", "FORWARD").Output()
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		if err != nil {
			return done, fmt.Errorf("%s: list what is forwarded: %w; see that FORWARD accepts cali+ (docs/docker.md)", program, err)
		}
		for _, rule := range which(string(out)) {
			args := append([]string{"-w", "5", verb}, strings.Fields(rule)...)
			if out, err := exec.CommandContext(ctx, path, args...).CombinedOutput(); err != nil {
				return done, fmt.Errorf("%s %s %s: %w: %s", program, verb, rule, err, strings.TrimSpace(string(out)))
			}
			done = append(done, program+" -A "+rule)
		}
	}
	return done, nil
}

// missing are the rules that a chain lacks.
func missing(chain string) []string {
	if !slices.Contains(lines(chain), "-P FORWARD DROP") {
		return nil
	}
	there := present(chain)
	return slices.DeleteFunc(slices.Clone(forwarded), func(r string) bool { return slices.Contains(there, r) })
}

// present are the rules that a chain has.
func present(chain string) []string {
	all := lines(chain)
	return slices.DeleteFunc(slices.Clone(forwarded), func(r string) bool { return !slices.Contains(all, "-A "+r) })
}

func lines(chain string) []string {
	all := strings.Split(chain, "\n")
	for i := range all {
		all[i] = strings.TrimSpace(all[i])
	}
	return all
}
