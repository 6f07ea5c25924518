"""What mlx-vlm knows of a model's text: its templates, its end, and whether it writes any."""

from typing import Any

from mlx_vlm.generate.diffusion import is_diffusion_model
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import resolve_eos_token_ids, should_add_special_tokens


def chat_text(
    processor: Any, config: Any, messages: list[dict[str, str]], add_generation_prompt: bool
) -> str | None:
    """A conversation without pictures in the model's own form; None if it has no such form."""
    try:
        text = apply_chat_template(processor, config, messages, add_generation_prompt)
    except Exception:  # of an architecture without such a form, or whatever a template raises
        return None
    return text if isinstance(text, str) else None
