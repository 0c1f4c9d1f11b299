PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: install quickstart rehearsal test test-slow check bench bench-gpu

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# The path lets the deepspeed launcher find this environment's python; where deepspeed is absent, plain python trains.
quickstart: install
	PATH="$(CURDIR)/$(BIN):$$PATH"; \
	if [ -x $(BIN)/deepspeed ]; then run="deepspeed --num_gpus 1"; else run=python; fi; \
	$$run fastcorl/train.py --config configs/quickstart.yaml $(ARGS)

# The path of configs/janus_pro_1b on a CPU and without downloads: two ranks of one thread, models of random weights.
rehearsal: export OMP_NUM_THREADS = 1
rehearsal: export CUDA_VISIBLE_DEVICES =
rehearsal: export DS_ACCELERATOR = cpu
rehearsal: install
	$(BIN)/python -m fastcorl.rehearsal --out runs/rehearsal_files
	PATH="$(CURDIR)/$(BIN):$$PATH"; \
	if [ -x $(BIN)/deepspeed ]; then run="deepspeed --num_gpus 2"; else run=python; fi; \
	$$run fastcorl/train.py --config configs/rehearsal.yaml $(ARGS)

# Two processes, a file of tests at a time, one thread each: threads of both would wait for one another.
JOBS ?= 2
test: export OMP_NUM_THREADS = 1
test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-slow: export OMP_NUM_THREADS = 1
test-slow: install
	$(BIN)/python -m pytest -m slow $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Tables and JSON go to RESULTS, one of each for every part; bench/results/ holds those that are quoted. A part in which
# a benchmark fails has a table of the others.
RESULTS ?= runs/bench
PARTS ?= kernels rollout step
rollout := bench/bench_rollout.py
step := bench/bench_step.py bench/bench_scaling.py
kernels := bench $(addprefix --ignore=,$(rollout) $(step))
bench: MARK := not gpu
bench-gpu: MARK := gpu
bench-gpu: PARTS = kernels rollout step
bench-gpu: RESULTS = bench/results/h200

bench bench-gpu: install
	mkdir -p $(RESULTS)
	status=0; $(foreach part,$(PARTS),\
	$(BIN)/python -m pytest $($(part)) --benchmark-only -m "$(MARK)" --benchmark-json=$(RESULTS)/$(part).json $(ARGS) \
	|| status=$$?; \
	$(BIN)/python -m bench.summary $(RESULTS)/$(part).json > $(RESULTS)/$(part).md || status=$$?;) exit $$status
