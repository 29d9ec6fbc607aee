// Package bpf is the dataplane: the eBPF programs, compiled, and the Go types of their maps.
//
// The C beside this file is the only schema; the rest of the package is generated from it and committed, so that
// building Caracal needs no clang.
package bpf

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -cflags "-O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter -fno-strict-aliasing -I/usr/include/x86_64-linux-gnu" -no-global-types -target bpfel -type pod -type pod_slot -type prefix -type peer -type policy_key -type policy_row -type policy_action -type route -type route_kind -type flow_key -type flow -type flow_leg -type next_hop -type forward -type flow_entry -type flow_state -type fragment_key -type fragment -type nat -type service_key -type service -type work -type event -type event_kind -type told -type uplink -type quota -type count -type state -type purge_args -type sweep_args -type clock_args -type churn -output-stem dataplane Dataplane dataplane.c
//go:generate go run ./gen
