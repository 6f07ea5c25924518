"""``mlx_lm.chat``: its flags."""

import importlib.util

from mlx_lm.chat import setup_arg_parser as chat_parser

if importlib.util.find_spec("mlx_lm.cli_ui") is None:  # 0.31
    from .mlx_lm_0_31 import with_values

    chat_parser = with_values(chat_parser, prefill_step_size=2048)

__all__ = ["chat_parser"]
