#!/usr/bin/env bash
# The main job on a real model: builds Gemma-3-270M and its FlashHead, and generates from one prompt
# with the dense model and with FlashHead, side by side. A second run reuses what is there.
#   scripts/demo.sh --prompt "Tell me about the moon." --max-tokens 60
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
make_venv .venv-demo -e ".[report]" gguf  # which reads the quantized layers of the package
exec .venv-demo/bin/python scripts/demo.py "$@"
