package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/store"
)

func newApplyCommand(g *globals) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create or change resources",
		Long: `apply reads resources from YAML or JSON, "-" is stdin, and makes the store equal to them. Everything is read and validated
before anything is written.`,
		Example: `  caracalctl apply -f pools.yaml
  calicoctl get ippools -o yaml | caracalctl apply -f -`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := readManifest(cmd, file)
			if err != nil {
				return err
			}
			return g.withStore(cmd.Context(), func(s store.Store) error {
				for _, r := range all {
					done, err := apply(cmd.Context(), s, r)
					if err != nil {
						return fmt.Errorf("%s: %w", r, err)
					}
					fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", r, done)
				}
				return warnFilters(cmd, s, all)
			})
		},
	}
	fileFlag(cmd, &file)
	return cmd
}

// warnFilters warns of peers that name filters which are not there.
func warnFilters(cmd *cobra.Command, s store.Store, all []api.Resource) error {
	kind, err := api.FindKind("BGPFilter")
	if err != nil {
		return err
	}
	for _, r := range all {
		p, ok := r.Spec.(*api.BGPPeer)
		if !ok {
			continue
		}
		for _, name := range p.Filters {
			_, err := s.Get(cmd.Context(), agent.ResourceKey(kind, name))
			if errors.Is(err, store.ErrNotFound) {
				warn(cmd, "%s: there is no BGPFilter %s: without it there is no session", r, name)
			} else if err != nil {
				return err
			}
		}
	}
	return nil
}

func fileFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "file", "f", "", "`FILE` with resources; -: stdin")
	cmd.Flags().StringVar(file, "filename", "", "the same")
	_ = cmd.Flags().MarkHidden("filename") // the flag exists
}

func readManifest(cmd *cobra.Command, file string) ([]api.Resource, error) {
	var data []byte
	var err error
	switch file {
	case "":
		return nil, usagef("say which file (-f FILE, or -f - for stdin)")
	case "-":
		data, err = io.ReadAll(cmd.InOrStdin())
	default:
		data, err = os.ReadFile(file)
	}
	if err != nil {
		return nil, fmt.Errorf("read resources: %w", err)
	}
	all, err := manifest.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return all, nil
}

// apply writes a resource and says what that did. What an agent wrote of its own into a node's stays.
func apply(ctx context.Context, s store.Store, r api.Resource) (string, error) {
	key := agent.ResourceKey(r.Kind, r.Metadata.Name)
	r.Metadata.Revision = ""
	for {
		old, err := s.Get(ctx, key)
		exists := err == nil
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return "", err
		}
		if exists {
			var before api.Resource
			if json.Unmarshal(old.Value, &before) == nil && before.Metadata.Annotations[agent.InstanceAnnotation] != "" {
				if r.Metadata.Annotations == nil {
					r.Metadata.Annotations = make(map[string]string)
				}
				r.Metadata.Annotations[agent.InstanceAnnotation] = before.Metadata.Annotations[agent.InstanceAnnotation]
			}
		}
		text, err := json.Marshal(r)
		if err != nil {
			return "", err
		}
		switch {
		case exists && bytes.Equal(text, old.Value):
			return "unchanged", nil
		case exists:
			if _, err = s.Update(ctx, key, text, old.Revision); err == nil {
				return "changed", nil
			}
		default:
			if _, err = s.Create(ctx, key, text); err == nil {
				return "created", nil
			}
		}
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrExists) && !errors.Is(err, store.ErrNotFound) {
			return "", err
		}
	}
}

func newGetCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "List resources",
		Example: `  caracalctl get ippools
  caracalctl get node h1 -o yaml
  caracalctl get bgpfilters`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, err := api.FindKind(args[0])
			if err != nil {
				return usagef("%w", err)
			}
			return g.withStore(cmd.Context(), func(s store.Store) error { return g.get(cmd, s, kind, args[1:]) })
		},
	}
}

func (g *globals) get(cmd *cobra.Command, s store.Store, kind api.Kind, names []string) error {
	kvs, _, err := s.List(cmd.Context(), agent.ResourceKey(kind, ""))
	if err != nil {
		return err
	}
	all := []api.Resource{}
	t := newTable("NAME", "SPEC")
	for _, kv := range kvs {
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return fmt.Errorf("%s in the store: %w", kv.Key, err)
		}
		if len(names) > 0 && r.Metadata.Name != names[0] {
			continue
		}
		r.Metadata.Revision = fmt.Sprint(kv.Revision)
		all = append(all, r)
		spec, err := yaml.Marshal(r.Spec)
		if err != nil {
			return err
		}
		t.add(r.Metadata.Name, strings.ReplaceAll(strings.TrimSpace(string(spec)), "\n", "; "))
	}
	if len(names) > 0 {
		if len(all) == 0 {
			return fmt.Errorf("%s %s: %w", kind.Name, names[0], store.ErrNotFound)
		}
		return g.print(cmd, all[0], t)
	}
	return g.print(cmd, struct {
		APIVersion string         `json:"apiVersion"`
		Kind       string         `json:"kind"`
		Items      []api.Resource `json:"items"`
	}{api.Group, kind.Name + "List", all}, t)
}

func newDeleteCommand(g *globals) *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "delete KIND NAME | -f FILE",
		Short: "Delete resources",
		Long: `delete removes resources from the store. With a node go the blocks that it has claimed, which other nodes may then claim:
delete a node only when its host is gone for good, because pods that still run there would share their addresses.`,
		Example: `  caracalctl delete node h3
  caracalctl delete bgppeer tor
  caracalctl delete -f peers.yaml`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			type victim struct {
				kind api.Kind
				name string
			}
			var victims []victim
			switch {
			case file != "" && len(args) == 0:
				all, err := readManifest(cmd, file)
				if err != nil {
					return err
				}
				for _, r := range all {
					victims = append(victims, victim{r.Kind, r.Metadata.Name})
				}
			case len(args) == 2:
				kind, err := api.FindKind(args[0])
				if err != nil {
					return usagef("%w", err)
				}
				victims = []victim{{kind, args[1]}}
			default:
				return usagef("say which: KIND NAME, or -f FILE")
			}
			return g.withStore(cmd.Context(), func(s store.Store) error {
				for _, v := range victims {
					if err := remove(cmd.Context(), s, v.kind, v.name, cmd.OutOrStdout()); err != nil {
						return fmt.Errorf("%s %s: %w", v.kind.Name, v.name, err)
					}
				}
				return nil
			})
		},
	}
	fileFlag(cmd, &file)
	return cmd
}

func remove(ctx context.Context, s store.Store, kind api.Kind, name string, out io.Writer) error {
	if err := s.Delete(ctx, agent.ResourceKey(kind, name), 0); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s %s deleted\n", kind.Name, name)
	if kind.Name != "Node" {
		return nil
	}
	blocks, err := agent.Blocks(ctx, s)
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if b.Node != name {
			continue
		}
		if err := s.Delete(ctx, agent.BlockKey(b.CIDR), b.Revision); err != nil {
			return fmt.Errorf("release block %s: %w", b.CIDR, err)
		}
		fmt.Fprintf(out, "block %s released\n", b.CIDR)
	}
	return nil
}
