# make bench                          measure, draw, print: the default sweep of this machine
# make bench ARGS="--seq-len 1024"    any arguments of run_bench.py
# make paper                          the SPAttention paper's tables and figures, theirs beside ours
# make test                           format, lint, tests
# make readme                         the README's figures, from the committed results
# make kills ARGS="--kills 5"         kill and damage real sweeps, and see that nothing is lost
# make detection                      how often `compare` sees a difference of nothing, 1 % and 3 %
# make faults                         planted faults through the check, on this machine's kernels
# make docstrings.txt                a text for `run_bench.py train --text`: packages' docstrings
# make matrix                         (GPU) every preset, type and head dim against float64
# make clocks                         (GPU) the device clock against CUPTI's and triton's
# make attend-cost                    (GPU) what attend() costs a call
# make serial                         (GPU) what cells cost that are compiled and timed one by one
# make results ARGS="lengths train"   (GPU) the files of results/h200, by the commands that made them
# The first of them installs everything into .venv; EXTRAS=dev,flash also flash-attn-4 (Hopper GPUs).

PYTHON ?= python3
ARGS =
EXTRAS = dev

.PHONY: bench paper test readme kills detection faults matrix clocks attend-cost serial \
	results clean

bench: .venv/installed
	.venv/bin/python run_bench.py $(ARGS)

paper: .venv/installed
	.venv/bin/python run_bench.py paper $(ARGS)

test: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pytest -n auto $(ARGS)

readme: .venv/installed
	.venv/bin/python -m bench.readme

kills detection faults: .venv/installed
	.venv/bin/python -m tests.$@ $(ARGS)

docstrings.txt: .venv/installed
	.venv/bin/python -m bench.docstrings $@

matrix clocks attend-cost serial results: .venv/installed
	.venv/bin/python -m tests.gpu.$(subst -,_,$@) $(ARGS)

clean:
	rm -rf .venv

# --clear, since an older environment may hold another Python or packages no longer wanted.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
		sys.version_info >= (3, 10) or sys.exit("Python %s is too old: 3.10 at least" % v)'
	@echo "Installing into .venv, once: about 1.5 GB, with CUDA 5 GB"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@
