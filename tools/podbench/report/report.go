// Package report is what podbench found, as JSON, as tables and as plots.
package report

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/measure"
	"github.com/caracal-net/caracal/tools/podbench/stats"
)

// Schema is the version of the JSON below; it changes when a field changes its meaning.
const Schema = 2

// Report is one run of podbench.
type Report struct {
	Schema    int                  `json:"schema"`
	Machine   Machine              `json:"machine"`
	Datapaths []Datapath           `json:"datapaths"`
	Latency   []Latency            `json:"latency,omitempty"`
	Visits    []Visits             `json:"visits,omitempty"`
	Lifecycle []Lifecycle          `json:"lifecycle,omitempty"`
	During    *measure.Disturbance `json:"during,omitempty"`
}

// Machine is where it ran.
type Machine struct {
	Kernel string    `json:"kernel"`
	CPU    string    `json:"cpu"`
	CPUs   int       `json:"cpus"`
	Date   time.Time `json:"date"`
}

// Datapath is one that was compared.
type Datapath struct {
	Name    string            `json:"name"`
	Attach  string            `json:"attach"` // how programs hang on the pods' host interfaces: tcx, clsact, none
	Plugins []datapath.Plugin `json:"plugins,omitempty"`
	Rules   int               `json:"rules,omitempty"`  // policy rules in force between the pods
	Filter  string            `json:"filter,omitempty"` // what enforces them
}

// Base is the name without the number of rules: the kind of datapath.
func (d Datapath) Base() string {
	base, _, _ := strings.Cut(d.Name, "@")
	return base
}

// datapath is the one of this name.
func (r *Report) datapath(name string) Datapath {
	for _, d := range r.Datapaths {
		if d.Name == name {
			return d
		}
	}
	return Datapath{Name: name}
}

// Latency is inline round trips of one datapath and protocol.
type Latency struct {
	Datapath string        `json:"datapath"`
	Protocol string        `json:"protocol"`
	NS       stats.Summary `json:"ns"`    // medians of the rounds, ns
	Ratio    stats.Summary `json:"ratio"` // to the datapath RatioTo in the same round
	RatioTo  string        `json:"ratio_to"`
	Trips    int           `json:"trips"`
	Waits    int           `json:"waits"`
	Programs *Programs     `json:"programs,omitempty"` // of Caracal's datapaths
}

// Programs is what the datapath's programs themselves take, by the kernel's statistics, which add some ns to each run.
type Programs struct {
	NS    stats.Summary `json:"ns"`            // per round trip, in each round
	Ratio stats.Summary `json:"ratio"`         // to those of RatioTo in the same round; of nothing if it has none
	Runs  float64       `json:"runs_per_trip"` // how often they run in a round trip
}

// Visits is what clients in a process of their own saw.
type Visits struct {
	Datapath string             `json:"datapath"`
	Protocol string             `json:"protocol"`
	PerSec   stats.Summary      `json:"per_second"` // answered requests, or bytes of bulk
	NS       map[string]float64 `json:"ns"`         // median over rounds of each percentile
	Lost     int                `json:"lost"`
	Ratio    stats.Summary      `json:"ratio"` // of per_second to the first datapath's in the same round
}

// Lifecycle is ADD and DEL of one datapath, ms.
type Lifecycle struct {
	Datapath string        `json:"datapath"`
	Cold     float64       `json:"cold_add_ms"` // the node's first ADD
	Add      stats.Summary `json:"add_ms"`
	Del      stats.Summary `json:"del_ms"`
	// From the call of ADD to the first answered packet: asked once ADD has returned, as a container does; and asked from
	// the call on, as a process does that is in the namespace already.
	First stats.Summary `json:"first_answer_ms"`
	Asked stats.Summary `json:"first_answer_asked_during_ms"`
	// Ratios to the first datapath in the same round.
	AddRatio   stats.Summary `json:"add_ratio"`
	DelRatio   stats.Summary `json:"del_ratio"`
	FirstRatio stats.Summary `json:"first_ratio"`
	AskedRatio stats.Summary `json:"asked_during_ratio"`
	// Of the pods beside: medians of ten ADDs around the tenth and of the last ten, ms; 0 with fewer than 30 pods.
	Tenth      float64  `json:"tenth_add_ms,omitempty"`
	Last       float64  `json:"last_add_ms,omitempty"`
	Pods       int      `json:"pods"`              // that existed beside
	Parallel   int      `json:"parallel"`          // ADDs and DELs at a time
	Errors     []string `json:"errors"`            // what failed
	Duplicates int      `json:"duplicates"`        // addresses given to two pods at once
	Leftovers  []string `json:"leftovers"`         // interfaces that stayed
	Seconds    float64  `json:"seconds,omitempty"` // of a storm
}

// Here describes this machine.
func Here() Machine {
	m := Machine{CPUs: runtime.NumCPU(), Date: time.Now().UTC().Truncate(time.Second), CPU: "unknown"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return m
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if k, v, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(k) == "model name" {
			m.CPU = strings.TrimSpace(v)
			break
		}
	}
	return m
}

// ratio is two columns: the median and the quartiles.
func ratio(s stats.Summary) string {
	if s.N == 0 {
		return "-\t-"
	}
	return fmt.Sprintf("%.3f\t%.3f-%.3f", s.Median, s.P25, s.P75)
}

// columns are what a round trip costs in programs, and its ratio.
func (p *Programs) columns() string {
	if p == nil {
		return "-\t-\t-"
	}
	return fmt.Sprintf("%.0f\t%s", p.NS.Median, ratio(p.Ratio))
}

// Table writes the report for a person.
func (r *Report) Table(w io.Writer) error {
	fmt.Fprintf(w, "Linux %s, %d x %s\n", r.Machine.Kernel, r.Machine.CPUs, r.Machine.CPU)
	if r.During != nil {
		fmt.Fprintf(w, "meanwhile: %s, %.1f per second (%d failures)\n", r.During.What, r.During.Achieved, r.During.Failures)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	told := make(map[string]bool)
	for _, d := range r.Datapaths {
		if d.Rules > 0 && !told[d.Base()] {
			told[d.Base()] = true
			fmt.Fprintf(w, "rules of %s: by %s\n", d.Base(), d.Filter)
		}
	}
	if len(r.Latency) > 0 {
		fmt.Fprintln(t, "\nDATAPATH\tATTACHED\tPROTOCOL\tROUND TRIP us\tP10\tP90\tRATIO\tQUARTILES\tTO\tPROGRAMS ns\tRATIO\tQUARTILES")
		for _, l := range r.Latency {
			fmt.Fprintf(t, "%s\t%s\t%s\t%.2f\t%.2f\t%.2f\t%s\t%s\t%s\n", l.Datapath, r.datapath(l.Datapath).Attach, l.Protocol,
				l.NS.Median/1e3, l.NS.P10/1e3, l.NS.P90/1e3, ratio(l.Ratio), l.RatioTo, l.Programs.columns())
		}
	}
	if len(r.Visits) > 0 {
		fmt.Fprintln(t, "\nDATAPATH\tPROTOCOL\tPER SECOND\tRATIO\tP50 us\tP90\tP99\tP99.9\tLOST")
		for _, v := range r.Visits {
			rate := fmt.Sprintf("%.0f", v.PerSec.Median)
			if v.Protocol == measure.Bulk {
				rate = fmt.Sprintf("%.2f Gbit", v.PerSec.Median*8/1e9)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%.3f\t%.1f\t%.1f\t%.1f\t%.1f\t%d\n", v.Datapath, v.Protocol, rate, v.Ratio.Median,
				v.NS["p50"]/1e3, v.NS["p90"]/1e3, v.NS["p99"]/1e3, v.NS["p99.9"]/1e3, v.Lost)
		}
	}
	if len(r.Lifecycle) > 0 {
		fmt.Fprintln(t, "\nDATAPATH\tADD ms\tP90\tRATIO\tDEL ms\tP90\tRATIO\tFIRST ANSWER ms\tRATIO\tASKED DURING ADD ms\tRATIO\tCOLD ADD\tERRORS\tDUPLICATES\tLEFT")
		for _, l := range r.Lifecycle {
			fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.2f\t%.1f\t%.1f\t%.2f\t%.1f\t%.2f\t%.1f\t%.2f\t%.0f\t%d\t%d\t%d\n", l.Datapath, l.Add.Median, l.Add.P90, l.AddRatio.Median,
				l.Del.Median, l.Del.P90, l.DelRatio.Median, l.First.Median, l.FirstRatio.Median,
				l.Asked.Median, l.AskedRatio.Median, l.Cold, len(l.Errors), l.Duplicates, len(l.Leftovers))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, l := range r.Lifecycle {
		if l.Last > 0 {
			fmt.Fprintf(w, "%s: ADD of the 10th pod took %.1f ms, of the %dth %.1f ms: %.2f times\n", l.Datapath, l.Tenth, l.Pods, l.Last, l.Last/l.Tenth)
		}
		if l.Seconds > 0 {
			fmt.Fprintf(w, "%s: %d operations, %d at a time, in %.1f s\n", l.Datapath, l.Add.N+l.Del.N, l.Parallel, l.Seconds)
		}
		for i, e := range l.Errors {
			if i == 5 {
				fmt.Fprintf(w, "%s: and %d more errors\n", l.Datapath, len(l.Errors)-i)
				break
			}
			fmt.Fprintf(w, "%s: %s\n", l.Datapath, e)
		}
	}
	return nil
}
