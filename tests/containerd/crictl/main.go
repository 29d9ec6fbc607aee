// Command crictl stands in for cri-tools' program of that name where docs/containerd.md is run: it knows as much of its command
// line, files and output as that page shows.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/tests/containerd/cri"
)

func main() {
	if err := newCommand().Execute(); err != nil {
		code := 1
		if exit := new(cri.ExitError); errors.As(err, &exit) {
			code = exit.Code
		}
		fmt.Fprintln(os.Stderr, "FATA[0000]", err)
		os.Exit(code)
	}
}

func newCommand() *cobra.Command {
	root := &cobra.Command{Use: "crictl", SilenceErrors: true, SilenceUsage: true}
	var quiet, all, force bool
	var name string
	add := func(use string, args cobra.PositionalArgs, run func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error) *cobra.Command {
		cmd := &cobra.Command{Use: use, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
			c, err := cri.Dial("/run/containerd/containerd.sock")
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			return run(ctx, c, os.Stdout, args)
		}}
		cmd.Flags().SetInterspersed(false)
		root.AddCommand(cmd)
		return cmd
	}
	add("runp POD-FILE", cobra.ExactArgs(1), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		_, id, err := runPod(ctx, c, args[0])
		if err == nil {
			fmt.Fprintln(w, id)
		}
		return err
	})
	add("run CONTAINER-FILE POD-FILE", cobra.ExactArgs(2), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		container := new(v1.ContainerConfig)
		if err := read(args[0], container); err != nil {
			return err
		}
		pod, id, err := runPod(ctx, c, args[1])
		if err != nil {
			return err
		}
		if id, err = c.Start(ctx, id, pod, container); err == nil {
			fmt.Fprintln(w, id)
		}
		return err
	})
	pods := add("pods", cobra.NoArgs, func(ctx context.Context, c *cri.Client, w io.Writer, _ []string) error {
		list, err := c.Pods(ctx)
		if err != nil {
			return err
		}
		t := newTable(w, quiet, "POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "RUNTIME")
		for _, p := range list {
			if name == "" || p.Metadata.Name == name {
				state := map[v1.PodSandboxState]string{v1.PodSandboxState_SANDBOX_READY: "Ready"}[p.State]
				if state == "" {
					state = "NotReady"
				}
				t.row(p.Id, since(p.CreatedAt), state, p.Metadata.Name, p.Metadata.Namespace, fmt.Sprint(p.Metadata.Attempt), "(default)")
			}
		}
		return t.Flush()
	})
	ps := add("ps", cobra.NoArgs, func(ctx context.Context, c *cri.Client, w io.Writer, _ []string) error {
		list, err := c.ListContainers(ctx, &v1.ListContainersRequest{})
		if err != nil {
			return err
		}
		t := newTable(w, quiet, "CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID")
		for _, p := range list.Containers {
			if (name == "" || p.Metadata.Name == name) && (all || p.State == v1.ContainerState_CONTAINER_RUNNING) {
				state := strings.TrimPrefix(p.State.String(), "CONTAINER_")
				t.row(p.Id, p.Image.Image, since(p.CreatedAt), state[:1]+strings.ToLower(state[1:]), p.Metadata.Name, fmt.Sprint(p.Metadata.Attempt), p.PodSandboxId[:13])
			}
		}
		return t.Flush()
	})
	for _, cmd := range []*cobra.Command{pods, ps} {
		cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "only the ids")
		cmd.Flags().StringVar(&name, "name", "", "of this name")
	}
	ps.Flags().BoolVarP(&all, "all", "a", false, "also those that do not run")
	add("inspectp POD", cobra.ExactArgs(1), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		r, err := c.PodSandboxStatus(ctx, &v1.PodSandboxStatusRequest{PodSandboxId: args[0]})
		if err != nil {
			return err
		}
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(map[string]any{"status": r.Status})
	})
	sync := false
	exec := add("exec CONTAINER COMMAND...", cobra.MinimumNArgs(2), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		if !sync {
			return errors.New("this stand-in has only exec -s")
		}
		out, err := c.Exec(ctx, args[0], args[1:]...)
		fmt.Fprint(w, out)
		return err
	})
	exec.Flags().BoolVarP(&sync, "sync", "s", false, "wait for the end, and show the output then")
	add("stopp POD...", cobra.MinimumNArgs(1), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		for _, id := range args {
			if err := c.Stop(ctx, id); err != nil {
				return err
			}
			fmt.Fprintln(w, "Stopped sandbox", id)
		}
		return nil
	})
	rmp := add("rmp POD...", cobra.MinimumNArgs(1), func(ctx context.Context, c *cri.Client, w io.Writer, args []string) error {
		for _, id := range args {
			if force {
				if err := c.Stop(ctx, id); err != nil {
					return err
				}
				fmt.Fprintln(w, "Stopped sandbox", id)
			}
			if err := c.Remove(ctx, id); err != nil {
				return err
			}
			fmt.Fprintln(w, "Removed sandbox", id)
		}
		return nil
	})
	rmp.Flags().BoolVarP(&force, "force", "f", false, "stop it first")
	return root
}

func runPod(ctx context.Context, c *cri.Client, file string) (*v1.PodSandboxConfig, string, error) {
	pod := new(v1.PodSandboxConfig)
	if err := read(file, pod); err != nil {
		return nil, "", err
	}
	id, err := c.Run(ctx, pod)
	if err != nil {
		return nil, "", fmt.Errorf("run pod sandbox: %w", err)
	}
	return pod, id, nil
}

// read reads a file of JSON or YAML whose keys are those of the CRI's messages.
func read(file string, into any) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := yaml.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

func since(nanoseconds int64) string {
	return time.Since(time.Unix(0, nanoseconds)).Round(time.Second).String() + " ago"
}

// table is a listing, or only its first column.
type table struct {
	*tabwriter.Writer
	quiet bool
}

func newTable(w io.Writer, quiet bool, columns ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 4, ' ', 0), quiet}
	if !quiet {
		fmt.Fprintln(t, strings.Join(columns, "\t"))
	}
	return t
}

func (t table) row(cells ...string) {
	if t.quiet {
		fmt.Fprintln(t, cells[0])
		return
	}
	cells[0] = cells[0][:13]
	fmt.Fprintln(t, strings.Join(cells, "\t"))
}
