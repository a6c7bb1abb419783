# SPDX-License-Identifier: MIT
#
# make test           all checks and tests, the guests' on Linux 6.1 and 6.12 too
# make demo           watch buffers come and go; GUEST=1: on the driver, in a guest
# make bench          what the driver costs, and what the library does
# make test-kernels   the guest tests on every kernel from 5.10 to the newest
#
# Each does its own set-up: Debian packages (as root, or through sudo), a virtual
# environment in .venv, kernels in .cache/guest.  Nothing else is touched.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HARNESS := $(BIN)/python tools/guest.py
KERNELS := 6.1 6.12
ALL_KERNELS := 5.10 6.1 6.12 newest
CHECK_KERNEL := 6.12
# The embedded backend needs 5.19.
marks = $(if $(filter 5.10,$1),device,device or embedded)

# Beyond what the guests need: the library's extension, the driver's checks, the
# selftests for 32 bits and in C++, for the daemon a browser and MPI, and RDMA.
PACKAGES := python3-dev python3-venv sparse gcc-multilib g++ \
	chromium chromium-driver openmpi-bin iproute2 python3-pyverbs

# What the extension modules are made of.
EXTENSIONS := $(wildcard aioummu/*_build.py aioummu/*.c engine/*.[ch]) \
	kmod/include/uapi/linux/ummunotify.h

SYSTEM := .cache/system.stamp
INSTALLED := $(VENV)/installed.stamp
PROMETHEUS := .cache/prometheus/usr/bin/promtool
CHECKPATCH := .cache/checkpatch/checkpatch.pl
# The module that holds up invalidations, for the selftests; prints where it is.
build_hold = $(HARNESS) build $1 --strict --source kmod/selftests/hold | tail -1


help:
	@sed -n 's/^# \{0,1\}//; 3,10p' $(firstword $(MAKEFILE_LIST))

test: check test-host test-engine test-guest
	@echo "make test: everything passed"

check: lint check-kmod

lint: $(INSTALLED)
	@echo "== ruff, mypy"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check-kmod: $(INSTALLED) $(CHECKPATCH)
	@echo "== driver: W=1 on $(KERNELS), sparse, checkpatch --strict"
	for kernel in $(KERNELS); do $(HARNESS) build $$kernel --strict; done
	rm -rf .cache/sparse && mkdir -p .cache && cp -r kmod .cache/sparse
	kdir=$$($(HARNESS) kdir $(CHECK_KERNEL)) && \
		$(MAKE) -C .cache/sparse sparse KDIR="$$kdir" 2>&1 | tee .cache/sparse/log
	! grep -iE 'warning:|error:' .cache/sparse/log
	$(MAKE) -C kmod checkpatch CHECKPATCH=$(CURDIR)/$(CHECKPATCH)

test-host: $(INSTALLED) $(PROMETHEUS)
	@echo "== tests on this machine"
	$(BIN)/python -m pytest

# The engine under both sanitizers, and are broken ones noticed?
test-engine: $(INSTALLED)
	@echo "== the embedded engine: tests and a minute of stress, sanitizers, mutants"
	$(MAKE) -C engine/tests check
	$(MAKE) -C engine/tests tsan
	$(MAKE) -C engine/tests asan
	$(MAKE) -C engine/tests mutants

test-guest: $(addprefix test-guest-,$(KERNELS)) test-examples test-mutants

test-kernels: $(addprefix test-guest-,$(ALL_KERNELS))

test-guest-%: $(INSTALLED)
	@echo "== Linux $*: the driver's selftests"
	$(MAKE) -C kmod/selftests
	hold=$$($(call build_hold,$*)) && \
		$(HARNESS) run $* --module --env UMMUNOTIFY_RULE_INSTALLED=1 \
			--env UMMUNOTIFY_HOLD="$$hold" -- kmod/selftests/run.sh
	@echo "== Linux $*: the library, $(call marks,$*)"
	$(HARNESS) pytest $* --timeout 1800 -- --device -m "$(call marks,$*)" \
		--ignore-glob="tests/test_memtrackd_*" --ignore=tests/test_rdma_example.py

# On one kernel: the examples that depend on the driver take their time in a guest.
test-examples: $(INSTALLED)
	@echo "== Linux $(CHECK_KERNEL): memtrackd, RDMA"
	$(HARNESS) pytest $(CHECK_KERNEL) --timeout 2400 -- --device -m "device or embedded" \
		tests/test_memtrackd_c_client.py tests/test_memtrackd_clients.py \
		tests/test_rdma_example.py

# Do the selftests notice a broken driver?  And what are its parameters good for?
test-mutants: $(INSTALLED)
	@echo "== broken drivers on Linux $(CHECK_KERNEL)"
	$(MAKE) -C kmod/selftests
	kdir=$$($(HARNESS) kdir $(CHECK_KERNEL)) && \
		kmod/selftests/mutants.sh make $(CURDIR)/.cache/mutants "$$kdir"
	hold=$$($(call build_hold,$(CHECK_KERNEL))) && \
		$(HARNESS) run $(CHECK_KERNEL) --timeout 1800 \
			--env UMMUNOTIFY_HOLD="$$hold" -- \
			kmod/selftests/mutants.sh run $(CURDIR)/.cache/mutants
	module=$$($(HARNESS) build $(CHECK_KERNEL) | tail -1) && \
		$(HARNESS) run $(CHECK_KERNEL) -- kmod/selftests/parameters.sh "$$module"

ifneq ($(filter-out 0,$(GUEST)),)
# The guest has no terminal, but what it prints may come to one.
demo: $(INSTALLED)
	@live=; if [ -t 1 ] && size=($$(stty size </dev/tty)); then live=--live; fi; \
	$(HARNESS) run $(CHECK_KERNEL) --module --env TERM="$${TERM-}" \
		--env LINES="$${size-}" --env COLUMNS="$${size[1]-}" -- \
		$(BIN)/python examples/demo.py --backend driver $$live
else
# In the environment of the tests if there is one, else in a smaller one.
DEMO_VENV := $(if $(wildcard $(INSTALLED)),$(VENV),.venv-demo)

demo: $(DEMO_VENV)/installed.stamp
	@$(DEMO_VENV)/bin/python examples/demo.py
endif

.venv-demo/installed.stamp: pyproject.toml setup.py $(EXTENSIONS)
	@$(PYTHON) tools/prerequisites.py
	@echo "setting up $(@D) ..."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[demo]'
	@touch $@

# All of it, also if a target is missed; then the status is 1.
bench: $(INSTALLED)
	@status=0; \
	for each in driver.py events.py embedded.py cache.py daemon.py "daemon.py --guest"; do \
		echo "== bench/$$each"; \
		$(BIN)/python bench/$$each || status=1; \
	done; exit $$status

setup: $(INSTALLED)

$(SYSTEM): tools/guest.py Makefile
	@mkdir -p $(@D)
	$(PYTHON) tools/guest.py setup $(PACKAGES)
	@touch $@

$(INSTALLED): $(SYSTEM) pyproject.toml setup.py examples/memtrackd/pyproject.toml $(EXTENSIONS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]' \
		--editable 'examples/memtrackd[uvloop]'
	@touch $@

# Unpacked, not installed: that would start a service.
$(PROMETHEUS): | $(SYSTEM)
	rm -rf .cache/prometheus && mkdir -p .cache/prometheus
	cd .cache/prometheus && apt-get download prometheus && dpkg -x prometheus_*.deb . && \
		rm prometheus_*.deb
	@touch $@

# Only the kernel's sources have it.
$(CHECKPATCH): | $(SYSTEM)
	@mkdir -p $(@D)
	cd $(@D) && rm -rf *.deb source && apt-get download linux-source-6.12 && \
		dpkg -x linux-source-*.deb source
	tar -C $(@D) -xJf $(@D)/source/usr/src/linux-source-6.12.tar.xz --strip-components=2 \
		linux-source-6.12/scripts/{checkpatch.pl,spelling.txt,const_structs.checkpatch}
	rm -rf $(@D)/source $(@D)/*.deb

clean:
	rm -rf .cache/sparse .cache/bench .cache/guest/build build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*' -not -path './.cache/*' -prune -exec rm -rf {} +

.PHONY: help test check lint check-kmod test-host test-engine test-guest test-examples test-mutants test-kernels \
	demo bench setup clean
