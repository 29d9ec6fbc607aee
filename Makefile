# Caracal's developer commands. `make help` lists them.
SHELL := /bin/bash
export CGO_ENABLED := 0
GO ?= go
VERSION := $(shell git describe --tags --always 2>/dev/null || echo unknown)
CTL := github.com/caracal-net/caracal/cmd/caracald/ctl
COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
BUILD := $(GO) build -trimpath -ldflags "-s -w -X $(CTL).Version=$(VERSION) -X $(CTL).Commit=$(COMMIT)"
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.5.0

IMAGE ?= caracal:$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help build image generate test test-cluster demo bench lint clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

build: ## build every binary, static, into bin/
	@mkdir -p bin
	$(BUILD) -o bin/ ./cmd/caracal ./cmd/caracald ./tools/podbench ./tools/lab/cmd/lab
	@ln -sf caracal bin/caracal-ipam
	@ln -sf caracald bin/caracalctl

image: build ## build the container image $(IMAGE) with the local Docker (DOCKER=podman: another), no registry
	deploy/image.sh bin $(IMAGE)

generate: ## compile the eBPF programs, and write what follows from other files (needs clang-19 and libbpf-dev)
	cd bpf && $(GO) generate ./...
	$(GO) generate ./kube
	deploy/kubernetes/generate.sh

test: build ## install what the tests need (Debian) and run every test; needs root
	./.ci/packages
	./.ci/kernels
	./.ci/nerdctl
	./.ci/kubernetes
	CARACAL_BIN_DIR=$(CURDIR)/bin CARACAL_NO_SKIPS=1 $(GO) test -count=1 -timeout 30m ./...

test-cluster: build ## run the tests of whole clusters of Kubernetes, which it builds first (cold: 15 minutes); needs root
	./.ci/packages
	./.ci/kubernetes cluster
	./.ci/flannel
	./.ci/calico
	CARACAL_BIN_DIR=$(CURDIR)/bin CARACAL_NO_SKIPS=1 $(GO) test -count=1 -timeout 60m -tags cluster ./tests/kubernetes/... ./tests/kube/...

demo: build ## show pods on one simulated host, then on three and outside; needs Go, root and Linux 6.1
	@$(GO) run ./tools/demo

bench: build ## compare pod-to-pod latency: bare veth, redirect only, bridge, ptp, Caracal
	./.ci/packages
	bin/podbench run
	bin/podbench cni

lint: ## run the linters of .golangci.yaml and check the C formatting
	$(GO) run $(GOLANGCI) run ./...
	clang-format-19 --dry-run --Werror bpf/*.h bpf/*.c

clean: ## remove what build made
	rm -rf bin out
