package stats

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPercentile(t *testing.T) {
	for _, tc := range []struct {
		name   string
		sorted []float64
		p      float64
		want   float64
	}{
		{"none", nil, 50, math.NaN()},
		{"one", []float64{7}, 99, 7},
		{"lowest", []float64{1, 2, 3}, 0, 1},
		{"highest", []float64{1, 2, 3}, 100, 3},
		{"middle of odd", []float64{1, 2, 30}, 50, 2},
		{"middle of even", []float64{1, 2, 4, 8}, 50, 3},
		{"interpolated", []float64{0, 10}, 90, 9},
		{"below range", []float64{1, 2}, -5, 1},
		{"above range", []float64{1, 2}, 200, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := Percentile(tc.sorted, tc.p)
			if got != tc.want && !(math.IsNaN(got) && math.IsNaN(tc.want)) {
				t.Errorf("Percentile(%v, %v) = %v, want %v", tc.sorted, tc.p, got, tc.want)
			}
		})
	}
}

func TestSummarize(t *testing.T) {
	in := []float64{5, 1, 3, 2, 4}
	got := Summarize(in)
	want := Summary{N: 5, Median: 3, Mean: 3, Min: 1, Max: 5, P10: 1.4, P25: 2, P75: 4, P90: 4.6}
	near := cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) < 1e-9 })
	if diff := cmp.Diff(want, got, near); diff != "" {
		t.Errorf("Summarize (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]float64{5, 1, 3, 2, 4}, in); diff != "" {
		t.Errorf("Summarize changed its input:\n%s", diff)
	}
	if got := Summarize(nil); got != (Summary{}) {
		t.Errorf("Summarize(nil) = %+v, want zero", got)
	}
}

func TestRatios(t *testing.T) {
	for _, tc := range []struct {
		name           string
		xs, base, want []float64
	}{
		{"none", nil, nil, nil},
		{"pairs", []float64{2, 9}, []float64{1, 3}, []float64{2, 3}},
		{"shorter base", []float64{2, 9}, []float64{1}, []float64{2}},
		{"zero base left out", []float64{2, 9}, []float64{0, 3}, []float64{3}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, Ratios(tc.xs, tc.base)); diff != "" {
				t.Errorf("Ratios (-want +got):\n%s", diff)
			}
		})
	}
}

// A moment in which the machine is ten times slower hits both datapaths of a round and must not move the ratio.
func TestRatioSurvivesSlowRounds(t *testing.T) {
	base := []float64{10, 100, 11, 95, 10}
	var xs []float64
	for _, b := range base {
		xs = append(xs, 1.3*b)
	}
	if got := Median(Ratios(xs, base)); math.Abs(got-1.3) > 1e-9 {
		t.Errorf("median ratio = %v, want 1.3", got)
	}
}
