# SPDX-License-Identifier: GPL-2.0-or-later
# On a fresh Debian with git, make and python3, `make demo`, `make test` and `make check` set up all that they need.

# Debian's own interpreter first: the Debian packages of the dependencies are built for it.
PYTHON ?= $(firstword $(foreach python,/usr/bin/python3 python3,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(python))))
# Installs, or asks for, the Debian packages; DEPS=true takes them for granted.
DEPS ?= packaging/install-deps
# Further arguments for pytest in `make test`.
PYTEST_ARGS ?=
# How long `make fuzz` takes for each target; or, if FUZZ_RUNS is set, how many inputs, always the same ones.
FUZZ_SECONDS ?= 300
FUZZ_RUNS ?=
# Which of the targets (tests/fuzz); all if none is named.
FUZZ_TARGETS ?=

PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input install
LOCKED = --require-hashes --no-build-isolation

MAN_PAGES = $(patsubst docs/man/%.scd,build/man/%,$(wildcard docs/man/*.scd))

.PHONY: help deps venv venv-dev venv-fuzz venv-bench demo test test-trixie fuzz soak load check crash-table man completions lock clean
.PHONY: deb wheel rpm arch packages package-test
.PHONY: deps-beds beds container-test initramfs-test powercut powercut-sample bench scale vm-test vm-kill
.DELETE_ON_ERROR:

help:
	@echo 'make demo    show what luksrotd does'
	@echo 'make test    run all tests that need no installed package'
	@echo 'make test-trixie  run all tests on Debian 13, in a folder of its own; as root, with mmdebstrap'
	@echo 'make container-test  test the installed package on Debian 12 and 13, in containers; as root'
	@echo 'make vm-test   test the installed package in virtual machines; as root'
	@echo 'make vm-kill   kill a virtual machine in the middle of 200 rotations'
	@echo 'make soak    run long random sequences against the model of a volume'
	@echo 'make load    put the daemon under load for an hour, and see that nothing is left of it'
	@echo 'make fuzz    fuzz what reads a header, a token, a shadow, a line of a worker'
	@echo 'make check   check format, lint, types and the import law'
	@echo 'make crash-table  examine all crash states, and write docs/crash-states.md'
	@echo 'make powercut  record virtual machines, judge every power cut of them, and write docs/power-cuts.md'
	@echo 'make powercut-sample  the same in a minute'
	@echo 'make bench   measure beside other tools, and write docs/benchmarks; as root, on a machine that does nothing else'
	@echo 'make scale   simulate a fleet of 100,000 machines, and write docs/scale.md'
	@echo 'make man     build the man pages into build/man'
	@echo 'make initramfs-test  unlock every crash state with the initramfs of Debian, and boot from some'
	@echo 'make completions  renew packaging/completions, of the options of luksrotctl'
	@echo 'make deb     build the Debian package into build/deb'
	@echo 'make wheel   build sdist and wheel into dist'
	@echo 'make rpm, make arch   build packages for Fedora and Arch into build/rpm and build/arch, so far as that goes here'
	@echo 'make package-test  build all packages, and test them'
	@echo 'make venv    only set up .venv with luksrotd in it; make venv-dev: with the tools of tests and checks, too'
	@echo 'make beds    make Debian 12 and 13 in folders, for the tests of installed packages; as root'
	@echo 'make lock    renew packaging/*.lock'
	@echo 'make clean   remove what was built'

deps:
	@$(DEPS)

venv: .venv/luksrotd.stamp
venv-dev: .venv/dev.stamp
venv-fuzz: .venv/fuzz.stamp
venv-bench: .venv/bench.stamp

# The stamps lie in .venv, so that they go with it.  Build requirements come first, and as wheels, so that
# whatever is built after them is built with what is locked.
.venv/build.stamp: packaging/requirements-build.lock | deps
	@test -n '$(PYTHON)' || { echo 'cannot set up .venv: Python 3.11 or newer is needed' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) --require-hashes --only-binary :all: -r $<
	@touch $@

.venv/requirements.stamp: packaging/requirements.lock .venv/build.stamp
	$(PIP) $(LOCKED) -r $<
	@touch $@

.venv/luksrotd.stamp: pyproject.toml packaging/luksrotd_build.py luksrotd/cryptsetup/ffi_build.py .venv/requirements.stamp
	$(PIP) --no-build-isolation --no-index --no-deps --editable .
	.venv/bin/python -m pip --disable-pip-version-check check
	@touch $@

.venv/dev.stamp: packaging/requirements-dev.lock .venv/luksrotd.stamp
	$(PIP) $(LOCKED) -r $<
	@touch $@

# From wheels only: to build atheris takes a clang with libFuzzer.
.venv/fuzz.stamp: packaging/requirements-fuzz.lock .venv/dev.stamp
	$(PIP) --require-hashes --only-binary :all: -r $< || { \
		echo 'cannot set up fuzzing: atheris has no wheel for this machine or this Python; make test needs none' >&2; exit 1; }
	@touch $@

.venv/bench.stamp: packaging/requirements-bench.lock .venv/dev.stamp
	$(PIP) --require-hashes --only-binary :all: -r $<
	@touch $@

demo: deps venv
	.venv/bin/python -m tests.demo

# All tests, in two runs side by side (tests/__main__.py), with the branch coverage of the decision code measured on its
# own tests (tests/conftest.py); with PYTEST_ARGS one run of what these say.
# Native tracebacks: Debian 12's Python 3.11.2 sometimes fails to parse the sources that pytest would quote (a SystemError
# that ends the run, and hides which test had failed).
test: deps venv-dev
	.venv/bin/python -m $(if $(PYTEST_ARGS),pytest --cov --tb=native --hypothesis-profile=ci $(PYTEST_ARGS),tests)

# The same on Debian 13: libcryptsetup 2.7, Python 3.13, systemd 257, polkit 126.
test-trixie:
	packaging/in-debian trixie make test PYTEST_ARGS='$(PYTEST_ARGS)'

# Long random sequences of verbs, strangers and accidents, against a model (tests/model).
soak: deps venv-dev
	.venv/bin/python -m pytest --no-cov --tb=native --hypothesis-profile=soak $(PYTEST_ARGS) tests/model/test_model.py

# The load test with a hundred times as many calls.
load: deps venv-dev
	LUKSROTD_LOAD=100 .venv/bin/python -m pytest --no-cov --tb=native $(PYTEST_ARGS) tests/integration/test_load.py

fuzz: deps venv-fuzz
	.venv/bin/python -m tests.fuzz $(if $(FUZZ_RUNS),--runs $(FUZZ_RUNS),--seconds $(FUZZ_SECONDS)) $(FUZZ_TARGETS)

check: deps venv-dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy luksrotd tests/support tests/beds tests/bench tests/powercut tests/fuzz tests/scale
	.venv/bin/lint-imports

# All crash states of all operations on all geometries; as root, for it works on loop devices.
crash-table: deps venv-dev
	.venv/bin/python -m tests.crash.table

# Real power cuts: recordings of virtual machines, cut at every write, judged by cryptsetup; as root, for hours.  Writes
# docs/power-cuts.md, unless RELEASE, SCENARIO (a name of tests/powercut/scenarios.py) or STATE say that it is a part.
SEED ?= 2026
powercut: deps venv-dev
	$(DEPS) package beds
	test -e build/deb/luksrotd_*_amd64.deb || $(MAKE) deb
	.venv/bin/python -m tests.powercut --seed $(SEED) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STATE),--state $(STATE)) \
		$(if $(RELEASE),--release $(RELEASE)) $(if $(SCENARIO),--scenario '$(SCENARIO)') $(if $(RECORD),--record $(RECORD))

# What CI does of it: one recording, few states, always the same ones of it.
powercut-sample: deps venv-dev
	$(DEPS) package beds
	test -e build/deb/luksrotd_*_amd64.deb || $(MAKE) deb
	.venv/bin/python -m tests.powercut --sample --record always

# luksrotd beside other tools, in one run; BENCH='--only 1 3' for some of the page, and with '--rounds 5' for none of it.
bench: deps venv-bench
	.venv/bin/python -m tests.bench $(BENCH)

# A fleet and its escrow store; without root.
scale: deps venv-bench
	.venv/bin/python -m tests.scale

man: deps docs/man/org.luksrotd1.5.scd $(MAN_PAGES)

# Checked in, so that it is there to be read; a test holds it against what it is made of.
docs/man/org.luksrotd1.5.scd: $(wildcard dbus/*.xml) packaging/dbus_doc.py luksrotd/errors.py
	PYTHONPATH=. $(PYTHON) packaging/dbus_doc.py $(wildcard dbus/*.xml) >$@

# Checked in as well.
completions: deps
	PYTHONPATH=. $(PYTHON) packaging/shell_completions.py packaging/completions

build/man/%: docs/man/%.scd
	@mkdir -p $(@D)
	scdoc <$< >$@

# Of the tree as it is, but for what git ignores.
deb:
	@$(DEPS) package
	packaging/build-deb

# The wheel is built of the sdist, which so is seen to be complete.
wheel: .venv/build.stamp
	rm -rf dist && mkdir dist
	PYTHONPATH=packaging .venv/bin/python -c 'import luksrotd_build; luksrotd_build.build_sdist("dist")'
	.venv/bin/python -m pip --quiet --disable-pip-version-check wheel --no-build-isolation --no-deps --no-index \
		--wheel-dir dist dist/*.tar.gz

rpm: wheel
	@$(DEPS) packages
	packaging/build-rpm

arch: wheel
	@$(DEPS) packages
	packaging/build-arch

PACKAGES ?= deb rpm arch
packages: $(PACKAGES)

# What the packages hold, and that luksrotd works out of wheel and sdist alone.  PACKAGES='rpm arch' where the .deb is built.
package-test: packages venv-dev
	.venv/bin/python -m pytest --no-cov --tb=native $(PYTEST_ARGS) tests/installed/packages

# Debian 12 and 13 in folders, with the package of the tree as it is installed: what containers boot (tests/beds).
beds: deps-beds venv-dev deb
	.venv/bin/python -m tests.beds

deps-beds:
	@$(DEPS) beds

# The installed package in containers, with systemd as PID 1: units, bus, polkit, upgrade; as root.
container-test: beds
	.venv/bin/python -m pytest --no-cov --tb=native $(PYTEST_ARGS) tests/installed/container

# Debian's own initramfs on every crash state, and booted from some (docs/initramfs.md); as root.
initramfs-test: beds
	.venv/bin/python -m pytest --no-cov --tb=native $(PYTEST_ARGS) tests/installed/initramfs

# The installed package on virtual machines, which QEMU emulates.  Minutes are no reason to show where Python is.
vm-test: beds
	.venv/bin/python -m pytest --no-cov --tb=native -o faulthandler_timeout=0 $(PYTEST_ARGS) tests/installed/vm

# A machine that loses its power in the middle of a rotation, 200 times, or as often as ROTATIONS says.
vm-kill: beds
	.venv/bin/python -m tests.installed.vm.kill_loop $(if $(ROTATIONS),--rotations $(ROTATIONS)) $(if $(SEED),--seed $(SEED))

# Versions move only here.  Each lock starts from nothing; the later ones are held to the earlier ones' versions.
lock: deps
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip --quiet --disable-pip-version-check install uv
	cd packaging && for name in requirements-build requirements requirements-dev requirements-fuzz requirements-bench; do \
		../build/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
			--no-annotate --custom-compile-command 'make lock' --output-file $$name.lock $$name.in || exit; \
	done

clean:
	rm -rf .venv build dist luksrotd.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
		.ruff_cache luksrotd/cryptsetup/_ffi*.so
	find luksrotd tests packaging -name __pycache__ -prune -exec rm -rf {} +
