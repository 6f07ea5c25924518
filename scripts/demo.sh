#!/usr/bin/env bash
# The main job on a real model: builds Gemma-3-270M and its FlashHead, and lets the normal head and
# FlashHead write the same text side by side. A second run reuses what is there. The environment is
# the checkout's .venv, which has all commands afterwards.
#   scripts/demo.sh --prompt "The moon is" --max-tokens 60
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
if [ ! -e .venv ]; then
  echo "The first run takes 3 to 10 minutes: it installs, downloads a model and builds its FlashHead."
fi
make_venv .venv -e ".[report,chat,structured,qr]" gguf  # which reads the model's quantized layers
exec .venv/bin/python scripts/demo.py "$@"
