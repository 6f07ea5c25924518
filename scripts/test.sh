#!/usr/bin/env bash
# Lint, format check and tests in a .venv of the checkout. Arguments go to pytest:
#   scripts/test.sh tests/test_head.py -k ties
#   scripts/test.sh -m "not real"          # without the real model
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
make_venv test

.venv/bin/python -m ruff check --quiet
.venv/bin/python -m ruff format --check --quiet
.venv/bin/python -m pytest -q -n 2 --dist loadfile "$@"
