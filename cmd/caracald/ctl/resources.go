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
	"github.com/caracal-net/caracal/kube"
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
				if err := refuseCore(s, all); err != nil {
					return err
				}
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

// refuseCore refuses to change what is much more in Kubernetes than it is here: with a Namespace everything in it would go.
func refuseCore(s store.Store, all []api.Resource) error {
	if _, is := s.(*kube.Store); !is {
		return nil
	}
	for _, r := range all {
		switch r.Kind.Name {
		case "Namespace", "ServiceAccount", "Pod", "Service":
			return fmt.Errorf("%s: it is Kubernetes's own: change or delete it by kubectl; nothing was changed", r)
		}
	}
	return nil
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
			_, err := s.Get(cmd.Context(), kind.Key("", name))
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

// maxManifest is the most that is read of resources at once, bytes: some ten thousand policies.
const maxManifest = 32 << 20

func readManifest(cmd *cobra.Command, file string) ([]api.Resource, error) {
	data, err := readFile(cmd, file)
	if err != nil {
		return nil, err
	}
	all, err := manifest.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return all, nil
}

// readFile reads what -f names.
func readFile(cmd *cobra.Command, file string) (data []byte, err error) {
	in := cmd.InOrStdin()
	switch file {
	case "":
		return nil, usagef("say which file (-f FILE, or -f - for stdin)")
	case "-":
	default:
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read resources: %w", err)
		}
		defer f.Close()
		in = f
	}
	data, err = io.ReadAll(io.LimitReader(in, maxManifest+1))
	if err != nil {
		return nil, fmt.Errorf("read resources: %w", err)
	}
	if len(data) > maxManifest {
		return nil, fmt.Errorf("read resources: %s: larger than %d MB, the most that is read at once; make several files of it", file, maxManifest>>20)
	}
	return data, nil
}

// apply writes a resource and says what that did. What an agent wrote of its own into a node's stays.
func apply(ctx context.Context, s store.Store, r api.Resource) (string, error) {
	key := r.Key()
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

// namespaceFlags say which namespaces a command is about.
type namespaceFlags struct {
	name string
	all  bool
}

func (n *namespaceFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&n.name, "namespace", "n", "", "`NAMESPACE` of the resources; none: "+api.DefaultNamespace)
}

// of returns the namespace that is meant for a kind; "" is all, or that the kind has none.
func (n *namespaceFlags) of(kind api.Kind) (string, error) {
	switch {
	case n.name != "" && n.all:
		return "", usagef("-n and -A exclude each other")
	case !kind.Namespaced && (n.name != "" || n.all):
		return "", usagef("a %s is in no namespace; leave out -n and -A", kind)
	case n.name != "" && !api.ValidNamespace(n.name):
		return "", usagef("-n %q: that is no namespace's name", n.name)
	case !kind.Namespaced || n.all:
		return "", nil
	case n.name == "":
		return api.DefaultNamespace, nil
	}
	return n.name, nil
}

func newGetCommand(g *globals) *cobra.Command {
	var n namespaceFlags
	cmd := &cobra.Command{
		Use:   "get KIND [NAME]",
		Short: "List resources",
		Long: `get lists resources of a kind, or one. Of a kind that has namespaces it lists those of one. Where two kinds have the same
name it lists both; networkpolicies.networking.k8s.io is one of them.`,
		Example: `  caracalctl get ippools
  caracalctl get node h1 -o yaml
  caracalctl get networkpolicies -n web
  caracalctl get workloadendpoints -A`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kinds, err := api.FindKinds(args[0])
			if err != nil {
				return usagef("%w", err)
			}
			if len(args) > 1 && n.all {
				return usagef("NAME and -A exclude each other; say which namespace (-n)")
			}
			namespace, err := n.of(kinds[0])
			if err != nil {
				return err
			}
			return g.withStore(cmd.Context(), func(s store.Store) error { return g.get(cmd, s, kinds, namespace, args[1:]) })
		},
	}
	n.add(cmd)
	cmd.Flags().BoolVarP(&n.all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

// get prints the resources of kinds that share a name.
func (g *globals) get(cmd *cobra.Command, s store.Store, kinds []api.Kind, namespace string, names []string) error {
	all := []api.Resource{}
	for _, kind := range kinds {
		found, err := list(cmd.Context(), s, kind, namespace, names)
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	inAll := kinds[0].Namespaced && namespace == ""
	head := []string{"NAME", "SPEC"}
	if inAll {
		head = append([]string{"NAMESPACE"}, head...)
	}
	if len(kinds) > 1 {
		head = append([]string{"APIVERSION"}, head...)
	}
	t := newTable(head...)
	for _, r := range all {
		spec, err := yaml.Marshal(r.Spec)
		if err != nil {
			return err
		}
		row := []any{r.Metadata.Name, strings.ReplaceAll(strings.TrimSpace(string(spec)), "\n", "; ")}
		if inAll {
			row = append([]any{r.Metadata.Namespace}, row...)
		}
		if len(kinds) > 1 {
			row = append([]any{r.Kind.APIVersion}, row...)
		}
		t.add(row...)
	}
	if len(names) > 0 && len(all) == 0 {
		return fmt.Errorf("%s %s: %w", kinds[0].Name, api.Metadata{Namespace: namespace, Name: names[0]}.FullName(), store.ErrNotFound)
	}
	if len(names) > 0 && len(all) == 1 {
		return g.print(cmd, all[0], t)
	}
	apiVersion, kind := kinds[0].APIVersion, kinds[0].Name+"List"
	if len(kinds) > 1 {
		apiVersion, kind = "v1", "List"
	}
	return g.print(cmd, struct {
		APIVersion string         `json:"apiVersion"`
		Kind       string         `json:"kind"`
		Items      []api.Resource `json:"items"`
	}{apiVersion, kind, all}, t)
}

// list reads the resources of a kind in a namespace ("": all, or none), with a name if there is one.
func list(ctx context.Context, s store.Store, kind api.Kind, namespace string, names []string) ([]api.Resource, error) {
	kvs, _, err := s.List(ctx, kind.Prefix(namespace))
	if err != nil {
		return nil, err
	}
	var all []api.Resource
	for _, kv := range kvs {
		if len(names) > 0 && kv.Key != kind.Key(namespace, names[0]) {
			continue
		}
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return nil, fmt.Errorf("%s in the store: %w", kv.Key, err)
		}
		r.Metadata.Revision = fmt.Sprint(kv.Revision)
		all = append(all, r)
	}
	return all, nil
}

func newDeleteCommand(g *globals) *cobra.Command {
	var file string
	var n namespaceFlags
	cmd := &cobra.Command{
		Use:   "delete KIND NAME | -f FILE",
		Short: "Delete resources",
		Long: `delete removes resources from the store. With a node go the blocks that it has claimed, which other nodes may then claim:
delete a node only when its host is gone for good, because pods that still run there would share their addresses.`,
		Example: `  caracalctl delete node h3
  caracalctl delete bgppeer tor
  caracalctl delete networkpolicy.networking.k8s.io allow -n web
  caracalctl delete -f peers.yaml`,
		Args: cobra.MaximumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var victims []api.Resource
			switch {
			case file != "" && len(args) == 0 && n.name == "":
				all, err := readManifest(cmd, file)
				if err != nil {
					return err
				}
				victims = all
			case len(args) == 2 && file == "":
				kind, err := api.FindKind(args[0])
				if err != nil {
					return usagef("%w", err)
				}
				namespace, err := n.of(kind)
				if err != nil {
					return err
				}
				victims = []api.Resource{{Kind: kind, Metadata: api.Metadata{Namespace: namespace, Name: args[1]}}}
			default:
				return usagef("say which: KIND NAME, or -f FILE, whose resources say their namespaces")
			}
			return g.withStore(cmd.Context(), func(s store.Store) error {
				if err := refuseCore(s, victims); err != nil {
					return err
				}
				for _, v := range victims {
					if err := remove(cmd.Context(), s, v, cmd.OutOrStdout()); err != nil {
						return fmt.Errorf("%s: %w", v, err)
					}
				}
				return nil
			})
		},
	}
	n.add(cmd)
	fileFlag(cmd, &file)
	return cmd
}

func remove(ctx context.Context, s store.Store, r api.Resource, out io.Writer) error {
	if err := s.Delete(ctx, r.Key(), 0); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s deleted\n", r)
	if r.Kind.Name != "Node" {
		return nil
	}
	pods, err := agent.Endpoints(ctx, s, r.Metadata.Name)
	if err != nil {
		return err
	}
	for _, p := range pods {
		if err := s.Delete(ctx, p.Key, p.Revision); err != nil {
			return fmt.Errorf("delete %s: %w", p.Resource, err)
		}
		fmt.Fprintf(out, "%s deleted\n", p.Resource)
	}
	blocks, err := agent.Blocks(ctx, s)
	if err != nil {
		return err
	}
	for _, b := range blocks {
		if b.Node != r.Metadata.Name {
			continue
		}
		if err := s.Delete(ctx, api.BlockKey(b.CIDR), b.Revision); err != nil {
			return fmt.Errorf("release block %s: %w", b.CIDR, err)
		}
		fmt.Fprintf(out, "block %s released\n", b.CIDR)
	}
	return nil
}
