package trace

import (
	"slices"
	"strings"
	"testing"
)

const (
	id     = "4bf92f3577b34da6a3ce929d0e0e4736"
	span   = "00f067aa0ba902b7"
	parent = "00-" + id + "-" + span + "-01"
)

func read(traceparent, tracestate, baggage string) (Context, error) {
	return Read(func(name string) string {
		return map[string]string{Traceparent: traceparent, Tracestate: tracestate, Baggage: baggage}[name]
	})
}

// TestTraceparent: the specification's own examples, and each of its rules broken once.
func TestTraceparent(t *testing.T) {
	for _, s := range []string{parent, "00-" + id + "-" + span + "-00", "cc-" + id + "-" + span + "-01", "cc-" + id + "-" + span + "-01-what-the-future-will-be-like"} {
		c, err := read(s, "", "")
		if err != nil || c.TraceID != id || c.SpanID != span {
			t.Errorf("%s: %+v, %v", s, c, err)
		}
		if got := c.Values()[Traceparent]; !strings.HasPrefix(got, "00-"+id+"-"+span+"-0") {
			t.Errorf("%s is passed on as %s", s, got)
		}
	}
	for _, s := range []string{
		"0", "00", "00-", "ff-" + id + "-" + span + "-01", parent + "-x", parent + ".", "cc-" + id + "-" + span + "-01.x",
		"00-" + strings.Repeat("0", 32) + "-" + span + "-01", "00-" + id + "-" + strings.Repeat("0", 16) + "-01",
		strings.ToUpper(parent), "00-" + id + "-" + span + "-0G", "0x-" + id + "-" + span + "-01", "00_" + id + "-" + span + "-01",
		"00-" + id[:31] + "g-" + span + "-01", " " + parent, parent[:54], "00-" + id + "-" + span + "-1\n",
	} {
		if c, err := read(s, "a=1", ""); err == nil || c != (Context{}) {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
	if c, _ := read("00-"+id+"-"+span+"-ff", "", ""); c.Values()[Traceparent] != "00-"+id+"-"+span+"-03" {
		t.Errorf("unknown flags are passed on: %s", c.Values()[Traceparent])
	}
}

// TestLists: a list that is wrong is left out alone.
func TestLists(t *testing.T) {
	long := strings.Repeat("x", 257)
	for _, s := range []string{"congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "fw529a3039@dt=FfAi, a=b c ,", "a=" + long[1:]} {
		if c, err := read(parent, s, ""); err != nil || c.Values()[Tracestate] != s {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
	for _, s := range []string{",", "a", "=b", "a=", "A=b", "a=b=c", "a=\x01", "a=ü", "a=b\r\nX-Evil: 1", "a=1,a=2", long + "=b", "a=" + long, strings.Repeat("a", 1) + strings.Repeat(",", 9000)} {
		if c, err := read(parent, s, ""); err == nil || c.state != "" || c.TraceID != id {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
	for _, s := range []string{"userId=alice,serverNode=DF%2028,isProduction=false", "a = b ; p ; q=1 , c=", "key1=value1;property1;property2"} {
		if c, err := read("", "", s); err != nil || c.Values()[Baggage] != s {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
	for _, s := range []string{"a", ",", "a=b,", "=b", "a=b c", "a=\"b\"", "a=b;", "a@b=c", "a=b\nc=d", "a=ü", strings.Repeat("a=b,", 4000) + "a=b"} {
		if c, err := read(parent, "", s); err == nil || c.baggage != "" || c.TraceID != id {
			t.Errorf("%q: %+v, %v", s, c, err)
		}
	}
}

func TestChild(t *testing.T) {
	if c := (Context{}).Child(); c != (Context{}) || len(c.LogAttrs()) > 0 {
		t.Errorf("a trace from nothing: %+v", c)
	}
	c, err := read(parent, "a=1", "b=2")
	if err != nil {
		t.Fatal(err)
	}
	child := c.Child()
	if child.TraceID != id || child.SpanID == span || len(child.SpanID) != 16 {
		t.Errorf("child %+v", child)
	}
	got := child.Environ([]string{"PATH=/bin", "TRACEPARENT=x", "TRACESTATE=y", "BAGGAGE=z", "TRACEPARENTS=1"})
	want := []string{"PATH=/bin", "TRACEPARENTS=1", "TRACEPARENT=00-" + id + "-" + child.SpanID + "-01", "TRACESTATE=a=1", "BAGGAGE=b=2"}
	if !slices.Equal(got, want) {
		t.Errorf("environment %q, want %q", got, want)
	}
	if got := (Context{}).Environ([]string{"TRACEPARENT=x", "A=b"}); !slices.Equal(got, []string{"A=b"}) {
		t.Errorf("environment without a trace: %q", got)
	}
}

// FuzzRead: whatever comes in, what is passed on is read the same again, and can't end a header or an environment variable.
func FuzzRead(f *testing.F) {
	f.Add(parent, "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "userId=alice;p=1,serverNode=DF%2028")
	f.Add("cc-"+id+"-"+span+"-ff-x", "a@b= c", "a = b ; p")
	f.Add("ff-"+id+"-"+span+"-01", "a=1,a=2", "a=\r\n")
	f.Fuzz(func(t *testing.T, traceparent, tracestate, baggage string) {
		c, _ := read(traceparent, tracestate, baggage)
		v := c.Values()
		for name, value := range v {
			if strings.ContainsAny(value, "\x00\r\n") || len(value) > maxBytes {
				t.Errorf("%s: %q", name, value)
			}
		}
		same, err := read(v[Traceparent], v[Tracestate], v[Baggage])
		if err != nil || same != c {
			t.Errorf("%+v is read as %+v, %v", c, same, err)
		}
		if c.TraceID == "" && c.state != "" {
			t.Errorf("state without a trace: %+v", c)
		}
	})
}
