"""The tokenizer within mlx-lm's ``TokenizerWrapper``.

Read in mlx-lm 0.31.3 and 0.32.2 (``mlx_lm.tokenizer_utils``). Of the names that are not public:

- ``_tokenizer`` is Hugging Face's tokenizer.
- ``_chat_template`` is a function that is called in the place of its template, or None.
"""

from typing import Any

from .mlx_lm import TokenizerWrapper


def inner_tokenizer(tokenizer: Any) -> Any:
    """Hugging Face's tokenizer in mlx-lm's; any other is its own."""
    if isinstance(tokenizer, TokenizerWrapper):
        return tokenizer._tokenizer
    return tokenizer


def has_function_for_template(tokenizer: Any) -> bool:
    """Whether a function of mlx-lm's, or of the model's, makes prompts in a template's place."""
    return isinstance(tokenizer, TokenizerWrapper) and tokenizer._chat_template is not None
