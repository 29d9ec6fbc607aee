package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/store"
)

// importReport is what import says.
type importReport struct {
	DryRun    bool            `json:"dryRun"`
	Written   bool            `json:"written"` // false: nothing was
	Resources []*importedItem `json:"resources"`
}

func newImportCalicoCommand(g *globals) *cobra.Command {
	o := &importOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "import -f FILE | --from-kubernetes",
		Short: "Take over what Calico's datastore has",
		Long: `import reads what calicoctl exports ("get ... -o yaml", "datastore migrate export"), and Calico's resources of a Kubernetes
cluster (what kubectl prints of them; or all, from the API itself), and writes what Caracal has too into the store: pools, nodes, BGP, policies, sets, and which node has which block of
addresses. It says of every resource what became of it, with its line, and of every field that was not taken as it is.

When something can't be taken over that would be missed, nothing is written; with --skip the rest is. Blocks are written first, so
that agents that run already take none of them. Repeated, it changes what differs. (Caracal's own exports are read by
"datastore import".)

Exit code 1: something can't be taken over, or nothing was written for another reason.`,
		Example: `  calicoctl datastore migrate export | caracalctl import -f - --dry-run
  caracalctl import -f export.yaml --ipip vxlan
  caracalctl import -f export.yaml --skip -o json
  caracalctl import --from-kubernetes --kubeconfig ~/.kube/config --dry-run`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	fileFlag(cmd, &o.file)
	cmd.Flags().BoolVar(&o.kubernetes, "from-kubernetes", false, "read Calico's resources from the Kubernetes API")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "write nothing, only say what would be")
	cmd.Flags().BoolVar(&o.skip, "skip", false, "leave out what can't be taken over")
	cmd.Flags().StringVar(&o.ipip, "ipip", "", "what takes the place of IPIP: `vxlan`, or none")
	complete(cmd, "ipip", "vxlan", "none")
	return cmd
}

type importOptions struct {
	*globals
	file, ipip   string
	dryRun, skip bool
	kubernetes   bool
}

func (o *importOptions) run(cmd *cobra.Command) error {
	if o.ipip != "" && o.ipip != "vxlan" && o.ipip != "none" {
		return usagef("--ipip %q: vxlan or none", o.ipip)
	}
	data, from, err := o.read(cmd)
	if err != nil {
		return err
	}
	im := &importer{ipip: o.ipip, skip: o.skip, live: o.kubernetes}
	if err := im.read(data); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return o.withStore(cmd.Context(), func(s store.Store) error {
		if err := im.compare(cmd.Context(), s); err != nil {
			return err
		}
		report := importReport{DryRun: o.dryRun, Resources: im.items}
		impossible := im.impossible()
		var failed error
		if !o.dryRun && impossible == 0 {
			report.Written = true
			failed = im.write(cmd.Context(), s)
		}
		if err := o.print(cmd, report, im.table()); err != nil {
			return errors.Join(failed, err)
		}
		switch {
		case failed != nil:
			return failed
		case impossible > 0:
			fmt.Fprintf(cmd.ErrOrStderr(), "caracalctl: nothing was written: %d things can't be taken over; mend them, or leave them out with --skip\n", impossible)
			return errFound
		case o.dryRun:
			fmt.Fprintln(cmd.ErrOrStderr(), "caracalctl: dry run, nothing was written")
		}
		return nil
	})
}

// read reads Calico's resources, and says from where.
func (o *importOptions) read(cmd *cobra.Command) (data []byte, from string, err error) {
	switch {
	case !o.kubernetes:
		data, err = readFile(cmd, o.file)
		return data, o.file, err
	case o.file != "":
		return nil, "", usagef("-f and --from-kubernetes exclude each other")
	}
	data, err = o.fromKubernetes(cmd.Context())
	return data, "the Kubernetes API", err
}

// impossible counts what can't be.
func (im *importer) impossible() int {
	n := 0
	for _, it := range im.items {
		if it.Result == notPossible {
			n++
		}
		for _, f := range it.Fields {
			if f.Result == notPossible {
				n++
			}
		}
	}
	return n
}

func (im *importer) table() *table {
	t := newTable("LINE", "RESOURCE", "RESULT", "WHY")
	for _, it := range im.items {
		t.add(it.Line, it.Kind+" "+it.Name, it.Result, it.Why)
		for _, f := range it.Fields {
			t.add(f.Line, "  "+f.Field, f.Result, f.Why)
		}
	}
	if im.live { // nobody sees lines
		for _, row := range append([][]string{t.head}, t.rows...) {
			copy(row, row[1:])
		}
		t.head = t.head[:3]
		for i := range t.rows {
			t.rows[i] = t.rows[i][:3]
		}
	}
	return t
}

// compare says of everything that is to be written what that will do, and finds what contradicts the store.
func (im *importer) compare(ctx context.Context, s store.Store) error {
	pools, err := im.pools(ctx, s)
	if err != nil {
		return err
	}
	im.claims(pools)
	seen := make(map[string]int)
	for _, it := range im.items {
		key, text, err := it.kv()
		if err != nil {
			return err
		}
		if key == "" {
			continue
		}
		if line, twice := seen[key]; twice {
			im.refuse(it, "it is there twice, first in line %d", line)
			continue
		}
		seen[key] = it.Line
		old, err := s.Get(ctx, key)
		switch {
		case errors.Is(err, store.ErrNotFound):
			it.Result = wasCreated
		case err != nil:
			return err
		default:
			im.against(it, text, old.Value)
		}
	}
	return nil
}

// against compares an item with what the store has under its key.
func (im *importer) against(it *importedItem, text, old []byte) {
	if it.claim != nil {
		var there agent.Block
		if json.Unmarshal(old, &there) == nil && there == *it.claim {
			it.Result = wasUnchanged
			return
		}
		im.refuse(it, "it is node %s's in Calico, and node %s's in the store; restart the pods of one of them on other addresses", it.claim.Node, there.Node)
		return
	}
	var before api.Resource
	known := json.Unmarshal(old, &before) == nil
	switch {
	case bytes.Equal(text, old):
		it.Result = wasUnchanged
	case known && it.resource.Kind.Name == "Node" && before.Metadata.Annotations[agent.InstanceAnnotation] != "":
		it.Result, it.Why, it.resource = wasUnchanged, "its own agent has written it", nil
	default:
		it.Result = wasChanged
	}
}

// kv is what is to be written; an empty key: nothing.
func (it *importedItem) kv() (key string, text []byte, err error) {
	switch {
	case it.claim != nil:
		text, err = json.Marshal(it.claim)
		return api.BlockKey(it.claim.CIDR), text, err
	case it.resource != nil:
		text, err = json.Marshal(it.resource)
		return it.resource.Key(), text, err
	}
	return "", nil, nil
}

// pools are those of the store and of the file, by name. Those that overlap can't be.
func (im *importer) pools(ctx context.Context, s store.Store) (map[string]api.IPPool, error) {
	kind, err := api.FindKind("IPPool")
	if err != nil {
		return nil, err
	}
	there, err := list(ctx, s, kind, "", nil)
	if err != nil {
		return nil, err
	}
	pools := make(map[string]api.IPPool)
	for _, r := range there {
		if p, ok := r.Spec.(*api.IPPool); ok {
			pools[r.Metadata.Name] = *p
		}
	}
	for _, it := range im.items {
		if it.resource == nil || it.resource.Kind.Name != "IPPool" {
			continue
		}
		p, _ := it.resource.Spec.(*api.IPPool) // as its kind
		for name, other := range pools {
			if name != it.Name && other.CIDR.Overlaps(p.CIDR) {
				im.refuse(it, "%s overlaps pool %s, %s", p.CIDR, name, other.CIDR)
				break
			}
		}
		if it.resource != nil {
			pools[it.Name] = *p
		}
	}
	return pools, nil
}

// write writes blocks, then resources. What was written stays when something fails; it can be repeated.
func (im *importer) write(ctx context.Context, s store.Store) error {
	blocksFirst := slices.Clone(im.items)
	slices.SortStableFunc(blocksFirst, func(a, b *importedItem) int {
		switch {
		case a.claim != nil && b.claim == nil:
			return -1
		case a.claim == nil && b.claim != nil:
			return 1
		}
		return 0
	})
	for _, it := range blocksFirst {
		key, text, err := it.kv()
		if err != nil {
			return err
		}
		if key == "" || it.Result == wasUnchanged {
			continue
		}
		if it.claim != nil {
			if _, err = s.Create(ctx, key, text); err != nil {
				return fmt.Errorf("block %s: %w; repeat import", it.Name, err)
			}
			continue
		}
		if it.Result, err = apply(ctx, s, *it.resource); err != nil {
			return fmt.Errorf("%s: %w; repeat import", it.resource, err)
		}
	}
	return nil
}
