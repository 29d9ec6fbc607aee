package report

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// ErrNothing says that a report holds nothing to plot.
var ErrNothing = errors.New("nothing to plot: no inline latency in the report")

// Plot writes an SVG: latency ratios of datapaths as bars, with the quartiles as error bars. Where a kind of datapath was
// measured with several numbers of rules it draws latency against that number.
func Plot(file string, reports ...*Report) error {
	lines := byRules(reports)
	var p *plot.Plot
	var err error
	switch {
	case slices.ContainsFunc(lines, func(l line) bool { return len(l.points) > 1 }):
		p, err = curves(lines)
	case len(reports) == 0 || len(reports[0].Latency) == 0:
		return ErrNothing
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

// line is the latency of one kind of datapath and protocol, us, against the number of rules.
type line struct {
	name   string
	points plotter.XYs
}

func byRules(reports []*Report) []line {
	var lines []line
	for _, r := range reports {
		for _, l := range r.Latency {
			d := r.datapath(l.Datapath)
			if d.Rules == 0 {
				continue
			}
			name := d.Base() + " " + l.Protocol
			at := slices.IndexFunc(lines, func(l line) bool { return l.name == name })
			if at < 0 {
				at, lines = len(lines), append(lines, line{name: name})
			}
			lines[at].points = append(lines[at].points, plotter.XY{X: float64(d.Rules), Y: l.NS.Median / 1e3})
		}
	}
	slices.SortFunc(lines, func(a, b line) int { return strings.Compare(a.name, b.name) })
	for _, l := range lines {
		slices.SortFunc(l.points, func(a, b plotter.XY) int { return int(a.X - b.X) })
	}
	return lines
}

func curves(lines []line) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = "Pod to pod round trip against number of rules"
	p.X.Label.Text, p.Y.Label.Text = "rules", "us"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Legend.Top, p.Legend.Left = true, true
	low, high := math.Inf(1), 0.0
	for i, l := range lines {
		drawn, points, err := plotter.NewLinePoints(l.points)
		if err != nil {
			return nil, err
		}
		drawn.Color, points.Color = plotutil.Color(i), plotutil.Color(i)
		points.Shape = plotutil.Shape(i)
		p.Add(drawn, points)
		p.Legend.Add(l.name, drawn, points)
		for _, xy := range l.points {
			low, high = min(low, xy.Y), max(high, xy.Y)
		}
	}
	// Whole powers of ten, so that the ticks have labels.
	p.Y.Min, p.Y.Max = math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))
	return p, nil
}
