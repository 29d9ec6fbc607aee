// Command runtime calls plugins as a container runtime that traces does: by a libcni that tells them of its trace. It is a module
// of its own, because the plugin is to link no library for tracing, and that libcni does.
//
//	runtime ADD|CHECK|DEL FILE CONTAINER NETNS INTERFACE TRACEID SPANID TRACESTATE BAGGAGE
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/trace"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "runtime:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 9 {
		return errors.New("wrong number of arguments")
	}
	id, err1 := trace.TraceIDFromHex(args[5])
	span, err2 := trace.SpanIDFromHex(args[6])
	state, err3 := trace.ParseTraceState(args[7])
	bag, err4 := baggage.Parse(args[8])
	list, err5 := libcni.ConfListFromFile(args[1])
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return err
	}
	ctx := trace.ContextWithSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: id, SpanID: span, TraceState: state, TraceFlags: trace.FlagsSampled,
	}))
	ctx = baggage.ContextWithBaggage(ctx, bag)
	cni := libcni.NewCNIConfigWithCacheDir(filepath.SplitList(os.Getenv("CNI_PATH")), filepath.Join(filepath.Dir(args[1]), "cache"), nil)
	rt := &libcni.RuntimeConf{ContainerID: args[2], NetNS: args[3], IfName: args[4]}
	switch args[0] {
	case "ADD":
		_, err := cni.AddNetworkList(ctx, list, rt)
		return err
	case "CHECK":
		return cni.CheckNetworkList(ctx, list, rt)
	default:
		return cni.DelNetworkList(ctx, list, rt)
	}
}
