// Package stats summarises noisy samples by their order: medians, percentiles and the spread between quartiles.
package stats

import (
	"math"
	"slices"
)

// Summary describes one set of samples, in the samples' own unit. With no samples all fields are zero.
type Summary struct {
	N      int     `json:"n"`
	Median float64 `json:"median"`
	Mean   float64 `json:"mean"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	P10    float64 `json:"p10"`
	P25    float64 `json:"p25"`
	P75    float64 `json:"p75"`
	P90    float64 `json:"p90"`
}

// Summarize describes xs without changing it.
func Summarize(xs []float64) Summary {
	if len(xs) == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(xs))
	return Summary{
		N:      len(sorted),
		Median: Percentile(sorted, 50),
		Mean:   Mean(sorted),
		Min:    sorted[0],
		Max:    sorted[len(sorted)-1],
		P10:    Percentile(sorted, 10),
		P25:    Percentile(sorted, 25),
		P75:    Percentile(sorted, 75),
		P90:    Percentile(sorted, 90),
	}
}

// Percentile returns the p-th percentile (0..100) of sorted, which must be ascending, interpolating linearly between
// the two nearest samples. It is NaN without samples.
func Percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := math.Max(0, math.Min(p, 100)) / 100 * float64(len(sorted)-1)
	low := int(at)
	if low+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// Median returns the middle of xs without changing it; NaN without samples.
func Median(xs []float64) float64 { return Percentile(slices.Sorted(slices.Values(xs)), 50) }

// Mean returns the average of xs; NaN without samples.
func Mean(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	sum := 0.0
	for _, x := range xs {
		sum += x
	}
	return sum / float64(len(xs))
}

// Ratios divides xs by base pair by pair: sample i of both was taken in the same round, so a slow moment of the
// machine cancels out. Pairs beyond the shorter slice, and pairs whose base is zero, are left out.
func Ratios(xs, base []float64) []float64 {
	var out []float64
	for i := range min(len(xs), len(base)) {
		if base[i] != 0 {
			out = append(out, xs[i]/base[i])
		}
	}
	return out
}
