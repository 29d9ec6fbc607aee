package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/bgp"
)

// errNoAgent says that nobody answers on the agent's socket.
var errNoAgent = errors.New("no agent answers")

func newNodeCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "This node's agent and its peers",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newNodeStatusCommand(g), newNodeRunCommand(g))
	return cmd
}

func newNodeStatusCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the agent and its BGP sessions",
		Long: `status shows whether this node's agent runs, and its BGP sessions, in calicoctl's table. With -o json or yaml it shows
all that the agent says: its blocks, uplinks, learned routes and what is not as it should be.

Exit code 1: no agent answers.`,
		Example: `  caracalctl node status
  caracalctl node status -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return g.nodeStatus(cmd) },
	}
}

func (g *globals) nodeStatus(cmd *cobra.Command) error {
	s, err := agentStatus(cmd.Context(), g.socket)
	out := cmd.OutOrStdout()
	if errors.Is(err, errNoAgent) && g.output == formatTable {
		fmt.Fprintln(out, "Caracal process is not running.")
		return errFound
	}
	if err != nil {
		return err
	}
	if g.output != formatTable {
		return g.print(cmd, s, nil)
	}
	fmt.Fprintln(out, "Caracal process is running.")
	for _, p := range s.Problems {
		fmt.Fprintf(out, "Problem: %s: %s\n", printable(p.About), printable(p.Text))
	}
	for _, al := range s.Alarms {
		fmt.Fprintf(out, "Alarm: %s: %s\n", al.Kind, printable(al.Text))
	}
	writePeers(out, "IPv4", s.Peers, false)
	writePeers(out, "IPv6", s.Peers, true)
	return nil
}

// agentStatus asks the agent on a socket what it says of itself.
func agentStatus(ctx context.Context, socket string) (agent.Status, error) {
	var s agent.Status
	err := askAgent(ctx, socket, "/v1/status", &s)
	return s, err
}

// askAgent asks the agent on a socket; answer becomes what it says.
func askAgent(ctx context.Context, socket, path string, answer any) error {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	r, err := client.Do(req)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s: %w; start it (systemctl start caracald), or say where it listens (--socket)", socket, errNoAgent)
	}
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(r.Body, 512))
		return fmt.Errorf("ask the agent: %s: %s", r.Status, text)
	}
	if err := json.NewDecoder(r.Body).Decode(answer); err != nil {
		return fmt.Errorf("read the agent's answer: %w", err)
	}
	return nil
}

// writePeers writes the sessions of one family as calicoctl does (calicoctl/commands/node/status.go).
func writePeers(out io.Writer, family string, peers []bgp.PeerStatus, v6 bool) {
	var rows [][]string
	for _, p := range peers {
		if p.Address.Is6() == v6 {
			rows = append(rows, []string{p.Address.String(), p.Kind.String(), p.State, since(p.Since), p.Info})
		}
	}
	fmt.Fprintf(out, "\n%s BGP status\n", family)
	if len(rows) == 0 {
		fmt.Fprintf(out, "No %s peers found.\n", family)
	} else {
		boxed(out, []string{"PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO"}, rows)
	}
	if v6 {
		fmt.Fprintln(out)
	}
}

// since is a time as BIRD prints it: of today, or the date.
func since(t time.Time) string {
	if time.Since(t) < 20*time.Hour {
		return t.Local().Format("15:04:05")
	}
	return t.Local().Format("2006-01-02")
}

// boxed writes a table in a frame, its head in the middle of each column.
func boxed(out io.Writer, head []string, rows [][]string) {
	widths := make([]int, len(head))
	for _, row := range append([][]string{head}, rows...) {
		for i, c := range row {
			widths[i] = max(widths[i], len(c))
		}
	}
	line := "+"
	for _, w := range widths {
		line += strings.Repeat("-", w+2) + "+"
	}
	fmt.Fprint(out, line, "\n|")
	for i, h := range head {
		gap := widths[i] - len(h)
		fmt.Fprint(out, " ", strings.Repeat(" ", gap/2), h, strings.Repeat(" ", gap-gap/2), " |")
	}
	fmt.Fprint(out, "\n", line, "\n")
	for _, row := range rows {
		fmt.Fprint(out, "|")
		for i, c := range row {
			fmt.Fprintf(out, " %-*s |", widths[i], c)
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintln(out, line)
}

func newBGPCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bgp",
		Short: "This node's BGP sessions",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "peers",
		Short:   "List the BGP sessions with their routes and last errors",
		Example: "  caracalctl bgp peers\n  caracalctl bgp peers -o json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := agentStatus(cmd.Context(), g.socket)
			if err != nil {
				return err
			}
			t := newTable("PEER", "TYPE", "AS", "STATE", "SINCE", "ACCEPTED", "ANNOUNCED", "INFO", "LAST ERROR")
			for _, p := range s.Peers {
				t.add(p.Address, p.Kind, p.ASN, p.State, since(p.Since), p.IPv4.Accepted+p.IPv6.Accepted, p.IPv4.Announced+p.IPv6.Announced, p.Info, p.LastError)
			}
			return g.print(cmd, s.Peers, t)
		},
	})
	return cmd
}
