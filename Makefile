# Each target works alone in a fresh clone: .ci/bootstrap installs what it needs.
.PHONY: recall test test-newest published lint clean
.NOTPARALLEL:

WORKDIR = runs/recall-128
SETUP = pyproject.toml .python-version .ci/bootstrap
PYTEST_WORKERS = auto
# A worker takes tests in a row and keeps what they compiled, until it steals another's.
WORKERS = -n $(PYTEST_WORKERS) --maxprocesses 8 --dist worksteal
# test,tpu-aot also brings the TPU compiler, for the tests that compile ahead of time.
EXTRAS ?= test

# The main job. A second call continues the run, or shows that it is done. Add fields with ARGS='--seed 1'.
recall: .venv/.ready
	.venv/bin/routing-jax train recall-128 --workdir $(WORKDIR) $(if $(wildcard $(WORKDIR)),--resume) $(ARGS)

# Everything but the slow tests; those for a GPU or a TPU skip themselves. One test: make test ARGS='-k causal'.
test: .venv/.ready-test
	.venv/bin/python -m pytest $(WORKERS) $(ARGS)

# The same suite on the newest jax and the newest of everything else.
NEWEST = jax==0.12.*
test-newest: .venv-newest/.ready-test
	.venv-newest/bin/python -m pytest $(WORKERS) $(ARGS)

# Fetches SmolLM2-135M, 98 MB; `make test` then runs the tests on it too.
published: .venv/.ready-published

lint: .venv/.ready-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

clean:
	rm -rf .venv .venv-newest .uv build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/.ready: $(SETUP)
	sh .ci/bootstrap .venv
	@touch $@

.venv/.ready-test: $(SETUP)
	sh .ci/bootstrap .venv $(EXTRAS)
	@touch $@ .venv/.ready

.venv/.ready-published: $(SETUP)
	sh .ci/bootstrap .venv test,published
	@touch $@ .venv/.ready .venv/.ready-test

.venv-newest/.ready-test: $(SETUP)
	NEWEST='$(NEWEST)' sh .ci/bootstrap .venv-newest $(EXTRAS)
	@touch $@
