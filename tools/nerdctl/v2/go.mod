module github.com/caracal-net/caracal/tools/nerdctl/v2

go 1.23.0

require github.com/containerd/nerdctl/v2 v2.0.4
