"""Writes tiny random models for `mixed_load.py`: plain, with a window, with states.

    python scripts/figures/mixed_models.py FOLDER     # makes FOLDER/plain, /window and /states

All have a template with tools. Windows and states are of a few tokens, so that answers pass them,
and a rejected token has to be taken back by a snapshot.
"""

import argparse
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]

from model_folders import write_model

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools] {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{% for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 4096
WINDOW = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
}
STATES = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
    "rope_theta": 10000.0,
}


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    common = {"max_position_embeddings": CONTEXT}
    models = {"plain": ("llama", {}), "window": ("gemma3_text", WINDOW), "states": ("lfm2", STATES)}
    for name, (arch, further) in models.items():
        path = folder / name
        # --kv-bits needs heads of 64: two of them.
        hidden_size = 64
        if name == "plain":
            hidden_size = 128
        write_model(
            path,
            arch=arch,
            hidden_size=hidden_size,
            chat_template=TEMPLATE,
            card=None,
            further=common | further,
        )
        print(path)


if __name__ == "__main__":
    main()
