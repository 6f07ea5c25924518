"""The models of mlx-lm and mlx-vlm: their load with errors of one sentence, how they run, and their
text, with chat templates within limits of time and memory."""

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from ..common.guarded import Guard, GuardError
from ..index.files import is_companion
from .compat.mlx_lm import load, load_adapters, sharded_load
from .compat.mlx_vlm import too_old
from .fetch import reason

UNKNOWN_CONTEXT = 32768  # of a model whose configuration and tokenizer do not give it
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_GUARD = Guard(Path(__file__).with_name("template_renderer.py"))


class UnsupportedHeadError(ValueError):
    """A model's output projection cannot be served by FlashHead; mlx-lm can use the model."""


def load_dense(folder: Path, *, adapter_path: str | None = None, **kwargs: Any):
    """``mlx_lm.load`` of a local folder: the dense model, its tokenizer and its configuration;
    ValueError, in one sentence, if mlx-lm cannot load it."""
    if is_companion(folder):
        raise ValueError(
            f"{folder} is a FlashHead without its model: give it as `flash_head` of its model."
        )
    try:
        loaded: Any = load(str(folder), return_config=True, **kwargs)
    except (SystemExit, Exception) as error:  # code of models, and of damaged settings, raises any
        why, remedy = reason(error), "check or fetch it again"
        if isinstance(error, SystemExit):
            if error.code != 1:  # the user ended the program
                raise
            why = "a package is missing, as printed above"  # of some architectures
        elif "trust_remote_code" in str(error):
            remedy = "if you trust its code, add `trust_remote_code=True`"
        raise ValueError(f"mlx-lm cannot load the model in {folder} ({why}): {remedy}.") from error
    model, tokenizer, config = loaded
    if adapter_path is not None:
        try:
            model = load_adapters(model, adapter_path)
        except Exception as error:  # any, as above
            raise ValueError(
                f"The adapters in {adapter_path} cannot be put on this model ({reason(error)}): "
                "check `adapter_path`."
            ) from error
        model.eval()
    return model, tokenizer, config


def load_dense_part(
    path_or_hf_repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
):
    """This process's part of the dense model, its tokenizer and configuration, or ValueError. Every
    process has the whole head, so each finds the same token by itself."""
    source = os.path.expanduser(path_or_hf_repo)  # a repository's name stays
    trust = {"trust_remote_code": trust_remote_code}
    # mlx-lm's default allows a tokenizer's own code
    options: Any = trust | {"tokenizer_config": tokenizer_config or trust, "return_config": True}
    try:
        model, tokenizer, config = sharded_load(source, pipeline_group, tensor_group, **options)
    except Exception as error:  # each model has its own shard() with its own errors
        no = "" if pipeline_group is None else "no "
        raise ValueError(
            f"mlx-lm cannot split the model {path_or_hf_repo} between these processes "
            f"({reason(error)}): use {no}`pipeline_group`, another number of processes, or one."
        ) from error
    if pipeline_group is None and hasattr(model, "shard"):
        _check_attention_heads(config, (tensor_group or mx.distributed.init()).size())
    return model, tokenizer, config


def _check_attention_heads(config: dict, processes: int) -> None:
    """Raises if the attention heads cannot be shared out. mlx-lm rounds down and makes garbage."""
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or not isinstance(groups, int):
        return
    # some models repeat their key-value heads if there are fewer of them than processes
    if heads % processes or (groups % processes and processes % groups):
        raise ValueError(
            f"The model's {heads} attention heads ({groups} of keys and values) cannot be shared "
            f"out to {processes} processes: use a number that divides both, or `pipeline_group`."
        )


def is_vlm(model: nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "mlx_vlm" for cls in type(model).__mro__)


def architecture(model: nn.Module) -> str:
    return type(model).__module__.rsplit(".", 1)[-1]


def forward(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """The logits (B, L, V) of token ids (B, L), after a cache of mlx-lm. Nothing else changes."""
    whole: Any = model
    if is_vlm(model):
        held = [(part, dict(dict.items(part)), dict(vars(part))) for part in model.modules()]
        try:
            output = whole.language_model(tokens, **embeddings(model, tokens))
        finally:  # its modules hold what they held, such as a text's positions
            for part, arrays, attributes in held:
                dict.clear(part)
                dict.update(part, arrays)
                vars(part).clear()
                vars(part).update(attributes)
    else:
        output = whole(tokens) if cache is None else whole(tokens, cache=cache)
    logits = getattr(output, "logits", output)
    return logits[0] if isinstance(logits, tuple) else logits


def embeddings(model: nn.Module, tokens: mx.array) -> dict[str, Any]:
    """What mlx-vlm gives a language model besides token ids (B, L): embeddings and positions."""
    whole: Any = model
    inputs = vars(whole.get_input_embeddings(tokens, None))
    return {name: value for name, value in inputs.items() if value is not None}


def check_writes_text(model: nn.Module, *, runs: bool = True) -> None:
    """Raises UnsupportedHeadError for a model that does not write one token after the other. One
    that does not run may have lost its head to mlx-vlm, for embeddings."""
    if not is_vlm(model):
        return
    text, old = getattr(model, "language_model", None), too_old()
    without_head = not runs and getattr(text, "lm_head", model) is None
    if text is None or without_head or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model of mlx-vlm writes no text, so it has no output "
            "projection for a FlashHead: use it without FlashHead."
        )
    if old is not None:
        raise UnsupportedHeadError(
            f"A FlashHead takes mlx-vlm 0.7.8 or newer, and {old} is installed: update mlx-vlm."
        )
    from mlx_vlm.generate.diffusion import is_diffusion_model

    if is_diffusion_model(model):
        raise UnsupportedHeadError(
            f"This {architecture(model)!r} model writes all tokens of a block at once, by "
            "diffusion, which FlashHead does not make faster: use it without FlashHead."
        )


def text_side(model: nn.Module, processor: Any) -> Any:
    """The tokenizer of a model: mlx-lm's as it is, the text side of mlx-vlm's processor."""
    return ProcessorText(model, processor) if is_vlm(model) else processor


def context_of(config: dict[str, Any], tokenizer: Any) -> int:
    """The number of tokens in a model's context, from its configuration or its tokenizer."""
    for part in (config, config.get("text_config") or {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 1:
                return part[key]
    length = tokenizer.model_max_length  # transformers writes 1e30 for unknown
    return length if 1 < length <= 2**24 else UNKNOWN_CONTEXT


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    """A request as a chat, or as a text where the model has no turns."""
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


class ProcessorText:
    """A processor's tokenizer, with the model's own chat template. ValueError if it has none."""

    def __init__(self, model: nn.Module, processor: Any):
        from mlx_vlm.utils import resolve_eos_token_ids

        self._config: Any = model.config
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        if not hasattr(self._tokenizer, "encode"):
            name = type(processor).__name__
            raise ValueError(f"{name} has no tokenizer: give the processor of mlx_vlm.load.")
        known = getattr(self._tokenizer, "stopping_criteria", None)
        ends = getattr(known, "eos_token_ids", None) or getattr(self._config, "eos_token_id", None)
        self.eos_token_ids = resolve_eos_token_ids(ends, self._tokenizer)
        templates = (getattr(side, "chat_template", None) for side in (processor, self._tokenizer))
        self.has_chat_template = False
        if any(templates):
            with suppress(Exception):  # an architecture without one, or whatever a template raises
                hello = [{"role": "user", "content": "Hello"}]
                text = self.apply_chat_template(hello, tokenize=False)
                self.has_chat_template = isinstance(text, str)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
    ) -> Any:
        """Token ids of a conversation, or its text, as mlx-vlm gives them to the model."""
        from mlx_vlm.prompt_utils import apply_chat_template
        from mlx_vlm.utils import should_add_special_tokens

        text = apply_chat_template(self._processor, self._config, messages, add_generation_prompt)
        if not tokenize:
            return text
        special = should_add_special_tokens(self._config.model_type, self._processor)
        return self._tokenizer.encode(text, add_special_tokens=special)


def apply_template(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    continue_final_message: bool = False,
    remedy: str = "change the messages",
    **options: Any,
) -> str:
    """The text that the chat template of mlx-lm's or transformers' tokenizer makes of messages.

    ``options`` are transformers', such as ``tools``, and variables of the template. ValueError,
    which advises the ``remedy``, if the template fails, or takes more than 5 seconds or 512 MB.
    """
    apply = partial(type(tokenizer).apply_chat_template, tokenizer, messages, tokenize=False)
    template = _jinja_template(tokenizer, options.get("tools"))
    text = ""
    try:
        if template is not None:
            # transformers prepares messages, tools and variables, and writes what is read of them
            written = "".join(
                f'{{% if {name} is defined %}}"{name}":{{{{ {name}|tojson }}}},{{% endif %}}'
                for name in _GUARD.call([template])
            )
            variables = apply(chat_template=written or " ", **options)
            text = _GUARD.call([template, f'{{{variables}"":0}}'])
        if template is None or continue_final_message:  # with what it makes bounded above
            options |= {"continue_final_message": True} if continue_final_message else {}
            text = apply(**options)
    except Exception as error:  # templates raise any type
        said = str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
        said = f"it {said}" if isinstance(error, GuardError) else said
        refusal = "The model's chat template cannot be filled in"
        raise ValueError(f"{refusal} ({said}): {remedy}.") from error
    return text


def template_variables(tokenizer: Any) -> frozenset[str]:
    """Names of the variables that a tokenizer's chat template reads, as far as it is Jinja's."""
    template = _jinja_template(tokenizer, None)
    try:
        return frozenset() if template is None else frozenset(_GUARD.call([template]))
    except (GuardError, RuntimeError):  # said when it is filled in
        return frozenset()


def _jinja_template(tokenizer: Any, tools: Any) -> str | None:
    """The template; None where code of mlx-lm or of the model is in its place."""
    inner = tokenizer
    if isinstance(tokenizer, TokenizerWrapper):
        if tokenizer._chat_template is not None:
            return None
        inner = tokenizer._tokenizer
    apply = getattr(type(inner), "apply_chat_template", None)
    if apply is not PreTrainedTokenizerBase.apply_chat_template or not inner.chat_template:
        return None
    return inner.get_chat_template(tools=tools)
