package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/internal/netns"
)

// ErrFilterMissing says that the program that loads rules is not installed.
var ErrFilterMissing = errors.New("program not found")

// filter puts rules in force for what a host forwards, and tells which program did. What is established passes by the rules:
// the host's connection tracking finds that out, as the CNI plugins that use such rules do it.
type filter func(ctx context.Context, host *netns.NS, list []rule) (string, error)

// tables are the programs that load rules for iptables. The legacy one is iptables itself; the other one makes them rules
// of nftables, which have a datapath of their own here.
var tables = []string{"iptables-legacy", "iptables"}

func needTables() error {
	for _, t := range tables {
		if _, err := exec.LookPath(t + "-restore"); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%w: iptables-restore: install the package iptables", ErrFilterMissing)
}

func byIPTables(ctx context.Context, host *netns.NS, list []rule) (string, error) {
	var text bytes.Buffer
	text.WriteString("*filter\n:FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n")
	for _, r := range list {
		fmt.Fprintf(&text, "-A FORWARD -s %s", r.peer)
		if r.protocol != 0 {
			name := protocolName(r.protocol)
			fmt.Fprintf(&text, " -p %s -m %s --dport %d", name, name, r.port)
		}
		fmt.Fprintf(&text, " -j %s\n", map[bool]string{true: "ACCEPT", false: "DROP"}[r.allow])
	}
	text.WriteString("COMMIT\n")
	var errs []error
	for _, t := range tables {
		err := load(ctx, host, text.Bytes(), t+"-restore", "-w")
		if err == nil {
			return version(ctx, t)
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

func needNFT() error {
	if _, err := exec.LookPath("nft"); err != nil {
		return fmt.Errorf("%w: nft: install the package nftables", ErrFilterMissing)
	}
	return nil
}

func byNFT(ctx context.Context, host *netns.NS, list []rule) (string, error) {
	var text bytes.Buffer
	text.WriteString("table inet podbench {\nchain forward {\ntype filter hook forward priority filter; policy drop;\nct state established,related accept\n")
	for _, r := range list {
		fmt.Fprintf(&text, "ip saddr %s", r.peer)
		if r.protocol != 0 {
			fmt.Fprintf(&text, " %s dport %d", protocolName(r.protocol), r.port)
		}
		fmt.Fprintln(&text, "", map[bool]string{true: "accept", false: "drop"}[r.allow])
	}
	text.WriteString("}\n}\n")
	if err := load(ctx, host, text.Bytes(), "nft", "-f", "-"); err != nil {
		return "", err
	}
	return version(ctx, "nft")
}

func protocolName(p uint8) string {
	return map[uint8]string{protocolTCP: "tcp", protocolUDP: "udp"}[p]
}

// load runs a command in the host's namespace.
func load(ctx context.Context, host *netns.NS, stdin []byte, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := host.Do(cmd.Start); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	if err := cmd.Wait(); err != nil {
		said, _, _ := strings.Cut(strings.TrimSpace(out.String()), "\n")
		return fmt.Errorf("%s: %w: %.200s", name, err, said)
	}
	return nil
}

func version(ctx context.Context, name string) (string, error) {
	out, err := exec.CommandContext(ctx, name, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

func flushConntrack() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("flush tracked connections: %w", err)
	}
	return nil
}
