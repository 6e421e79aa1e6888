# SPDX-License-Identifier: Apache-2.0
#
# `make help` lists the targets. Every variable of the first block can be set
# on the command line, such as in `make fuzz FUZZTIME=5m`.

GO       ?= go
BIN      ?= bin
VERSION  ?= $(shell git describe --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 10s
# Which packages, and by `go test -run`, which of their tests.
PKG      ?= ./...
RUN      ?=
COUNT    ?= 1
BENCH    ?= .
BENCHTIME ?= 200x
# 1 to have `make bench` run fewer cases, and json to have it print that.
SHORT    ?=
OUTPUT   ?= text
DEMO     ?=
# Of `make e2e`: how the node has its cgroups, and its runtime.
MODES    ?= v2 hybrid containerd2
# What `make image` names the image; by default, what the chart asks for.
IMAGE    ?= localhost/shunt/shunt-node:$(shell awk '$$1 == "appVersion:" {print $$2}' install/chart/Chart.yaml)
# 0 to leave the system's packages alone.
DEPS     ?= 1
# Which kernels, "this" the machine's own, and 1 to write what the others say into docs/KERNELS.md.
KERNELS  ?= 5.10 6.1 6.12 this
KERNELS_UPDATE ?=
# Another vulnerability database than the Go project's, such as file:///path.
VULNDB   ?=
# A file that each test run adds its numbers to; `.ci/run` sums them up.
TALLY    ?=

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

# Where the tools are of someone whose PATH is short, such as root's by su.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

commands = $(notdir $(wildcard cmd/*))
lint     = $(GO) tool -modfile=tools/go.mod golangci-lint
report   = $(GO) run ./internal/ci/testreport -allow .ci/allowed-skips $(if $(TALLY),-tally $(TALLY))
# Privileged tests have a name that says so; see internal/testbed.
# They share the machine's cgroup tree and its clock: one package at a time.
privileged = -p 1 -timeout 20m -run '$(or $(RUN),^TestPrivileged)' $(PKG)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: deps-build ## build the commands, static, into bin/
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.buildVersion=$(VERSION)' \
		-o $(BIN)/ $(addprefix ./cmd/,$(commands))

.PHONY: image
image: deps-image build ## the node agent's container image, into bin/shunt-node.tar
	@$(GO) run ./internal/tools/image -bin $(BIN) -name $(IMAGE) -o $(BIN)/shunt-node.tar

.PHONY: chart
chart: ## the Helm chart as a package, into bin/
	@mkdir -p $(BIN)
	@version=$$(awk '$$1 == "version:" {print $$2}' install/chart/Chart.yaml); \
	tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --transform='s,^install/chart,shunt,' \
		-cf - install/chart | gzip -n >$(BIN)/shunt-$$version.tgz; echo "$(BIN)/shunt-$$version.tgz"

.PHONY: manifests
manifests: ## render install/manifests from the chart, and what its tests compare with
	$(GO) test -count=1 -run '^Test(Manifests|Options)$$' ./internal/charttest -update

.PHONY: demo
demo: deps-demo build ## show a pod's traffic redirected (root)
	@$(GO) build -trimpath -o $(BIN)/shunt-demo ./internal/demo
	@$(BIN)/shunt-demo -plugin $(BIN)/shunt-cni $(DEMO)

.PHONY: test
test: deps-test need-root test-unit test-privileged ## run every test (root)

.PHONY: test-unit
test-unit: ## run the tests that need no root, under -race
	$(GO) test -json -race -count=$(COUNT) -run '$(or $(RUN),.)' -skip '^TestPrivileged' $(PKG) | $(report)

.PHONY: test-privileged
test-privileged: need-root ## run the tests that need root
	$(GO) test -json -count=$(COUNT) $(privileged) | $(report)

.PHONY: test-race
test-race: need-root ## run the tests that need root under -race, the plugin's binary too
	GORACE=atexit_sleep_ms=0 SHUNT_TESTBED_RACE=1 $(GO) test -json -race -count=$(COUNT) $(privileged) | $(report)

.PHONY: e2e
e2e: deps-e2e need-root image ## run the tests on a real Kubernetes node (root)
	@GO='$(GO)' VERSION='$(VERSION)' RUN='$(RUN)' MODES='$(MODES)' e2e/run.sh

.PHONY: test-kernels
test-kernels: deps-build deps-kernels ## probe, and run some tests, on KERNELS (emulated; root for missing packages and "this" only)
	@$(GO) run ./internal/ci/kernels -kernels '$(KERNELS)' $(if $(KERNELS_UPDATE),-update)

.PHONY: fuzz
fuzz: ## fuzz each parser for FUZZTIME
	@scripts/fuzz.sh $(FUZZTIME)

.PHONY: faults
faults: need-root ## fail and kill ADD and DEL at each step, and write docs/FAULTS.md (root)
	SHUNT_CNI_TEST_ALL_STEPS=1 $(GO) test -count=1 -timeout 60m -run '^TestPrivileged(Killed|Failed)Anywhere$$' ./cmd/shunt-cni -update
	@grep -E '^(## |\|)' docs/FAULTS.md

.PHONY: vulncheck
vulncheck: ## look for what is known to be vulnerable
	@scripts/vulncheck.sh $(VULNDB)

.PHONY: bench
bench: deps-test need-root ## run the benchmarks of bench/ and report: docs/BENCHMARKS.md, bin/bench/report.html (root)
	@$(GO) run ./bench/run -go '$(GO)' -dir $(BIN)/bench -bench '$(BENCH)' -benchtime $(BENCHTIME) -count $(COUNT) $(if $(SHORT),-short) -o $(OUTPUT)

.PHONY: bench-gate
bench-gate: deps-test need-root ## fail unless the benchmarks show what .ci/bench-gates asks for (root)
	@$(GO) run ./bench/run -go '$(GO)' -dir $(BIN)/bench -gate

.PHONY: lint
lint: deps-lint ## check the style of everything
	@scripts/lint.sh

.PHONY: fmt
fmt: ## format the Go files
	$(lint) fmt

.PHONY: generate
generate: deps-generate ## compile the BPF programs and write what Go knows of them
	$(GO) generate ./bpf/...

.PHONY: check-generated
check-generated: ## fail unless `make generate` changes nothing
	@scripts/check-generated.sh

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BIN) .cache

.PHONY: deps
deps: deps-build deps-demo deps-image deps-test deps-e2e deps-kernels deps-lint deps-generate ## install what all of this needs (root)

.PHONY: deps-build deps-demo deps-image deps-test deps-e2e deps-kernels deps-lint deps-generate
deps-build deps-demo deps-image deps-test deps-e2e deps-kernels deps-lint deps-generate: deps-%:
	@if [ '$(DEPS)' != 0 ]; then scripts/install-deps.sh $*; fi

.PHONY: need-root
need-root:
	@[ "$$(id -u)" = 0 ] || { echo 'this needs root; make test-unit runs the tests that do not' >&2; exit 1; }
