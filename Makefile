# SPDX-License-Identifier: Apache-2.0
# Names for the commands of this repository; `make` lists them.

VENV := $(or $(CAPO_VENV),.venv)
.DEFAULT_GOAL := help
.PHONY: help quick test fuzz test-gpu style types docs architecture clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quick:  ## lint, types and the tests without Ray, Slurm or process groups
	bash scripts/test.sh --quick

test:  ## everything that CI runs
	bash scripts/test.sh

fuzz:  ## the tests of random damage, with many more examples
	HYPOTHESIS_PROFILE=fuzz bash scripts/test.sh -q -k fuzz

test-gpu:  ## the kernels' tests, on this machine's GPU
	bash scripts/test.sh tests/core/kernels

style:  ## ruff, bash -n and shellcheck
	bash scripts/test.sh --style

types:  ## mypy
	bash scripts/test.sh --types

docs:  ## the site, in outputs/site; a warning is an error
	$(VENV)/bin/sphinx-build -W --keep-going -q docs outputs/site

architecture:  ## which room imports which
	$(VENV)/bin/python -m tests.architecture

clean:  ## caches and built files; outputs of runs stay
	rm -rf build dist outputs/site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
