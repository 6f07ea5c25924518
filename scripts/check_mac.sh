#!/usr/bin/env bash
# Checks FlashHead on a Mac and writes what it finds as pages that read like issues:
#   scripts/check_mac.sh                   # everything
#   scripts/check_mac.sh compile kernels   # some of it; scripts/check_mac.py lists the checks
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
make_venv .venv-test -e ".[test]"
exec .venv-test/bin/python scripts/check_mac.py "$@"
