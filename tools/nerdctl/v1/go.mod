module github.com/caracal-net/caracal/tools/nerdctl/v1

go 1.22.0

require github.com/containerd/nerdctl v1.7.7
