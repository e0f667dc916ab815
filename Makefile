# The commands of the README. Each does its own set-up.

CARGO ?= cargo
# A machine with a small memory may want fewer.
JOBS ?=
CARGO_JOBS = $(if $(JOBS),--jobs $(JOBS),)

.PHONY: demo test test-kube tidy lint deny setup bench clean

# Builds in release and runs the main job: train, survive, serve, show.
demo: setup-build
	$(CARGO) build --release --package drumline-cli $(CARGO_JOBS)
	./target/release/drumline demo $(DEMO)

# Passes the tests; what they need from the system is installed, or named, first.
test: setup
	@tests/kube/build scale || echo "tests/kube/build failed: the Kubernetes tests are skipped"
	@tests/gpu/nvrtc || echo "tests/gpu/nvrtc failed: kernels are not compiled for GPUs"
	if command -v etcd >/dev/null; then export DRUMLINE_REQUIRE_ETCD=1; fi; \
	$(CARGO) test --workspace $(CARGO_JOBS)

# The Kubernetes tests at full length on the real components: 200 kills, 1,000 nodes of kwok, and a
# real kubelet, for which it must be root. Nothing is skipped; figures are printed. About 30 minutes.
test-kube: setup
	@tests/setup kube
	tests/kube/build all
	$(CARGO) build --release --package drumline-cli $(CARGO_JOBS)
	DRUMLINE_REQUIRE_KUBE=1 DRUMLINE_KILLS=200 DRUMLINE_KWOK=full DRUMLINE_REAL=1 \
	DRUMLINE_BIN=$(CURDIR)/target/release/drumline \
	$(CARGO) test --package drumline-operator $(CARGO_JOBS) -- --nocapture --test-threads 1

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
