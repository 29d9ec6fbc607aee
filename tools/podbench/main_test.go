package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/report"
	"github.com/caracal-net/caracal/tools/podbench/stats"
)

func TestMain(m *testing.M) {
	// The command runs itself for the processes of twoproc.
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "ask") {
		main()
		return
	}
	os.Exit(testenv.Main(m))
}

// podbench runs the command and returns what it printed. Nothing may be left of it.
func podbench(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := newRootCommand()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(context.Background())
	namespaces, dirs := own(t)
	if len(namespaces)+len(dirs) > 0 {
		t.Errorf("podbench %v left %v %v", args, namespaces, dirs)
	}
	return out.String(), err
}

// own lists namespaces and directories of podbench's in this process.
func own(t *testing.T) (namespaces, dirs []string) {
	t.Helper()
	for pattern, into := range map[string]*[]string{
		"/run/netns/pb-*": &namespaces,
		filepath.Join(os.TempDir(), "podbench-*-*"): &dirs,
	} {
		all, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			if strings.Contains(p, "-"+itoa(os.Getpid())+"-") {
				*into = append(*into, p)
			}
		}
	}
	return namespaces, dirs
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

func decode(t *testing.T, out string) *report.Report {
	t.Helper()
	r := &report.Report{}
	if err := json.Unmarshal([]byte(out), r); err != nil {
		t.Fatalf("decode %q: %v", out, err)
	}
	if r.Schema != report.Schema || r.Machine.Kernel == "" {
		t.Fatalf("report %+v", r)
	}
	return r
}

func TestInline(t *testing.T) {
	testenv.NeedRoot(t)
	svg := filepath.Join(t.TempDir(), "out.svg")
	out, err := podbench(t, "run", "-d", "veth,redirect,caracal", "--caracal", testenv.Bin(t, "caracal"),
		"--protocol", "udp,tcp,first,crr", "--rounds", "3", "--batch", "5", "--raise-epoch", "100", "-o", "json", "--svg", svg)
	if err != nil {
		t.Fatal(err)
	}
	r := decode(t, out)
	if len(r.Latency) != 12 || r.During == nil || r.During.Failures != 0 {
		t.Fatalf("report %+v", r)
	}
	for _, l := range r.Latency {
		if l.Trips != 15 || l.NS.N != 3 || l.NS.Median <= 0 || l.Ratio.Median <= 0 {
			t.Errorf("latency %+v", l)
		}
		if ours := l.Datapath == "caracal"; ours != (l.Programs != nil) || ours && (l.Programs.NS.Median <= 0 || l.Programs.Runs < 2) {
			t.Errorf("programs of %+v: %+v", l, l.Programs)
		}
	}
	wellFormed(t, svg)
	table := &bytes.Buffer{}
	if err := r.Table(table); err != nil || !strings.Contains(table.String(), "redirect") {
		t.Errorf("table %q: %v", table, err)
	}
}

func wellFormed(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for d := xml.NewDecoder(f); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
}

func TestTwoProcesses(t *testing.T) {
	testenv.NeedRoot(t)
	out, err := podbench(t, "run", "--mode", "twoproc", "-d", "veth", "--protocol", "udp,tcp,crr,bulk",
		"--rounds", "1", "--duration", "200ms", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range decode(t, out).Visits {
		if v.PerSec.Median <= 0 {
			t.Errorf("%+v", v)
		}
	}
}

func TestLifecycle(t *testing.T) {
	testenv.NeedRoot(t)
	for _, parallel := range []string{"1", "4"} {
		out, err := podbench(t, "cni", "-d", "caracal", "--caracal", testenv.Bin(t, "caracal"), "--count", "8", "--parallel", parallel, "-o", "json")
		if err != nil {
			t.Fatal(err)
		}
		l := decode(t, out).Lifecycle[0]
		if l.Add.N != 8 || l.Del.N != 8 || len(l.Errors) > 0 || l.Duplicates > 0 || len(l.Leftovers) > 0 {
			t.Errorf("parallel %s: %+v", parallel, l)
		}
	}
}

func TestPlotAgainstRules(t *testing.T) {
	dir := t.TempDir()
	var files []string
	for _, rules := range []int{1, 1000} {
		name := "x@" + itoa(rules)
		b, err := json.Marshal(report.Report{
			Schema: report.Schema, Datapaths: []report.Datapath{{Name: name, Rules: rules}},
			Latency: []report.Latency{{Datapath: name, Protocol: "udp", NS: stats.Summarize([]float64{float64(rules)})}},
		})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, itoa(rules)+".json")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	svg := filepath.Join(dir, "out.svg")
	if _, err := podbench(t, append([]string{"plot", "--svg", svg}, files...)...); err != nil {
		t.Fatal(err)
	}
	wellFormed(t, svg)
}

func TestPolicy(t *testing.T) {
	testenv.NeedRoot(t)
	svg := filepath.Join(t.TempDir(), "out.svg")
	out, err := podbench(t, "policy", "--caracal", testenv.Bin(t, "caracal"), "--rules", "30,1,10", "--rounds", "2", "--batch", "5",
		"-o", "json", "--svg", svg)
	if err != nil {
		t.Fatal(err)
	}
	r := decode(t, out)
	if len(r.Latency) != 18 || len(r.Datapaths) != 9 {
		t.Fatalf("report %+v", r)
	}
	for _, d := range r.Datapaths {
		if d.Rules == 0 || d.Filter == "" {
			t.Errorf("datapath %+v", d)
		}
	}
	for _, l := range r.Latency {
		kind, _, _ := strings.Cut(l.Datapath, "@")
		if l.Trips != 10 || l.NS.Median <= 0 || l.Ratio.Median <= 0 || l.RatioTo != kind+"@10" {
			t.Errorf("latency %+v", l)
		}
	}
	wellFormed(t, svg)
}

func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.conflist")
	if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want error
	}{
		{[]string{"run", "-d", "nonsense"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp@10"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp/2@10"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp-nft"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp-nft@0"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp-nft@100001"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "ptp-nft@many"}, datapath.ErrUnknown},
		{[]string{"run", "-d", "bridge", "--cni-path", dir}, datapath.ErrPluginMissing},
		{[]string{"run", "-d", "caracal", "--caracal", filepath.Join(dir, "caracal")}, datapath.ErrPluginMissing},
		{[]string{"run", "-d", "veth", "--conflist", "x=" + bad}, datapath.ErrBadConflist},
		{[]string{"run", "-d", "veth,veth"}, nil},
		{[]string{"run", "-d", "veth", "--mode", "sideways"}, nil},
		{[]string{"run", "-d", "veth", "-o", "xml"}, nil},
		{[]string{"run", "-d", "veth", "--raise-epoch", "10"}, nil},
		{[]string{"run", "-d", "veth", "--raise-epoch-of", "veth"}, nil},
		{[]string{"run", "-d", "veth", "--raise-epoch-of", "veth", "--raise-epoch", "10"}, nil},
		{[]string{"run", "-d", "veth", "--size", "1"}, nil},
		{[]string{"policy", "-d", "veth"}, datapath.ErrUnknown},
		{[]string{"policy", "-d", "ptp-nft", "--rules", "0"}, datapath.ErrUnknown},
		{[]string{"policy", "--rules", "ten"}, nil},
		{[]string{"policy", "--rules", ""}, nil},
		{[]string{"policy", "--conflist", "x=" + bad}, nil},
		{[]string{"policy", "--protocol", "bulk", "-d", "ptp-nft", "--rules", "1"}, nil},
		{[]string{"cni", "-d", "veth"}, nil},
		{[]string{"cni", "-d", "ptp-nft@10"}, nil},
		{[]string{"cni", "-d", "bridge", "--count", "0"}, nil},
		{[]string{"plot", filepath.Join(dir, "none.json")}, os.ErrNotExist},
	} {
		if _, err := podbench(t, c.args...); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("podbench %v: %v, want %v", c.args, err, c.want)
		}
	}
}
