# The environment of both commands is .venv; nothing outside of it changes but the cache of the demo's model.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
ADAPTERS := .venv-adapters
BENCH ?= 'tokens/smollm2/float32/10,32,64' 'heads/smollm2/float32/10' 'prompts/smollm2/float32/64' 'spans/smollm2/float32/512x16'

.PHONY: demo test lint test-kernels test-interpreted oldest-torch docs tutorial release-check audit bench bench-peers gpu gpu-large adapters clean

demo: $(VENV)/ready
	$(BIN)/depass attribute "Catalonia belongs to the continent of" --target " Europe" --target " Asia" \
		--viz-path depass-demo.html
	@echo "The same as a page: depass-demo.html"

# At most four processes of two threads; idle threads sleep instead of spinning on cores that others need.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
PARALLEL := --numprocesses=auto --maxprocesses=4 --dist=worksteal

test: $(VENV)/ready
	$(PYTEST) $(PARALLEL)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The Triton kernels without a GPU: their logic in Triton's interpreter, and compiled for GPUs that are not here.
test-kernels: $(VENV)/ready
	$(MAKE) --jobs=2 compile-for-sm_80 compile-for-sm_86 compile-for-sm_89 compile-for-sm_90 test-interpreted

compile-for-%:
	$(BIN)/python -m pytest tests/depass_kernels/test_ahead_of_time.py --ahead-of-time -k $*

test-interpreted:
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/depass_kernels tests/depass/test_served.py -k "triton or auto"

# The oldest supported torch: csrc compiles against its headers, with and without CUDA, and needs no symbol that it lacks.
oldest-torch: $(VENV)/ready
	$(BIN)/python tests/support/oldest_torch.py $(VENV)/oldest-torch

# The pages, without a warning, into build/docs. The tutorial is run anew for them: what it says of its numbers is asserted there.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	! grep -rnE '<(script|img|iframe|source)[^>]* src="(https?:)?//|<link[^>]* href="(https?:)?//|url\(["'"'"']?(https?:)?//' \
		build/docs --include=*.html --include=*.css  # a page loads nothing from outside
	@echo build/docs/index.html

# The tutorial as it stands in the repository, with the outputs of this machine.
tutorial: $(VENV)/docs
	PYTHONWARNINGS=ignore:IProgress $(BIN)/jupyter execute --inplace --NotebookClient.record_timing=False docs/tutorial.ipynb

# The sdist, the wheel that is built out of it, and each of them alone in an environment that has nothing of this checkout.
# Without isolation, because csrc needs the headers of a torch.
release-check: $(VENV)/ready
	rm -rf dist build/clean
	DEPASS_BUILD_CPU=1 $(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet $(TORCH)
	build/clean/bin/python -m pip install --quiet dist/*.whl
	build/clean/bin/python -I tests/release.py
	DEPASS_BUILD_CPU=1 build/clean/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.tar.gz
	build/clean/bin/python -I tests/release.py

# Known vulnerabilities of what the environment holds, from PyPI's advisories. A package that cannot be asked about is a failure.
audit: $(VENV)/ready
	test -x $(VENV)/audit/bin/pip-audit || ($(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit)
	mkdir -p build
	$(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+[^ ]*$$//' > build/audited.txt  # advisories know no local versions
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r build/audited.txt

# The CPU: tokens, heads, short prompts and a long context of the real SmolLM2 against every baseline, then the report.
bench: $(VENV)/ready
	status=0; $(BIN)/python -m benchmarks run $(BENCH) || status=$$?; \
	$(BIN)/python -m benchmarks report README.md docs/performance.md && exit $$status

# Other tools in their own code, each installed into build/peers, beside this package; then the report. PUBLISHED is a
# checkout of the published DePass code, which no package index has. PEERS names a few tools instead of all.
bench-peers: $(VENV)/ready
	$(BIN)/python -m benchmarks.peers $(PEERS) --torch '$(TORCH)' $(if $(PUBLISHED),--published $(PUBLISHED))
	$(BIN)/python -m benchmarks report docs/performance.md

# On a machine with a GPU that has torch, transformers, pytest, hypothesis and rich already, and perhaps no network: builds in
# place, measures, tests and sanitizes within SECONDS, and installs nothing. `make gpu-large` measures what takes longer.
# DRY=1 tries every stage on a CPU. COMMIT names the code where this is no checkout.
OUT ?= $(if $(DRY),build/gpu-dry,benchmarks/results)
SECONDS ?= 540
GPU := PYTHONPATH=python:. $(PYTHON) benchmarks/gpu.py $(OUT) --seconds $(SECONDS) $(if $(DRY),--dry) $(if $(COMMIT),--commit $(COMMIT))

gpu:
	$(GPU)

gpu-large:
	$(GPU) --large

# Other tools' adapters (docs/adapters.md), each in an environment of its own, since the tools do not install together. The
# pins are what was tried; those of pyproject.toml's extras. Tests of tools that an environment does not have skip.
adapters: adapters-inseq adapters-transformer-lens adapters-nnsight

adapters-%: $(ADAPTERS)/%/ready
	PYTHONPATH=python:. OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(ADAPTERS)/$*/bin/python -m pytest -rs tests/adapters

$(ADAPTERS)/inseq/ready: TOOLS := inseq==0.7.1 captum==0.9.0 interpreto==0.5.2
$(ADAPTERS)/transformer-lens/ready: TOOLS := transformer-lens==4.3.0 circuitsvis==1.43.3
$(ADAPTERS)/nnsight/ready: TOOLS := nnsight==0.8.1
$(ADAPTERS)/%/ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet $(TORCH) $(TOOLS) "transformers>=5,<6" gguf rich pytest
	touch $@

$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet $(TORCH)
	PYTHONWARNINGS=ignore DEPASS_BUILD_CPU=1 \
		$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/docs: $(VENV)/ready
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) $(ADAPTERS) build dist depass_kernels/*.so *.egg-info
