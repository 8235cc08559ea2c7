# Each target does all of its own set-up; nothing is configured by hand first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export CARGO_INCREMENTAL ?= 1

.PHONY: help demo test check bench siege boards chaos fmt lint deny docs rust doctests client bench-short system node neighbours chromium

help:
	@echo 'make demo    everything on one screen: database, gateway, simulated event, page'
	@echo 'make test    everything that is tested'
	@echo 'make check   fmt, clippy, unit tests: no database'
	@echo 'make bench   the numbers of docs/contribute/performance.md, measured on this machine'
	@echo 'make siege   attackers of eleven kinds, and what the others notice of them: ONLY= (3,4)'
	@echo 'make boards  the dashboards as pictures in target/boards, after a minute of an event night'
	@echo 'make deny    licences, sources, banned crates and advisories of the lock file, by cargo-deny'
	@echo 'make chaos   faults drawn at random, and nothing missed: SEED= SECONDS= (random, 300)'

demo: system node
	npm ci --prefix client/demo --ignore-scripts --no-audit --no-fund --loglevel=error
	cargo build --release --locked
	exec target/release/tidegate demo

# `deny` is last, so that what it could not check is the last thing that is read.
test: DENY = where-possible
test: system node neighbours fmt lint docs doctests rust client bench-short deny

check: fmt lint
	cargo test --locked --lib

bench: system
	cargo bench --locked --bench reach

siege: system
	cargo bench --locked --bench siege -- $(if $(ONLY),--only $(ONLY))

boards: system node chromium
	cargo build --locked
	npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund --loglevel=error
	exec node tests/js/boards.js

chaos: system node
	cargo build --locked
	npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund --loglevel=error
	exec env SEED='$(SEED)' SECONDS='$(SECONDS)' TRANSCRIPT=target/chaos.log node tests/js/chaos.js

fmt:
	cargo fmt --check

lint:
	cargo clippy --all-targets --locked -- -D warnings

# Licences, sources, banned crates and advisories of the lock file. `make test` does not install the
# tool, which takes longer to build than the gateway, and may run where no advisories can be fetched:
# it asks for DENY=where-possible, which says what was not checked instead of failing.
DENY ?= strict
deny:
	@not_checked() { \
		echo "deny: NOT CHECKED: $$1" >&2; \
		[ '$(DENY)' = where-possible ] || { echo 'deny: failed; DENY=where-possible goes on without' >&2; exit 1; }; \
	}; \
	if ! cargo deny --version >/dev/null 2>&1; then \
		not_checked 'licences, sources, bans and advisories: cargo-deny is not installed (cargo install --locked cargo-deny)'; \
		exit 0; \
	fi; \
	cargo deny --locked -L error check bans licenses sources; \
	if cargo deny --locked -L error fetch db; \
	then cargo deny --locked -L error check --disable-fetch advisories; \
	else not_checked 'advisories: their database cannot be fetched'; fi

docs:
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps --document-private-items --locked

rust:
	if cargo nextest --version >/dev/null 2>&1; \
	then cargo nextest run --locked --no-fail-fast; \
	else cargo test --locked --lib --bins --test it; fi

doctests:
	cargo test --locked --doc

client:
	cargo build --locked
	npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund --loglevel=error
	npm test --prefix tests/js

bench-short:
	cargo test --locked --bench reach -- --short

# What the targets need and a fresh machine lacks. Debian and Ubuntu get it by apt; elsewhere it is
# named. No database cluster is made and no service is started: the tests and the demo start their
# own, and end them.
system:
	@missing=(); \
	command -v cargo >/dev/null || { echo 'missing: a Rust toolchain (https://rustup.rs)'; exit 1; }; \
	command -v cc >/dev/null || missing+=(gcc libc6-dev); \
	compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres >/dev/null \
		|| missing+=(postgresql); \
	command -v openssl >/dev/null || missing+=(openssl); \
	command -v promtool >/dev/null || missing+=(prometheus); \
	$(install)

node:
	@missing=(); \
	command -v node >/dev/null || missing+=(nodejs); \
	command -v npm >/dev/null || missing+=(npm); \
	$(install)

# What stands in front of a gateway and beside it, for the tests.
neighbours:
	@missing=(); \
	[ -x /usr/sbin/nginx ] || command -v nginx >/dev/null || missing+=(nginx-light); \
	$(install)

chromium:
	@missing=(); \
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium); \
	$(install)

define install
if [ $${#missing[@]} -gt 0 ]; then \
	command -v apt-get >/dev/null || { echo "missing: $${missing[*]}"; exit 1; }; \
	sudo=; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	echo "installing $${missing[*]}"; \
	$$sudo apt-get update -qq; \
	if [ ! -e /etc/postgresql-common/createcluster.conf ]; then \
		$$sudo mkdir -p /etc/postgresql-common; \
		echo 'create_main_cluster = false' | $$sudo tee /etc/postgresql-common/createcluster.conf >/dev/null; \
	fi; \
	if [ ! -e /usr/sbin/policy-rc.d ]; then \
		trap "$$sudo rm -f /usr/sbin/policy-rc.d" EXIT; \
		printf '#!/bin/sh\nexit 101\n' | $$sudo tee /usr/sbin/policy-rc.d >/dev/null; \
		$$sudo chmod +x /usr/sbin/policy-rc.d; \
	fi; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		-o Dpkg::Options::=--force-confold "$${missing[@]}"; \
fi
endef
