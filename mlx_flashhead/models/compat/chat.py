"""``mlx_lm.chat``: its flags."""

from mlx_lm.chat import setup_arg_parser as chat_parser

__all__ = ["chat_parser"]
