package ctl

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/store"
)

// service is a port of a Service, as why was asked about it.
type service struct {
	Name     string           `json:"service"` // namespace and name
	Address  netip.Addr       `json:"address"`
	Protocol string           `json:"protocol"`
	Port     uint16           `json:"port"`
	Backends []netip.AddrPort `json:"backends"`       // that are ready; as far as they are known
	Note     string           `json:"note,omitempty"` // why they are not
}

// serviceExplanation answers why of a Service: each backend is judged as itself, since policy is about addresses behind translation.
type serviceExplanation struct {
	service
	Explanations []*explanation `json:"explanations"` // of each backend; or of the Service's own address
}

// serviceName finds the Service that a destination names: svc/NAMESPACE/NAME, or svc/NAME.
func serviceName(destination string) (rest string, is bool) {
	for _, prefix := range []string{"svc/", "service/", "services/"} {
		if rest, is = strings.CutPrefix(destination, prefix); is {
			return rest, true
		}
	}
	return "", false
}

// parseService reads [NAMESPACE/]NAME[:PORT[/PROTOCOL]]. PORT is a number or a name, "" if none.
func parseService(text string) (namespace, name, port, protocol string, err error) {
	name, port, with := strings.Cut(text, ":")
	if with {
		port, protocol, _ = strings.Cut(port, "/")
	}
	if namespace, name, with = strings.Cut(name, "/"); !with {
		namespace, name = "default", namespace
	}
	if namespace == "" || name == "" || strings.ContainsAny(namespace+name, "/%?") {
		return "", "", "", "", usagef("svc/%s: write it as svc/NAMESPACE/NAME:PORT", text)
	}
	return namespace, name, port, strings.ToUpper(protocol), nil
}

// apiService is what matters of a Service.
type apiService struct {
	Spec struct {
		Type, ClusterIP string
		Ports           []servicePort
	}
}

type servicePort struct {
	Name, Protocol string
	Port           uint16
}

// apiSlice is what matters of an EndpointSlice.
type apiSlice struct {
	Ports []struct {
		Name, Protocol string
		Port           uint16
	}
	Endpoints []struct {
		Addresses  []string
		Conditions struct{ Ready *bool }
	}
}

// findService asks the API for a Service and its backends.
func (o *whyOptions) findService(ctx context.Context, text string) (*service, error) {
	namespace, name, port, protocol, err := parseService(text)
	if err != nil {
		return nil, err
	}
	config, is := o.globals.cluster()
	if !is {
		return nil, fmt.Errorf("svc/%s: Services are in a cluster, and the store is not a Kubernetes API; say which (--kubeconfig), or ask about an address", text)
	}
	k, err := kube.Open(config)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	data, err := k.Raw(ctx, "/api/v1/namespaces/"+namespace+"/services/"+name, nil)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("the cluster has no Service %s/%s", namespace, name)
	}
	var s apiService
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return nil, fmt.Errorf("Service %s/%s: %w", namespace, name, err)
	}
	p, err := s.port(port, protocol)
	if err != nil {
		return nil, fmt.Errorf("Service %s/%s: %w", namespace, name, err)
	}
	out := &service{Name: namespace + "/" + name, Protocol: p.Protocol, Port: p.Port}
	out.Address, _ = netip.ParseAddr(s.Spec.ClusterIP) // "None", or none: it is headless
	slicesOf := url.Values{"labelSelector": {"kubernetes.io/service-name=" + name}}
	data, err = k.Raw(ctx, "/apis/discovery.k8s.io/v1/namespaces/"+namespace+"/endpointslices", slicesOf)
	var all struct{ Items []apiSlice }
	if err == nil {
		err = json.Unmarshal(data, &all)
	}
	if err != nil {
		out.Note = err.Error()
		return out, nil
	}
	for _, slice := range all.Items {
		out.Backends = append(out.Backends, slice.backends(p)...)
	}
	out.Backends = slices.DeleteFunc(out.Backends, func(b netip.AddrPort) bool { // by the family that its own address has
		return out.Address.IsValid() && b.Addr().Is4() != out.Address.Is4()
	})
	slices.SortFunc(out.Backends, netip.AddrPort.Compare)
	out.Backends = slices.Compact(out.Backends)
	return out, nil
}

// port finds the port that is meant, by number or name; the only one needs no saying.
func (s apiService) port(want, protocol string) (servicePort, error) {
	var found []servicePort
	var names []string
	for _, p := range s.Spec.Ports {
		p.Protocol = cmp.Or(p.Protocol, "TCP")
		names = append(names, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
		if (want == "" || want == p.Name || want == strconv.Itoa(int(p.Port))) && (protocol == "" || protocol == p.Protocol) {
			found = append(found, p)
		}
	}
	switch {
	case len(names) == 0:
		return servicePort{}, errors.New("it has no ports: it is a name alone")
	case len(found) == 0:
		return servicePort{}, fmt.Errorf("it has the ports %s alone: kube-proxy translates no other", strings.Join(names, ", "))
	case len(found) > 1 && want == "":
		return servicePort{}, fmt.Errorf("say which of its ports: %s", strings.Join(names, ", "))
	}
	return found[0], nil
}

// backends are those of a slice that are ready, at what a port of the Service leads to.
func (s apiSlice) backends(of servicePort) []netip.AddrPort {
	var all []netip.AddrPort
	for _, p := range s.Ports {
		if p.Name != of.Name || cmp.Or(p.Protocol, "TCP") != of.Protocol {
			continue
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, text := range e.Addresses {
				if a, err := netip.ParseAddr(text); err == nil {
					all = append(all, netip.AddrPortFrom(a, p.Port))
				}
			}
		}
	}
	return all
}

// runService explains what becomes of a connection to a Service.
func (o *whyOptions) runService(cmd *cobra.Command, source, text string) error {
	s, err := o.findService(cmd.Context(), text)
	if err != nil {
		return err
	}
	x := serviceExplanation{service: *s, Explanations: []*explanation{}}
	targets := s.Backends
	if s.Note != "" && s.Address.IsValid() {
		targets = []netip.AddrPort{netip.AddrPortFrom(s.Address, s.Port)}
	}
	for _, at := range targets {
		one, err := o.settled(cmd, source, at.String()+"/"+s.Protocol)
		if err != nil {
			return err
		}
		x.Explanations = append(x.Explanations, one)
	}
	if err := o.printService(cmd, x); err != nil {
		return err
	}
	if slices.ContainsFunc(x.Explanations, func(one *explanation) bool { return len(one.Disagree) > 0 }) {
		return errFound
	}
	return nil
}

func (o *whyOptions) printService(cmd *cobra.Command, x serviceExplanation) error {
	if o.output != formatTable {
		return o.print(cmd, x, nil)
	}
	out := cmd.OutOrStdout()
	at := "headless"
	if x.Address.IsValid() {
		at = netip.AddrPortFrom(x.Address, x.Port).String()
	}
	fmt.Fprintf(out, "Service %s (%s, %s): ", x.Name, at, x.Protocol)
	switch {
	case x.Note != "":
		fmt.Fprintf(out, "which backends it has is not known (%s); this is about its own address, as if nobody translated it\n", printable(x.Note))
	case len(x.Backends) == 0:
		fmt.Fprintln(out, "no backend is ready: kube-proxy refuses what is sent to it, whatever policy says")
	default:
		fmt.Fprintf(out, "kube-proxy translates it to one of %d ready backends, and policy is about these\n", len(x.Backends))
	}
	for _, one := range x.Explanations {
		fmt.Fprintln(out)
		if err := one.write(out); err != nil {
			return err
		}
	}
	return nil
}
