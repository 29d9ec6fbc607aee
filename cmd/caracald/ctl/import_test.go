package ctl

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/api"
)

// runImport runs import on a file's text against the store in dir.
func runImport(t *testing.T, dir, text string, args ...string) (code int, report importReport, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	args = append([]string{"import", "-f", "-", "-o", "json", "--state-dir", dir}, args...)
	code = Run(t.Context(), args, strings.NewReader(text), &out, &errs)
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &report); err != nil {
			t.Fatalf("%v: %s", err, out.Bytes())
		}
	}
	return code, report, errs.String()
}

// said is one line for every item and field that was not simply taken, with its line in the file.
func said(r importReport) string {
	var b strings.Builder
	for _, it := range r.Resources {
		fmt.Fprintf(&b, "%d %s %s: %s\n", it.Line, it.Kind, it.Name, it.Result)
		for _, f := range it.Fields {
			fmt.Fprintf(&b, "  %d %s: %s\n", f.Line, f.Field, f.Result)
		}
	}
	return b.String()
}

func export(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("testdata/calico-export.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// stored are the keys of a store.
func stored(t *testing.T, dir string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if code := Run(t.Context(), []string{"datastore", "export", "--state-dir", dir}, nil, &out, &errs); code != ExitOK {
		t.Fatal(errs.String())
	}
	return out.String()
}

func TestImportRefuses(t *testing.T) {
	dir := t.TempDir()
	code, report, stderr := runImport(t, dir, export(t))
	if code != ExitError || report.Written || !strings.Contains(stderr, "nothing was written: 6 things") {
		t.Fatalf("exit %d, written %t, %s", code, report.Written, stderr)
	}
	const want = `3 IPPool default-ipv4-ippool: created
  9 spec.allowedUses: changed
  15 spec.ipipMode: can't be
24 BGPPeer tor: created
  33 spec.reachableBy: can't be
  31 spec.nextHopMode: changed
39 GlobalNetworkPolicy default.allow-web: created
62 GlobalNetworkPolicy default.untracked: can't be
70 HostEndpoint h1-eth0: can't be
82 Node h1: created
  96 spec.orchRefs: no effect
  95 spec.bgp.ipv4IPIPTunnelAddr: no effect
102 Node h2: created
115 BGPConfiguration default: created
  121 spec.bindMode: no effect
  124 spec.serviceClusterIPs: can't be
131 FelixConfiguration default: no effect
142 ClusterInformation default: no effect
156 IPAMBlock 10.244.1.0/26: created
  156 allocations: can't be
151 BlockAffinity 10.244.1.0/26: no effect
152 IPAMBlock 10.244.2.0/26: created
153 BlockAffinity 10.244.3.0/26: no effect
171 IPAMHandle (1 of them): no effect
174 IPAMConfig default: no effect
`
	if got := said(report); got != want {
		t.Errorf("it says:\n%s\nwanted:\n%s", got, want)
	}
	if keys := stored(t, dir); strings.Contains(keys, "ippools") || strings.Contains(keys, "blocks") {
		t.Errorf("it wrote:\n%s", keys)
	}
}

func TestImport(t *testing.T) {
	dir := t.TempDir()
	if code, report, stderr := runImport(t, dir, export(t), "--skip", "--ipip", "vxlan", "--dry-run"); code != ExitOK || report.Written || stored(t, dir) != stored(t, t.TempDir()) {
		t.Fatalf("dry run: exit %d, %s\n%s", code, stderr, stored(t, dir))
	}
	code, report, stderr := runImport(t, dir, export(t), "--skip", "--ipip", "vxlan")
	if code != ExitOK || !report.Written {
		t.Fatalf("exit %d: %s\n%s", code, stderr, said(report))
	}
	keys := stored(t, dir)
	for _, want := range []string{
		`"cidr\":\"10.244.0.0/16\",\"blockSize\":26,\"natOutgoing\":true,\"nodeSelector\":\"all()\",\"vxlanMode\":\"Always\",\"allowedUses\":[\"Workload\"]`,
		`"keepOriginalNextHop\":true`,
		`/blocks/10.244.1.0-26`, `\"node\":\"h1\"`, `/blocks/10.244.2.0-26`, `\"node\":\"h2\"`,
		`default.allow-web`, `/nodes/h1`, `/nodes/h2`, `\"rack\":\"a\"`, `/bgpconfigurations/default`,
	} {
		if !strings.Contains(strings.ReplaceAll(keys, `\\`, `\`), want) {
			t.Errorf("%s is not in the store:\n%s", want, keys)
		}
	}
	for _, not := range []string{"untracked", "hostendpoint", "10.244.3.0", "felix", "10.96.0.0"} {
		if strings.Contains(keys, not) {
			t.Errorf("%s is in the store:\n%s", not, keys)
		}
	}
	_, again, _ := runImport(t, dir, export(t), "--skip", "--ipip", "vxlan")
	if after := stored(t, dir); after != keys {
		t.Errorf("repeated it changed the store from\n%s\nto\n%s", keys, after)
	}
	for _, it := range again.Resources {
		if it.Result == wasCreated || it.Result == wasChanged {
			t.Errorf("repeated: %s %s %s", it.Kind, it.Name, it.Result)
		}
	}
	// Without a tunnel the same pool changes.
	_, changed, _ := runImport(t, dir, export(t), "--skip", "--ipip", "none")
	if changed.Resources[0].Result != wasChanged {
		t.Errorf("with --ipip none: %s", said(changed))
	}
}

const poolText = `{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"}, "spec": {"cidr": "10.1.0.0/16"}}`

func block(host, cidr string) string {
	return fmt.Sprintf(`{"apiVersion": "crd.projectcalico.org/v1", "kind": "IPAMBlock", "metadata": {"name": "x", "generation": 3}, "spec": {"cidr": %q, "affinity": "host:%s", "allocations": [null], "attributes": [], "unallocated": [0], "deleted": false}}`, cidr, host)
}

func list1(items ...string) string {
	return `{"apiVersion": "v1", "kind": "List", "items": [` + strings.Join(items, ",") + `]}`
}

func TestImportForms(t *testing.T) {
	policy := func(spec string) string {
		return `{"apiVersion": "crd.projectcalico.org/v1", "kind": "NetworkPolicy", "metadata": {"name": "default.p", "namespace": "web", "uid": "1", "annotations": {"projectcalico.org/metadata": "{\"labels\": {\"a\": \"b\"}}"}}, "spec": ` + spec + `}`
	}
	for _, test := range []struct {
		name, text string
		code       int
		want       string // in what it says or in the error
	}{
		{"not YAML", "a: [", ExitError, "document 1, from line 1"},
		{"nothing", "---\n", ExitError, "no resource"},
		{"a word", "hello", ExitError, "1 ? : can't be"},
		{"a list of calicoctl's", "- " + poolText + "\n- " + poolText, ExitError, "2 IPPool p: can't be"},
		{"a list of lists", "- " + list1(poolText) + "\n- " + list1(), ExitOK, "IPPool p: created"},
		{"items without a kind", `{"apiVersion": "projectcalico.org/v3", "kind": "IPPoolList", "items": [{"metadata": {"name": "p"}, "spec": {"cidr": "10.1.0.0/16"}}]}`, ExitOK, "IPPool p: created"},
		{"block of Kubernetes", list1(poolText, block("h1", "10.1.0.0/26")), ExitOK, "IPAMBlock 10.1.0.0/26: created"},
		{"block before its pool", list1(block("h1", "10.1.0.0/26"), poolText), ExitOK, "IPAMBlock 10.1.0.0/26: created"},
		{"block without a pool", list1(block("h1", "10.1.0.0/26")), ExitError, "IPAMBlock 10.1.0.0/26: can't be"},
		{"block of two", list1(poolText, block("h1", "10.1.0.0/26"), block("h2", "10.1.0.0/26")), ExitError, "1 IPAMBlock 10.1.0.0/26: can't be"},
		{"no block", list1(poolText, block("h1", "10.1.0.7/26")), ExitError, "IPAMBlock 10.1.0.7/26: can't be"},
		{"affinity", list1(poolText, `{"apiVersion": "crd.projectcalico.org/v1", "kind": "BlockAffinity", "metadata": {"name": "x"}, "spec": {"cidr": "10.1.0.0/26", "node": "h1", "state": "confirmed", "deleted": "false"}}`), ExitOK, "10.1.0.0/26: created"},
		{"Calico's annotation", policy(`{"selector": "all()", "types": ["Ingress"]}`), ExitOK, "NetworkPolicy.projectcalico.org web/default.p: created"},
		{"unknown match in a rule", policy(`{"ingress": [{"action": "Allow", "source": {"domains": ["example.org"]}}]}`), ExitError, "web/default.p: can't be"},
		{"unknown field of a pool", `{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"}, "spec": {"cidr": "10.1.0.0/16", "colour": "red"}}`, ExitError, "IPPool p: can't be"},
		{"pool for services", `{"apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"}, "spec": {"cidr": "10.1.0.0/16", "allowedUses": ["LoadBalancer"]}}`, ExitOK, "IPPool p: no effect"},
		{"pools that overlap", list1(poolText, strings.Replace(poolText, `"p"`, `"q"`, 1)), ExitError, "IPPool q: can't be"},
		{"WireGuard", `{"apiVersion": "projectcalico.org/v3", "kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": {"wireguardEnabled": true}}`, ExitError, "spec.wireguardEnabled: can't be"},
		{"another program's", `{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}}`, ExitError, "Deployment d: can't be"},
		{"endpoint without a spec", `{"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint", "metadata": {"name": "e", "namespace": "web"}}`, ExitError, "WorkloadEndpoint web/e: can't be"},
		{"broken IPAM", `{"blocks": [{"Value": {"cidr": 7}}]}`, ExitError, "IPAM : can't be"},
		{"broken affinity", `{"block_affinities": [{"Key": "/calico/x", "Value": {}}]}`, ExitError, "BlockAffinity : can't be"},
	} {
		t.Run(test.name, func(t *testing.T) {
			code, report, stderr := runImport(t, t.TempDir(), test.text)
			if got := said(report) + stderr; code != test.code || !strings.Contains(got, test.want) {
				t.Errorf("exit %d, wanted %d and %q:\n%s", code, test.code, test.want, got)
			}
		})
	}
}

func TestImportAgainstStore(t *testing.T) {
	dir := t.TempDir()
	if code, _, stderr := runImport(t, dir, list1(poolText, block("h1", "10.1.0.0/26"))); code != ExitOK {
		t.Fatal(stderr)
	}
	code, report, _ := runImport(t, dir, block("h2", "10.1.0.0/26"))
	if code != ExitError || !strings.Contains(report.Resources[0].Why, "it is node h2's in Calico, and node h1's in the store") {
		t.Errorf("another node's block: exit %d, %s", code, report.Resources[0].Why)
	}
	code, report, _ = runImport(t, dir, strings.Replace(poolText, `"p"`, `"q"`, 1))
	if code != ExitError || !strings.Contains(report.Resources[0].Why, "overlaps pool p") {
		t.Errorf("another pool's addresses: exit %d, %s", code, report.Resources[0].Why)
	}
}

func FuzzImport(f *testing.F) {
	text, err := os.ReadFile("testdata/calico-export.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(list1(poolText, block("h1", "10.1.0.0/26"))))
	f.Add([]byte("- " + poolText))
	for _, kind := range []string{"WorkloadEndpoint", "BGPPeer", "Node"} { // without a spec
		f.Add([]byte(`{"apiVersion": "projectcalico.org/v3", "kind": "` + kind + `", "metadata": {"name": "x"}}`))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, ipip := range []string{"", "vxlan"} {
			im := &importer{ipip: ipip, skip: ipip != ""}
			if im.read(data) != nil {
				return
			}
			pools := make(map[string]api.IPPool)
			for _, it := range im.items {
				if it.resource == nil {
					continue
				}
				if p, ok := it.resource.Spec.(*api.IPPool); ok {
					pools[it.Name] = *p
				}
			}
			im.claims(pools)
			for _, it := range im.items {
				if it.Line < 1 || it.Result == "" || it.Result == toBeWritten && it.resource == nil && it.claim == nil {
					t.Fatalf("%+v", it)
				}
				if im.skip && it.Result == notPossible {
					t.Fatalf("not left out: %+v", it)
				}
			}
		}
	})
}
