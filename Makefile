# Hauberk. Every target works on a fresh Debian 12 with Go, git and make.
#
#   make up       install what is needed, build, start, deploy examples/bank
#   make test     install what the tests need, run them all
#   make help     the rest

SHELL        := /bin/bash
.DEFAULT_GOAL := build
PROGRAMS     := hauberk hauberkd hauberk-node hauberk-mesh hauberk-xds hauberk-guest hauberk-guard containerd-shim-hauberk-v2
VERSION      ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unversioned)
LDFLAGS      := -w -X hauberk.dev/internal/version.version=$(VERSION)
export CGO_ENABLED := 0
export GOFLAGS := -buildvcs=false

.PHONY: kubectl help up down check build $(PROGRAMS) generate test lint bench bench-sandbox bench-guard bench-mesh bench-cost critest critest-sandbox critest-debian critest-runc soak guard-attacks mesh-interop mesh-soak mesh-upgrade clean

help: ## say what each target does
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: ## install, build, start everything, deploy examples/bank, print URLs (root)
	scripts/setup run
	$(MAKE) build
	bin/hauberk up examples/bank

check: build ## bring the bank up and check every link of the chain (root)
	scripts/setup run
	bin/hauberk up --check examples/bank

down: ## stop everything, leave nothing running (root)
	bin/hauberk down

build: $(PROGRAMS) ## build the programs into bin/

hauberk-guest: LDFLAGS += -s -w
hauberk-guest: BUILDFLAGS := -trimpath
$(PROGRAMS):
	go build $(BUILDFLAGS) -ldflags '$(LDFLAGS)' -o bin/$@ ./cmd/$@

KUBECTL := -X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/component-base/version.gitMajor=1 \
	-X k8s.io/component-base/version.gitMinor=37 -X k8s.io/client-go/pkg/version.gitVersion=v1.37.2

kubectl: ## build a kubectl of the API's version into bin/
	cd test/kubectl && go build -ldflags '$(KUBECTL)' -o ../../bin/kubectl .

generate: ## rewrite generated code, CRDs and eBPF objects (clang)
	go generate ./...

test: ## install what the tests need, run them all (root)
	scripts/setup test
	scripts/test

lint: ## gofmt, vet, staticcheck, govulncheck
	scripts/lint

bench: ## measure, and print the conditions with the figures (root)
	scripts/setup bench
	$(MAKE) build
	scripts/bench

bench-sandbox: ## measure sandboxes beside runc and gVisor (root)
	scripts/setup bench
	$(MAKE) build
	scripts/bench-sandbox

bench-guard: build ## measure what the Guard costs in a guest, on both kernels, and a change of a policy (root)
	scripts/setup bench
	go run ./bench/guard
	scripts/bench -only policy

bench-mesh: build ## measure hauberk-mesh beside nginx, HAProxy and Traefik, and a hop of the mesh (root)
	scripts/setup bench
	scripts/bench-mesh

bench-cost: build ## say where each microsecond of hauberk-mesh goes, alone and in the mesh (root)
	scripts/setup bench
	go run ./bench/proxy -cost
	scripts/bench -only cost

critest: ## validate the runtime by Kubernetes' suite, on containerd 2 (root)
	scripts/setup test
	go run ./test/critest

critest-sandbox: ## the same by the Sandbox API, without pause containers (root)
	scripts/setup test
	go run ./test/critest -no-pause

critest-debian: ## the same on Debian's containerd (root)
	scripts/setup test
	go run ./test/critest -debian

critest-runc: ## the same with runc, on both (root)
	scripts/setup test
	go run ./test/critest -runtime runc
	go run ./test/critest -runtime runc -debian

soak: ## 500 containers, processes killed at random, then count what is left (root)
	scripts/setup test
	go run ./test/soak -cycles $(or $(CYCLES),500) -faults $(or $(FAULTS),0.4)

guard-attacks: ## the Guard's corpus of attacks, three ways on two kernels (root)
	scripts/setup test
	go run ./test/attacks

mesh-soak: build ## load proxies for DURATION (30m), with trouble; what errors and growth nothing explains fails (root)
	go run ./test/meshsoak -duration $(or $(DURATION),30m) -rate $(or $(RATE),150)
	HAUBERK_TEST_REQUESTS=1000000 go test -count=1 -timeout 30m -run '^TestLeaks$$' -v ./mesh ./mesh/alone

mesh-upgrade: ## replace the proxy 20 times under 1,000 connections; a failed request or a reset fails it (root)
	HAUBERK_TEST_UPGRADES=1000 go test -count=1 -timeout 15m -run '^TestUpgrade$$' -v ./mesh

mesh-interop: ## the mesh against programs and suites of others
	cd test/interop/h2spec && go run . && go run . -alone http && go run . -alone http2
	go run ./test/interop/rpc
	go run ./test/interop/suites
	set -o pipefail; go test -count=1 -v -run '^TestGoControlPlane$$' ./cmd/hauberk-xds | grep -E 'xDS by go-control-plane|FAIL|^ok'

clean: ## remove what was built
	rm -rf bin examples/bank/.build
