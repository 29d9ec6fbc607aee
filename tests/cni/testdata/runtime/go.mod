module github.com/caracal-net/caracal/tests/cni/testdata/runtime

go 1.25.0

require (
	github.com/containernetworking/cni v1.3.1
	go.opentelemetry.io/otel v1.29.0
	go.opentelemetry.io/otel/trace v1.29.0
)
