// Package trace carries the trace that a runtime's call belongs to: W3C Trace Context (level 2) and W3C Baggage, in environment
// variables as OpenTelemetry names them (OTEP 258), and in headers. Nothing is exported from here: who traces finds our work
// by the ids in our logs.
package trace

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The names of the values, as headers. As environment variables they are in capitals.
const (
	Traceparent = "traceparent"
	Tracestate  = "tracestate"
	Baggage     = "baggage"
)

var names = []string{Traceparent, Tracestate, Baggage}

// Context is a place in a trace. The zero value is in none.
type Context struct {
	TraceID, SpanID string // 32 and 16 lower-case hexadecimal digits, or both empty
	flags           byte
	state, baggage  string
}

// flagsKnown are those of the specification: sampled, and random trace id. Others are not passed on.
const flagsKnown = 0x03

// Read reads the values that get gives by header name, "" for one that is not there. One that is not as the specifications
// want it counts as not there, and tracestate means nothing without traceparent; the error names each, and is for debugging.
func Read(get func(name string) string) (Context, error) {
	var c Context
	var errs []error
	if s := get(Traceparent); s != "" {
		if err := c.parent(s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", Traceparent, err))
		}
	}
	if s := get(Tracestate); s != "" && c.TraceID != "" {
		if err := checkState(s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", Tracestate, err))
		} else {
			c.state = s
		}
	}
	if s := get(Baggage); s != "" {
		if err := checkBaggage(s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", Baggage, err))
		} else {
			c.baggage = s
		}
	}
	return c, errors.Join(errs...)
}

// Env makes of an environment what Read wants.
func Env(getenv func(string) string) func(name string) string {
	return func(name string) string { return getenv(strings.ToUpper(name)) }
}

// Child is a new span of the trace, ours; in no trace it is nothing new.
func (c Context) Child() Context {
	if c.TraceID == "" {
		return c
	}
	var id [8]byte
	for id == [8]byte{} {
		rand.Read(id[:]) // never fails
	}
	c.SpanID = hex.EncodeToString(id[:])
	return c
}

// Values are what is passed on, by header name; what is empty is left out.
func (c Context) Values() map[string]string {
	v := make(map[string]string)
	if c.TraceID != "" {
		v[Traceparent] = fmt.Sprintf("00-%s-%s-%02x", c.TraceID, c.SpanID, c.flags)
	}
	if c.state != "" {
		v[Tracestate] = c.state
	}
	if c.baggage != "" {
		v[Baggage] = c.baggage
	}
	return v
}

// Environ is an environment with the values in place of whatever is there.
func (c Context) Environ(environ []string) []string {
	out := slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(names, func(n string) bool { return strings.ToUpper(n) == name })
	})
	values := c.Values()
	for _, name := range names {
		if v, ok := values[name]; ok {
			out = append(out, strings.ToUpper(name)+"="+v)
		}
	}
	return out
}

// LogAttrs are the ids for a log, under OpenTelemetry's names for them; none when there is no trace.
func (c Context) LogAttrs() []any {
	if c.TraceID == "" {
		return nil
	}
	return []any{"trace_id", c.TraceID, "span_id", c.SpanID}
}

// parent reads a traceparent (Trace Context, section 3.2).
func (c *Context) parent(s string) error {
	const length = 55
	version, ok := hexByte(s)
	switch {
	case !ok || len(s) < length || s[2] != '-' || s[35] != '-' || s[52] != '-':
		return errors.New("not version-traceid-parentid-flags")
	case version == 0xff:
		return errors.New("version ff is none")
	case version == 0 && len(s) > length, len(s) > length && s[length] != '-':
		return errors.New("too long")
	}
	trace, span := s[3:35], s[36:52]
	flags, ok := hexByte(s[53:])
	if !ok || !isHex(trace) || !isHex(span) {
		return errors.New("not of lower-case hexadecimal digits")
	}
	if strings.Trim(trace, "0") == "" || strings.Trim(span, "0") == "" {
		return errors.New("an id of zeros")
	}
	c.TraceID, c.SpanID, c.flags = trace, span, flags&flagsKnown
	return nil
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

// hexByte reads the first two digits.
func hexByte(s string) (byte, bool) {
	if len(s) < 2 || !isHex(s[:2]) {
		return 0, false
	}
	b, err := hex.DecodeString(s[:2])
	return b[0], err == nil
}

// What is not passed on: more than this is no trace's.
const (
	maxBytes   = 8192 // of either list; Baggage, section 3.3.2
	maxState   = 32   // entries; Trace Context, section 3.3.1.1
	maxBaggage = 180  // entries; what OpenTelemetry's libraries take
)

// checkState looks at a tracestate (Trace Context, section 3.3.1).
func checkState(s string) error {
	if len(s) > maxBytes {
		return errTooLong
	}
	seen := make(map[string]bool)
	for member := range strings.SplitSeq(s, ",") {
		member = strings.Trim(member, " \t")
		if member == "" {
			continue
		}
		key, value, ok := strings.Cut(member, "=")
		switch {
		case !ok || !isStateKey(key):
			return errors.New("an entry without a key")
		case len(value) == 0 || len(value) > 256 || !all(value, func(b byte) bool { return b >= 0x20 && b <= 0x7e && b != '=' }):
			return errors.New("a value with what belongs in none")
		case seen[key]:
			return errors.New("a key twice")
		}
		if seen[key] = true; len(seen) > maxState {
			return errTooLong
		}
	}
	if len(seen) == 0 {
		return errors.New("no entry")
	}
	return nil
}

var errTooLong = errors.New("too long")

func isStateKey(s string) bool {
	return s != "" && len(s) <= 256 && isLower(s[0]) && all(s, func(b byte) bool { return isLower(b) || strings.IndexByte("_-*/@", b) >= 0 })
}

func isLower(b byte) bool { return b >= 'a' && b <= 'z' || b >= '0' && b <= '9' }

func all(s string, is func(byte) bool) bool {
	for i := range len(s) {
		if !is(s[i]) {
			return false
		}
	}
	return true
}

// checkBaggage looks at a baggage (W3C Baggage, section 3.3.1).
func checkBaggage(s string) error {
	if len(s) > maxBytes {
		return errTooLong
	}
	count := 0
	for member := range strings.SplitSeq(s, ",") {
		if count++; count > maxBaggage {
			return errTooLong
		}
		first := true
		for pair := range strings.SplitSeq(member, ";") {
			key, value, ok := strings.Cut(pair, "=")
			if !isToken(strings.Trim(key, " \t")) || !ok && first {
				return errors.New("an entry without a key or a value")
			}
			if !all(strings.Trim(value, " \t"), isBaggageOctet) {
				return errors.New("a value with what belongs in none")
			}
			first = false
		}
	}
	return nil
}

// isToken: RFC 9110, section 5.6.2.
func isToken(s string) bool {
	return s != "" && all(s, func(b byte) bool { return b > 0x20 && b < 0x7f && strings.IndexByte(`"(),/:;<=>?@[\]{}`, b) < 0 })
}

func isBaggageOctet(b byte) bool {
	return b > 0x20 && b < 0x7f && b != '"' && b != ',' && b != ';' && b != '\\'
}
