#!/usr/bin/env bash
# Lint, format, floors, types, workflows and tests, in a .venv-test of the checkout. Arguments go to pytest:
#   scripts/test.sh tests/head/test_head.py -k ties
#   scripts/test.sh -m "not real"          # without the real model
#   scripts/test.sh --oldest               # with the oldest mlx-lm and mlx, in a .venv-oldest
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh

if [ "$1" = --oldest ]; then
  shift
  make_venv .venv-oldest -r scripts/oldest.txt
  exec .venv-oldest/bin/pytest -q -m "not real and not newest" tests/decoding \
    tests/head/test_{dense_kernels,mlx_order}.py \
    tests/serving/test_{stages,engine,http,recovery}.py \
    tests/models/test_{compat,install}.py \
    tests/commands/test_{generate,chat,convert,run}.py "$@"
fi
make_venv .venv-test -e ".[test]"

# Says what is checked, then runs a program of the .venv-test.
check() {
  echo "== $1"
  shift
  ".venv-test/bin/$@"
}

check "Lint" ruff check --quiet
check "Format" ruff format --check --quiet
check "Floors: which folder imports which" lint-imports --no-logo --no-cache
check "Types" mypy --no-error-summary
check "GitHub's workflows: their schema" check-jsonschema --quiet \
  --builtin-schema vendor.github-workflows .github/workflows/*.yml
check "GitHub's workflows: their safety" zizmor --offline --quiet --strict-collection .
# A process that crashes ends the run; pytest-xdist may wait for ever after it has started another.
check "Tests" pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
  --durations 25 "$@"
