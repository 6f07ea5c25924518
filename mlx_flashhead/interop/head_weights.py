"""Hooks in mlx-vlm, put in place at the first of its models with a FlashHead.

There is no other way: its loops, and its drafters in them, read a head's weights.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from .replace import put_in_place


# The hooks are put in place once per process.
@cache
def keep_from_weights(head_type: type) -> None:
    """Keeps mlx-vlm from reading a ``head_type``'s weights, which a FlashHead would gather anew."""

    def instead(name: str, function: Callable[..., Any]) -> None:
        """For such a layer, or a model that embeds by one, ``function`` is called."""

        def wrap(original: Any) -> Any:
            @wraps(original)
            def call(first: Any, *arguments: Any, **options: Any) -> Any:
                embedding = getattr(getattr(first, "model", None), "embed_tokens", None)
                if isinstance(first, head_type) or isinstance(embedding, head_type):
                    return function(first, *arguments, **options)
                return original(first, *arguments, **options)

            return call

        put_in_place(f"mlx_vlm.{name}", wrap)

    # fused_greedy_decode, decode_quantized_argmax and speculative_argmax_from_hidden ask these.
    verifier = "models.quantized_verifier"
    instead(f"{verifier}.supports_quantization", lambda layer: False)
    instead(f"{verifier}.supports_optimized_affine_head", lambda layer: False)
    instead(f"{verifier}.optimized_nvfp4_argmax", lambda layer, *_, **__: None)
    linear = "speculative.ops.linear._target_verify"
    instead(f"{linear}_linear", lambda layer, x: layer(x))
    instead(f"{linear}_embedding_as_linear", lambda layer, x: layer.as_linear(x))
    # It would read the rows of the draft's tokens alone, which a FlashHead has in other clusters.
    instead("speculative.eagle3._eagle3_hot_token_ids", lambda *_, **__: None)
