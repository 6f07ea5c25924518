"""``mlx_lm.chat``: its flags."""

from importlib.util import find_spec

if find_spec("mlx_lm.cli_ui") is not None:  # new in 0.32
    from mlx_lm.chat import setup_arg_parser as chat_parser
else:
    from .mlx_lm_0_31 import chat_parser
