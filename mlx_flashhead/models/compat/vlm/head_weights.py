"""The places in which mlx-vlm reads a head's weights itself. A FlashHead would gather all rows anew
for each of them: they ask the layer, or are switched off."""

from collections.abc import Callable
from functools import cache, partial, wraps
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from ..imports import put_in_place, when_imported

VERIFIER = "mlx_vlm.models.quantized_verifier"
LINEAR = "mlx_vlm.speculative.ops.linear"
EAGLE3 = "mlx_vlm.speculative.eagle3"
GLM = "mlx_vlm.models.glm_moe_dsa.speculative_verifier"
LFM2 = "mlx_vlm.models.lfm2.speculative_verifier"

# Functions that read single logits for a decision, where an estimate would count as much as a
# logit: those of the server's reranker and of d1's answers.
DECISIONS = ("_binary_scores", "_logz")

Applies = Callable[[Any], bool]


@cache  # once per process
def keep_from_weights(applies: Applies) -> None:
    """Keeps mlx-vlm from the weights of the layers that ``applies`` says yes to."""
    instead = partial(_instead, applies)
    # fused_greedy_decode, decode_quantized_argmax and speculative_argmax_from_hidden ask these
    instead(VERIFIER, "supports_quantization", lambda layer: False)
    instead(VERIFIER, "supports_optimized_affine_head", lambda layer: False)
    instead(VERIFIER, "optimized_nvfp4_argmax", lambda layer, *_, **__: None)
    instead(LINEAR, "_target_verify_linear", lambda layer, x: layer(x))
    instead(LINEAR, "_target_verify_embedding_as_linear", lambda layer, x: layer.as_linear(x))
    instead(
        GLM,
        "verify_logits",
        lambda lm, x: lm.lm_head(x),
        lambda lm: lm.lm_head,
    )
    # rows of the draft's tokens only, which lie apart under a FlashHead
    instead(EAGLE3, "_eagle3_hot_token_ids", lambda *_, **__: None, _embedding)
    when_imported(LFM2, partial(_keep_from_lfm2, applies))


def _instead(
    applies: Applies,
    module_name: str,
    name: str,
    instead: Callable[..., Any],
    layer_of: Callable[[Any], Any] = lambda layer: layer,
) -> None:
    """Where the first argument is such a layer, or holds one, ``instead`` is called."""

    def put(module: Any) -> None:
        original = getattr(module, name)

        @wraps(original)
        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            function = instead if applies(layer_of(first)) else original
            return function(first, *arguments, **options)

        put_in_place("mlx_vlm", module, name, call)

    when_imported(module_name, put)


def _keep_from_lfm2(applies: Applies, module: Any) -> None:
    """Its verifier reads a tied embedding's weight inside a longer function."""
    verifier = module.Lfm2ExactSpeculativeVerifier
    call, linear = verifier.__call__, verifier._linear

    def verify(self: Any, language_model: Any, *arguments: Any, **options: Any) -> Any:
        layer = _embedding(language_model)
        if applies(layer):  # as if the head were a layer of its own
            untied = SimpleNamespace(tie_word_embeddings=False)
            language_model = SimpleNamespace(model=language_model.model, args=untied, lm_head=layer)
        return call(self, language_model, *arguments, **options)

    def asked(layer: Any, x: mx.array) -> mx.array:
        if not applies(layer):
            return linear(layer, x)
        return layer.as_linear(x) if hasattr(layer, "as_linear") else layer(x)

    verifier.__call__, verifier._linear = verify, staticmethod(asked)


def _embedding(language_model: Any) -> Any:
    return getattr(getattr(language_model, "model", None), "embed_tokens", None)
