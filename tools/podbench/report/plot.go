package report

import (
	"errors"
	"fmt"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// ErrNothing says that a report holds nothing to plot.
var ErrNothing = errors.New("nothing to plot: no inline latency in the report")

// Plot writes an SVG: latency ratios of datapaths as bars, with the quartiles as error bars. Of several reports taken with
// different numbers of rules it draws latency against that number.
func Plot(file string, reports ...*Report) error {
	rules := make(map[int]bool)
	for _, r := range reports {
		if len(r.Latency) > 0 {
			rules[r.Rules] = true
		}
	}
	var p *plot.Plot
	var err error
	switch {
	case len(rules) == 0:
		return ErrNothing
	case len(rules) > 1:
		p, err = byRules(reports)
	default:
		p, err = bars(reports[0])
	}
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	if err := p.Save(9*vg.Inch, 5*vg.Inch, file); err != nil {
		return fmt.Errorf("write plot %s: %w", file, err)
	}
	return nil
}

// spread is values with their quartiles.
type spread struct {
	plotter.Values
	low, high plotter.Values
}

func (s spread) XY(i int) (float64, float64)     { return float64(i), s.Values[i] }
func (s spread) YError(i int) (float64, float64) { return s.low[i], s.high[i] }

func bars(r *Report) (*plot.Plot, error) {
	var names, protocols []string
	for _, l := range r.Latency {
		if !slices.Contains(names, l.Datapath) {
			names = append(names, l.Datapath)
		}
		if !slices.Contains(protocols, l.Protocol) {
			protocols = append(protocols, l.Protocol)
		}
	}
	p := plot.New()
	p.Title.Text = "Pod to pod round trip, ratio to " + names[0]
	p.Y.Min = 0
	p.Legend.Top = true
	p.NominalX(names...)
	width := vg.Points(60 / float64(len(protocols)))
	for i, proto := range protocols {
		s := spread{}
		for _, name := range names {
			at := slices.IndexFunc(r.Latency, func(l Latency) bool { return l.Datapath == name && l.Protocol == proto })
			if at < 0 {
				s.Values, s.low, s.high = append(s.Values, 0), append(s.low, 0), append(s.high, 0)
				continue
			}
			q := r.Latency[at].Ratio
			s.Values = append(s.Values, q.Median)
			s.low, s.high = append(s.low, q.Median-q.P25), append(s.high, q.P75-q.Median)
		}
		b, err := plotter.NewBarChart(s.Values, width)
		if err != nil {
			return nil, err
		}
		b.Color = plotutil.Color(i)
		b.Offset = width * vg.Length(float64(i)-float64(len(protocols)-1)/2)
		e, err := plotter.NewYErrorBars(s)
		if err != nil {
			return nil, err
		}
		p.Add(b, e)
		p.Legend.Add(proto, b)
	}
	return p, nil
}

func byRules(reports []*Report) (*plot.Plot, error) {
	lines := make(map[string]plotter.XYs)
	var names []string
	for _, r := range reports {
		for _, l := range r.Latency {
			name := l.Datapath + " " + l.Protocol
			if _, ok := lines[name]; !ok {
				names = append(names, name)
			}
			lines[name] = append(lines[name], plotter.XY{X: float64(max(r.Rules, 1)), Y: l.NS.Median / 1e3})
		}
	}
	p := plot.New()
	p.Title.Text = "Pod to pod round trip against number of rules"
	p.X.Label.Text, p.Y.Label.Text = "rules", "us"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Min = 0
	p.Legend.Top, p.Legend.Left = true, true
	slices.Sort(names)
	for i, name := range names {
		slices.SortFunc(lines[name], func(a, b plotter.XY) int { return int(a.X - b.X) })
		l, points, err := plotter.NewLinePoints(lines[name])
		if err != nil {
			return nil, err
		}
		l.Color, points.Color = plotutil.Color(i), plotutil.Color(i)
		p.Add(l, points)
		p.Legend.Add(name, l, points)
	}
	return p, nil
}
