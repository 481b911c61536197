# Each target sets up what it needs in .venv, inside this folder, and is quick the second time:
#   make demo    two clients that collide, and two that do not, on a real Triton server
#   make test    the whole test suite, with the tests on a real Triton server: 6 to 14 minutes
#   make lint    style, types and layers
#   make docs    the pages of docs/ and the API as a site in build/site, with every link checked; needs
#                Python 3.11 or later
#   make dist    sdist and wheel, the wheel tested in environments of its own
#   make dependencies  the client with other dependencies: WITH=oldest, or WITH='numpy<2'
#   make bench   the allocator next to its peers: 40 minutes; fills docs/performance.md and
#                docs/choosing.md in
#   make bench-registry  what the manager's registry costs: sessions, opening it again
#   make bench-client  the client next to plain tritonclient, and an ID next to uuid4 and Redis:
#                5 minutes; fills docs/performance.md in
#   make load    the manager's requests a second next to a model that does nothing: 12 minutes;
#                needs wrk and h2load (the Debian packages wrk and nghttp2-client)
#   make scale   what an operation costs with up to 100 million held IDs and a million sessions
#   make crowd   50 client processes with 20 sequences each for a minute, some of them killed
#   make drill-drain  8 client processes with 12 sequences each, a drain, and the end of Triton
#   make drill-tidy  what a model keeps of dead clients, in three ways: 11 minutes; draws
#                docs/tidied.svg
#   make drill-fleet  60 clients of a fleet of three real servers, which are killed, stopped and
#                drained: 9 minutes
#   make simulate-fleet  fleets of up to 1000 servers and 100,000 clients with virtual time, each for
#                10 minutes at most; needs 5 GB of memory; draws docs/many-servers.svg
#   make cpp     the client in C++: builds and tests it with gcc, clang and sanitizers, checks its
#                style, and measures it; installs what it needs with apt-get
#   make proxies  install nginx and HAProxy with apt-get, for the tests behind them
#   make drill-route  100,000 requests behind nginx and HAProxy, while servers are killed and started
#                again: 5 minutes
#   make simulate  2000 fleets of clients with virtual time and every fault: ARGS="SEED --runs N"; with
#                --table docs/testing.md it writes there how often rare states were reached
#   make chaos   a real server and 20 client processes for three minutes, while all is broken in
#                turns: ARGS="--seed N --seconds S --clients C"; a full disk only as root
#   make errors  every call of the system and every allocation of a registry fails in turn: 15
#                minutes; needs a C compiler
#   make conformance  500 seeds of a manager behind faults for each of the clients in Python and
#                JavaScript, and clients that are wrong on purpose: 8 minutes; needs node
#   make faults  each request and each answer of a client is spoilt in turn, in every way: 15
#                minutes; fills docs/testing.md in
#   make record  bugs that were found, each shown by a test on the commit before it was mended: 5 at
#                random, or ARGS="ROW ..." of the table in docs/testing.md; needs the history
#   make mutants  hundreds of faults in the package, one at a time, which its tests must find: 5
#                minutes; ARGS=--core those of the allocator core, which are compiled
#   make mutation  the same with the faults that mutmut makes: an hour; those that survive must be in
#                tests/mutants/survived.list
#   make bench-gate  instructions per call against their limits; needs valgrind
#   make lock    requirements.lock: the versions that .venv is made with; LOCK= for the newest ones
#   make pythons  the wheel and the tests of the allocator on each Python that is there: 3.10 to
#                3.14 and the free-threaded 3.14t, on PATH, of pyenv or in /opt
#   make wheels  sdist and wheels in dist/, for each of these Pythons, x86-64 and aarch64, any Linux of
#                manylinux2014; tests them, those for aarch64 with qemu-user: half an hour
#   make release-check  wheels, trial, the site, an SBOM, golden files, and that all say the same version:
#                what a release needs besides .ci/run; an hour
#   make trial   `cidalloc demo` from the wheels in dist/, as uvx and pipx run it without a clone
#   make fuzz    anything for what reads requests, files, URLs and settings: SECONDS=30 each
#   make sanitize  the tests of the core and the registry under ASan and UBSan
#   make coverage  which branches of the Python code, and lines of the Cython code, no test reaches
#   make clean   remove everything that these made

# The bundled Triton server runs its models on Python 3.10 to 3.13; 3.13 compiles numpy first.
usable = $(shell for p in $(1); do "$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in $(2))' \
	2>/dev/null && { echo $$p; break; }; done)
PYTHON ?= $(or $(call usable,python3 python3.12 python3.11 python3.10,((3,10),(3,11),(3,12))),\
	$(call usable,python3 python3.13,((3,13),)))

# Nothing is written outside this folder.
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
# (Unless the path is so long that a socket, whose name has 107 characters, finds no room in it.)
ifeq ($(shell [ $$(printf %s '$(CURDIR)' | wc -c) -le 60 ] && echo short),short)
export TMPDIR := $(CURDIR)/.cache/tmp
endif
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
LOCK := -c requirements.lock
comma := ,
# One line of progress on a terminal, nothing else; all of it is in .cache/setup.log.
define install
	@echo "== $(1)"
	@set -o pipefail; mkdir -p .cache; { $(2); } 2>&1 | tee -a .cache/setup.log | \
		{ if [ -t 1 ]; then while IFS= read -r line; do printf '\r\033[K   %.76s' "$$line"; done; \
		printf '\r\033[K'; else cat >/dev/null; fi; } || \
		{ tail -20 .cache/setup.log >&2; echo "error: $(1) failed: see .cache/setup.log" >&2; exit 1; }
endef
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -name __pycache__ -prune -o -type f -print)

.PHONY: help demo test lint dist pythons wheels test-wheels trial sbom release-check bench bench-client bench-registry bench-gate load scale simulate chaos errors fuzz sanitize coverage crowd drill-drain drill-fleet drill-tidy drill-route proxies simulate-fleet cpp conformance faults mutants mutation record docs dependencies lock clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^# Each/p; s/^#   /  /p' Makefile

demo: .venv/.built
	@$(BIN)/cidalloc demo --collide
	@$(BIN)/cidalloc demo

# A busy machine can let a limit of real time pass. What fails once and then passes is told at the end.
PYTEST := python -m pytest --reruns 1 -n 3 --dist loadfile
test: .venv/.built .venv/.dev
	$(BIN)/$(PYTEST) --durations=30

lint: .venv/.built .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint deploy/Dockerfile
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jactionlint
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint --max-line-length 100 src tests
	$(BIN)/lint-imports
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest --concise --ignore-unused-allowlist \
		--allowlist tests/stubtest.allowlist \
		cidalloc._alloc cidalloc.manager.storage._mapping \
		cidalloc.triton_model._parent_watch

faults: .venv/.built .venv/.dev
	CIDALLOC_FAULTS=all $(BIN)/python -m pytest -q -s tests/unit/test_client_faults_in_turn.py

mutants: .venv/.built .venv/.dev
	$(BIN)/python tests/support/mutate.py $(ARGS)

docs: .venv/.docs
	$(BIN)/python docs/make_site.py

.venv/.docs: .venv/.built
	$(call install,Installing the tools of the site,$(BIN)/python -m pip install --group docs)
	@touch $@

# In a copy of the package, since it writes all its mutants beside it.
mutation: .venv/.mutation
	rm -rf build/mutation && mkdir -p build/mutation
	cp -r pyproject.toml docs tests "$$($(BIN)/python -c 'import cidalloc; print(*cidalloc.__path__)')" \
		build/mutation
	cd build/mutation && ../../$(BIN)/mutmut run $(ARGS) && \
		../../$(BIN)/python ../../tests/support/survivors.py ../../tests/mutants/survived.list

.venv/.mutation: .venv/.built .venv/.dev
	$(call install,Installing mutmut,$(BIN)/python -m pip install $(LOCK) --group mutation)
	@touch $@

crowd: .venv/.built .venv/.dev
	CIDALLOC_CROWD=50x20x60 $(BIN)/python -m pytest -q -s tests/integration/test_crowd.py

drill-drain: .venv/.built .venv/.dev
	CIDALLOC_DRAIN=8x12x30 $(BIN)/python -m pytest -q -s tests/integration/test_drain_live.py

drill-fleet: .venv/.built .venv/.dev
	CIDALLOC_LOAD=60x5x60 $(BIN)/python -m pytest -q -s tests/integration/test_fleet_drill.py

drill-tidy: .venv/.bench
	CIDALLOC_TIDY=20x2x300x2 CIDALLOC_TIDY_FILE=docs/tidied.json \
		$(BIN)/python -m pytest -q -s tests/integration/test_tidy_drill.py
	$(BIN)/python bench/tidy.py

simulate-fleet: .venv/.bench
	$(BIN)/python tests/support/many_servers.py 50x5000x8 100x10000x8 20x2000x0 1000x100000x8 \
		--limit 600 --output docs/many-servers.json
	$(BIN)/python bench/many_servers.py

drill-route: .venv/.built .venv/.dev proxies
	CIDALLOC_ROUTE=100000x60 $(BIN)/python -m pytest -q -s tests/integration/test_route.py -k come_and_go

# Needs root, on Debian or Ubuntu. Elsewhere install them by other means; without them `make test` skips
# the tests behind them.
proxies:
	@for each in nginx haproxy; do PATH="$$PATH:/usr/sbin" command -v $$each >/dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends $$each; } || exit 1; done

# Needs root, on Debian or Ubuntu, if something is missing.
CPP_PACKAGES := g++ clang clang-tidy clang-format cmake pkg-config libcurl4-openssl-dev \
	nlohmann-json3-dev doctest-dev uuid-dev openssl
cpp: .venv/.built .venv/.dev
	@dpkg -s $(CPP_PACKAGES) >/dev/null 2>&1 || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends $(CPP_PACKAGES); } || \
		{ echo "make cpp needs the packages $(CPP_PACKAGES)" >&2; exit 1; }
	CIDALLOC_CPP=1 $(BIN)/python -m pytest -q -rP -n 2 tests/cpp tests/unit/test_cpp_codes.py

simulate: ARGS = 1000 --runs 2000
simulate: .venv/.built .venv/.dev
	$(BIN)/python tests/support/simulate.py $(ARGS)

chaos: .venv/.built .venv/.dev
	$(BIN)/python tests/support/chaos.py $(ARGS)

record: .venv/.built .venv/.dev
	$(BIN)/python tests/support/record.py $(ARGS)

errors: .venv/.built .venv/.dev
	CIDALLOC_ERRORS=all $(BIN)/python -m pytest -q -rP -n 2 tests/crash/test_every_error.py tests/crash/test_damaged_file.py $(ARGS)

conformance: .venv/.built .venv/.dev
	@command -v node >/dev/null || { echo "error: node is not on PATH: install nodejs" >&2; exit 1; }
	CIDALLOC_CONFORMANCE=500 $(BIN)/python -m pytest -q tests/integration/test_conformance.py

bench: .venv/.bench
	$(BIN)/python -m pytest -q bench/test_peers.py
	$(BIN)/python bench/study.py $(ARGS)

bench-client: .venv/.bench
	$(BIN)/python bench/client.py $(ARGS)

bench-registry: .venv/.built .venv/.dev
	$(BIN)/python bench/registry.py $(ARGS)

scale: .venv/.built .venv/.dev
	$(BIN)/python bench/scale.py $(ARGS)

load: .venv/.built .venv/.dev
	@for each in wrk h2load; do command -v $$each >/dev/null || { \
		echo "error: $$each is not on PATH: install wrk and nghttp2-client" >&2; exit 1; }; done
	$(BIN)/python bench/load.py $(ARGS)

bench-gate: .venv/.bench
	$(BIN)/python -m pytest -q bench --benchmark-disable
	$(BIN)/python bench/gate.py $(ARGS)

# What was found stays in .cache/fuzz; what is worth keeping goes to fuzz/corpus.
SECONDS := 30
FUZZ := $(patsubst fuzz/corpus/%,%,$(wildcard fuzz/corpus/*))
fuzz: .venv/.fuzz
	@set -e; for each in $(FUZZ); do mkdir -p .cache/fuzz/$$each; echo "== $$each"; \
		$(BIN)/python fuzz/fuzz.py $$each -max_total_time=$(SECONDS) -timeout=20 -verbosity=0 \
		-artifact_prefix=.cache/fuzz/ $(ARGS) .cache/fuzz/$$each fuzz/corpus/$$each; done

.venv/.fuzz: .venv/.built .venv/.dev
	$(call install,Installing the fuzzer,$(BIN)/python -m pip install --group fuzz)
	@touch $@

# The extension modules once more, so that a stray access or an overflow ends the process.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
LIBRARIES = $(foreach name,libasan.so libubsan.so,$(shell gcc -print-file-name=$(name)))

sanitize: build/sanitized/.built
	LD_PRELOAD="$(LIBRARIES)" PYTHONPATH=build/sanitized PYTHONMALLOC=malloc \
		ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
		CIDALLOC_SANITIZED=1 $(BIN)/$(PYTEST) -m 'not server' $(foreach name,\
		sanitized alloc* sessions storage registry* resize service takeover,tests/unit/test_$(name).py) \
		tests/crash/test_registry*.py

build/sanitized/.built: .venv/.built .venv/.dev
	rm -rf build/sanitized
	SKBUILD_BUILD_DIR=build/sanitize CFLAGS="$(SANITIZERS) -O1 -g" \
		$(BIN)/python -m pip install -q --no-build-isolation --no-deps --target build/sanitized .
	@touch $@

# Processes that are killed leave no counts, so a little more is reached than is shown.
coverage: build/covered/.built
	rm -f .coverage .coverage.*
	find build/coverage -name '*.gcda' -delete
	-PYTHONPATH=build/covered $(BIN)/python -m coverage run -m pytest $(ARGS)
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report
	$(BIN)/python tests/support/cython_lines.py build/coverage

build/covered/.built: .venv/.built .venv/.dev
	$(call install,Installing coverage,$(BIN)/python -m pip install $(LOCK) --group coverage)
	rm -rf build/covered build/coverage
	SKBUILD_BUILD_DIR=build/coverage $(BIN)/python -m pip install -q --no-build-isolation --no-deps \
		--config-settings=cmake.define.CIDALLOC_COVERAGE=ON --target build/covered .
	@touch $@

# What a wheel could lack: with the server where that is (numpy 1), and as most users have it (numpy
# 2, no server). Drills that only take long are left out.
SHORT := CIDALLOC_FLEET=5 ../../clean/bin/$(PYTEST)
DRILLS := $(foreach path,unit/test_alloc_long.py unit/test_alloc_threads.py crash simulation \
	integration/test_crowd.py,--ignore tests/$(path))
dist: .venv/.built .venv/.dev
	rm -rf build/dist build/clean
	$(BIN)/python -m build --outdir build/dist .
	tar -C build/dist -xzf build/dist/cidalloc-*.tar.gz
	$(call clean_environment,all)
	cd build/dist/cidalloc-*/ && $(SHORT) -m server tests/unit $(foreach name,cli_live demo \
		manager metrics,tests/integration/test_$(name).py)
	$(call clean_environment,client) 'numpy>=2'
	cd build/dist/cidalloc-*/ && $(SHORT) -m 'not server' $(DRILLS)

# As most users have it: without the server, on any Python. The oldest are those that pyproject.toml names.
OLDEST = $(shell sed -n '/^dependencies = /p; /^client = /p' pyproject.toml | \
	grep -o '[a-z]*[^"]*>=[0-9.]*' | sed 's/\[.*\]//; s/>=/==/')
WITH := oldest
dependencies: | .cache/tmp
	$(PYTHON) -m venv --clear build/dependencies
	build/dependencies/bin/python -m pip install -q -U 'pip>=25.1'
	build/dependencies/bin/python -m pip install -q --group test '.[client]' \
		$(foreach each,$(if $(filter oldest,$(WITH)),$(OLDEST),$(WITH)),'$(each)')
	CIDALLOC_FLEET=5 build/dependencies/bin/$(PYTEST) -m 'not server' $(DRILLS)

# The tests of the allocator need neither tritonclient nor a server, so neither does this.
PYTHONS := 3.10 3.11 3.12 3.13 3.14 3.14t
pythons: | .cache/tmp
	@set -e; for v in $(PYTHONS); do $(find_python); what=.; to=build/pythons/$$v; $(test_allocator); \
		done

# For the shell: the Python $v as $found, or the next $v.
define find_python
found=$$(for p in python$$v ~/.pyenv/versions/$$v.*/bin/python /opt/python$$v/bin/python$$v; do \
	"$$p" -c '' 2>/dev/null && { command -v "$$p"; break; }; done || true); \
[ "$$found" ] || { echo "== Python $$v: skipped, since it is not there"; continue; }; \
echo "== Python $$v: $$found"
endef

# For the shell: install $what in a new environment $to of $found, and test its allocator.
define test_allocator
"$$found" -m venv --clear $$to; $$to/bin/python -m pip install -q -U 'pip>=25.1'; \
$$to/bin/python -m pip install -q $$what pytest pytest-timeout hypothesis; \
$$to/bin/python -m pytest -q --noconftest tests/unit/test_alloc*.py
endef

# The compiler is told an old glibc, that of manylinux2014, and the CPU: this needs no container.
CPUS := x86_64 aarch64
wheels: build/wheels/.tools | .cache/tmp
	rm -rf dist build/wheels/raw
	@set -e; PATH="$(CURDIR)/build/wheels/tools/bin:$$PATH"; \
		zig=$$(python -c 'import ziglang; print(*ziglang.__path__)')/zig; \
		export SKBUILD_INSTALL_STRIP=false LDFLAGS=-s; \
		for v in $(PYTHONS); do $(find_python); \
		suffix=$$("$$found" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'); \
		for cpu in $(CPUS); do echo "   $$cpu"; \
			SETUPTOOLS_EXT_SUFFIX=$${suffix/$$(uname -m)/$$cpu} _PYTHON_HOST_PLATFORM=linux-$$cpu \
			CC="$$zig cc -target $$cpu-linux-gnu.2.17" SKBUILD_BUILD_DIR=build/wheels/$$v-$$cpu \
			python -m pip --python "$$found" wheel -q --no-deps -w build/wheels/raw .; done; done; \
		auditwheel repair --plat auto --only-plat -w dist build/wheels/raw/*.whl
	CIDALLOC_PURE=1 build/wheels/tools/bin/python -m pip wheel -q --no-deps -w dist/pure .
	build/wheels/tools/bin/python -m build -q --sdist --outdir dist .
	@$(MAKE) -s test-wheels

# The wheels in dist/: those for this CPU as `make pythons` does it; the pure one; and one for aarch64 on
# Debian's Python, which qemu-user runs, if these can be had. It runs tests that start no processes, and that
# reserve little memory, since qemu takes what is reserved.
ARM := build/wheels/aarch64
PURE := build/wheels/pure/bin
test-wheels:
	@set -e; for v in $(PYTHONS); do $(find_python); to=build/wheels/$$v; \
		what=$$(ls dist/*-cp$${v/./}-manylinux2014*_$$(uname -m).whl); $(test_allocator); done
	$(PYTHON) -m venv --clear build/wheels/pure
	$(PURE)/python -m pip install -q "$$(ls $(CURDIR)/dist/pure/*.whl)[client]"
	cd build/wheels && pure/bin/python -c 'import cidalloc.client' && pure/bin/cidalloc status --help >.status
	! $(PURE)/cidalloc model build/wheels/models
	@if [ -e $(ARM)/.unpacked ] || $(MAKE) $(ARM)/.unpacked; then set -e; \
		tag=$$(ls $(ARM)/system/usr/bin | sed -n 's/^python3\.\([0-9]*\)$$/3\1/p'); \
		build/wheels/tools/bin/python -m pip install -q --upgrade --target $(ARM)/site --only-binary :all: \
		--python-version $$tag $(foreach tag,2014 _2_17 _2_28,--platform manylinux$(tag)_aarch64) \
		--platform any dist/*-cp$$tag-manylinux2014*_aarch64.whl pytest pytest-timeout hypothesis; \
		run="qemu-aarch64-static -L $(ARM)/system $(ARM)/system/usr/bin/python3.$${tag#3}"; \
		export PYTHONPATH=$(ARM)/site; \
		$$run -c 'import cidalloc.manager.registry, cidalloc.triton_model._parent_watch'; \
		$$run -m pytest -q --noconftest -k 'not largest_pools' \
		$(foreach name,alloc alloc_args alloc_buffer,tests/unit/test_$(name).py); \
		else echo "== aarch64: not tested, since its Python or qemu-user cannot be had here"; fi

# Unpacked here and not installed: apt-get has lists of its own for the other CPU. (qemu itself is
# installed, as root on Debian or Ubuntu.)
APT = -q -o Dir::State::Lists=$(CURDIR)/$(ARM)/apt -o Dir::Cache=$(CURDIR)/$(ARM)/apt \
	-o Dir::State::status=/dev/null $(foreach cpu,amd64 arm64,-o APT::Architectures::=$(cpu)) \
	-o APT::Sandbox::User=root
$(ARM)/.unpacked:
	@command -v qemu-aarch64-static >/dev/null || \
		{ apt-get update -q && apt-get install -y -q --no-install-recommends qemu-user-static; }
	@mkdir -p $(ARM)/apt/partial $(ARM)/apt/archives/partial $(ARM)/system
	@apt-get $(APT) update && apt-get $(APT) install --download-only -y --no-install-recommends \
		python3-minimal:arm64 libpython3-stdlib:arm64 libstdc++6:arm64
	@for each in $(ARM)/apt/archives/*_arm64.deb; do dpkg -x $$each $(ARM)/system || exit 1; done
	@touch $@

# As a user without a clone, with dist/ beside the index.
RELEASE = cidalloc[all]==$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TOOLS := $(CURDIR)/build/wheels/tools/bin
TRIAL := $(CURDIR)/build/trial
trial: build/wheels/.tools
	@ls dist/*.whl >/dev/null || { echo "error: dist/ has no wheels: run make wheels" >&2; exit 1; }
	rm -rf $(TRIAL) && mkdir -p $(TRIAL)
	cd $(TRIAL) && UV_CACHE_DIR=$(CURDIR)/.cache/uv $(TOOLS)/uvx --python $(TOOLS)/python \
		--refresh-package cidalloc --find-links $(CURDIR)/dist --from '$(RELEASE)' cidalloc demo
	cd $(TRIAL) && PIPX_HOME=$(TRIAL)/pipx $(TOOLS)/pipx run --python $(TOOLS)/python --no-cache \
		--pip-args='--find-links=$(CURDIR)/dist' --spec '$(RELEASE)' cidalloc demo

lock: build/wheels/.tools
	$(TOOLS)/uv pip compile -q --universal --python-version 3.10 --no-emit-index-url --no-annotate --upgrade \
		--custom-compile-command 'make lock' --extra all $(foreach group,dev bench coverage mutation,\
		--group $(group)) pyproject.toml -o requirements.lock

# What the package is made of, with the client and as of today: build/cidalloc.cdx.json.
sbom: build/wheels/.tools
	$(PYTHON) -m venv --clear build/sbom
	build/sbom/bin/python -m pip install -q '.[client]'
	$(TOOLS)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		-o build/cidalloc.cdx.json build/sbom

release-check: .venv/.built .venv/.dev
	$(BIN)/python -m pytest -q tests/unit/test_golden.py tests/unit/test_project_files.py \
		tests/unit/test_package.py
	$(MAKE) docs wheels
	$(TOOLS)/twine check --strict dist/*.whl dist/*.tar.gz
	$(MAKE) trial sbom
	@ls -l dist

build/wheels/.tools:
	@mkdir -p build/wheels
	$(PYTHON) -m venv --clear build/wheels/tools
	build/wheels/tools/bin/python -m pip install -q -U 'pip>=25.1'
	build/wheels/tools/bin/python -m pip install -q --group pyproject.toml:wheels
	@touch $@

define clean_environment
	$(BIN)/python -m venv --clear build/clean
	build/clean/bin/python -m pip install -q -U 'pip>=25.1'
	build/clean/bin/python -m pip install -q --group pyproject.toml:test \
		"cidalloc[$(1)] @ file://$$(echo $(CURDIR)/build/dist/*.whl)"
endef

.venv/.bench: .venv/.built .venv/.dev
	$(call install,Installing the peers of the benchmarks,$(BIN)/python -m pip install $(LOCK) --group bench)
	@touch $@

clean:
	rm -rf .venv .cache build .hypothesis .mypy_cache .ruff_cache .pytest_cache

.cache/tmp:
	@mkdir -p $@

# Another Python than before, if one is named: begin anew.
WHICH := -c 'import sys; print(sys.version.split()[0], sys.base_prefix)'
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
ifneq ($(shell $(PYTHON) $(WHICH)),$(shell $(BIN)/python $(WHICH) 2>/dev/null))
.venv/.ready: another-python
endif
endif
.PHONY: another-python
another-python:
	rm -rf .venv

.venv/.ready: pyproject.toml Makefile requirements.lock | .cache/tmp
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found (the bundled Triton server" \
		"knows no other); name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "== Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	$(call install,Installing the tools of the build,$(BIN)/python -m pip install -U 'pip>=25.1' && \
		$(BIN)/python -m pip install $(LOCK) --group build)
	$(call install,Installing cidalloc$(comma) tritonclient and a Triton server for this CPU: some minutes,\
		$(BIN)/python -m pip install $(LOCK) --no-build-isolation '.[all]')
	@touch .venv/.fresh $@

# What tests and linters need besides.
.venv/.dev: .venv/.ready
	$(call install,Installing the tools of the tests and linters,$(BIN)/python -m pip install $(LOCK) --group dev)
	@touch $@

# Always a wheel, never an editable install: Triton's Python imports the same package.
.venv/.built: .venv/.ready $(SOURCES)
	@if [ ! -e .venv/.fresh ]; then $(MAKE) -s rebuild; fi
	@rm -f .venv/.fresh; touch $@

.PHONY: rebuild
rebuild:
	$(call install,Building cidalloc,$(BIN)/python -m pip install --no-build-isolation --no-deps \
		--force-reinstall .)
