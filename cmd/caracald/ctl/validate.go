package ctl

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/cni"
)

type validateOptions struct {
	*globals
	resources string
}

// resourcesVerdict is what there is to say about a file of resources.
type resourcesVerdict struct {
	Valid     bool     `json:"valid"`
	Resources []string `json:"resources"` // kind, namespace and name; none if it is not valid
	Errors    []string `json:"errors"`
}

func newValidateCommand(g *globals) *cobra.Command {
	o := &validateOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "validate [FILE]",
		Short: "Check a CNI configuration, or resources",
		Long: `validate checks a CNI configuration list, or a single configuration, from FILE or stdin ("-"): its structure as libcni
reads it, and Caracal's own entries as the plugin reads them. Keys that nobody knows are warnings. It exits with 1 when
there are errors; what is on the node makes no difference.

With -f it checks resources instead, as apply reads them, and writes nothing. What they refer to is not looked up: whether a
policy's tier is there, say.`,
		Example: `  caracalctl validate /etc/cni/net.d/10-caracal.conflist
  caracalctl validate < 10-caracal.conflist
  caracalctl validate -o json 10-caracal.conflist | jq .findings
  caracalctl validate -f policy.yaml`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case o.resources == "":
				return o.run(cmd, args)
			case len(args) > 0:
				return usagef("%q and -f: a CNI configuration or resources, not both", args[0])
			}
			return o.runResources(cmd)
		},
	}
	fileFlag(cmd, &o.resources)
	return cmd
}

func (o *validateOptions) runResources(cmd *cobra.Command) error {
	all, err := readManifest(cmd, o.resources)
	if o.output == formatTable {
		for _, r := range all {
			fmt.Fprintf(cmd.OutOrStdout(), "%s valid\n", r)
		}
		return err
	}
	v := resourcesVerdict{Valid: err == nil, Resources: []string{}, Errors: []string{}}
	for _, r := range all {
		v.Resources = append(v.Resources, r.String())
	}
	if err != nil {
		v.Errors = strings.Split(err.Error(), "\n")
	}
	if perr := o.print(cmd, v, nil); perr != nil || v.Valid {
		return perr
	}
	return errFound
}

func (o *validateOptions) run(cmd *cobra.Command, args []string) error {
	source, in := "stdin", cmd.InOrStdin()
	if len(args) > 0 && args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return fmt.Errorf("read configuration: %w", err)
		}
		defer f.Close()
		source, in = args[0], f
	}
	data, err := io.ReadAll(io.LimitReader(in, cni.MaxConfig+1))
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	if len(data) > cni.MaxConfig {
		return fmt.Errorf("%s: larger than %d bytes, the most that the plugin reads", source, cni.MaxConfig)
	}
	v := validate(data)
	if err := o.show(cmd, source, v); err != nil {
		return err
	}
	if !v.Valid {
		return errFound
	}
	return nil
}

// show prints findings one a line, as compilers do, and the verdict.
func (o *validateOptions) show(cmd *cobra.Command, source string, v verdict) error {
	if o.output != formatTable {
		return o.print(cmd, v, nil)
	}
	out := cmd.OutOrStdout()
	var errs []error
	printf := func(format string, args ...any) {
		_, err := fmt.Fprintln(out, printable(fmt.Sprintf(format, args...)))
		errs = append(errs, err)
	}
	for _, f := range v.Findings {
		where := f.Where
		if where != "" {
			where += ": "
		}
		printf("%s:%d:%d: %s: %s%s", source, f.Line, f.Column, f.Severity, where, f.Message)
	}
	if v.Valid {
		printf("%s: valid: network %s, cniVersion %s, plugins %s", source, v.Name, v.CNIVersion, strings.Join(v.Plugins, ", "))
	} else {
		printf("%s: not valid", source)
	}
	return errors.Join(errs...)
}
