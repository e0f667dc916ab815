# The commands of the README. Each does its own set-up.

CARGO ?= cargo
# A machine with a small memory may want fewer.
JOBS ?=
CARGO_JOBS = $(if $(JOBS),--jobs $(JOBS),)

# The seed of the random tests. It is fixed, so that a failing run repeats; `make fuzz` tries others.
export PROPTEST_RNG_SEED ?= 1

.PHONY: demo test test-kube fuzz tidy lint deny setup bench clean

# Builds in release and runs the main job: train, survive, serve, show.
demo: setup-build
	$(CARGO) build --release --package drumline-cli $(CARGO_JOBS)
	./target/release/drumline demo $(DEMO)

# Passes the tests; what they need from the system is installed, or named, first.
test: setup
	@tests/kube/build scale || echo "tests/kube/build failed: the Kubernetes tests are skipped"
	@tests/gpu/nvrtc || echo "tests/gpu/nvrtc failed: kernels are not compiled for GPUs"
	if command -v etcd >/dev/null; then export DRUMLINE_REQUIRE_ETCD=1; fi; \
	$(CARGO) test --workspace --no-fail-fast $(CARGO_JOBS)

# The Kubernetes tests at full length on the real components: 200 kills, 1,000 nodes of kwok, and a
# real kubelet, for which it must be root. Nothing is skipped; figures are printed. About 30 minutes.
test-kube: setup
	@tests/setup kube
	tests/kube/build all
	$(CARGO) build --release --package drumline-cli $(CARGO_JOBS)
	DRUMLINE_REQUIRE_KUBE=1 DRUMLINE_KILLS=200 DRUMLINE_KWOK=full DRUMLINE_REAL=1 \
	DRUMLINE_BIN=$(CURDIR)/target/release/drumline \
	$(CARGO) test --package drumline-operator $(CARGO_JOBS) -- --nocapture --test-threads 1

# Runs the random tests of the pure crates with new seeds until stopped. A failure names its seed.
FUZZED = scheduler queue placement audit cluster lifecycle sim planner collective mesh checkpoint data spec
fuzz: setup-build
	@for run in $$(seq $(or $(RUNS),1000000)); do \
		export PROPTEST_RNG_SEED=$$(od -An -N6 -tu8 /dev/urandom | tr -d ' '); \
		echo "run $$run: PROPTEST_RNG_SEED=$$PROPTEST_RNG_SEED"; \
		$(CARGO) test --quiet $(addprefix --package drumline-,$(FUZZED)) $(CARGO_JOBS) >target/fuzz.log 2>&1 || \
			{ cat target/fuzz.log; echo "failed with PROPTEST_RNG_SEED=$$PROPTEST_RNG_SEED"; exit 1; }; \
	done

# Checks that no compiler makes: formatting, lints, layers, licences.
tidy:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets $(CARGO_JOBS) -- --deny warnings
	$(CARGO) xtask tidy

# Licences, sources and duplicate versions of what we depend on.
deny:
	@command -v cargo-deny >/dev/null || $(CARGO) install cargo-deny --locked $(CARGO_JOBS)
	$(CARGO) deny check bans licenses sources

bench: setup-build
	$(CARGO) build --release --package drumline-cli $(CARGO_JOBS)
	./target/release/drumline bench all

setup-build:
	@tests/setup build

setup:
	@tests/setup test

clean:
	$(CARGO) clean
