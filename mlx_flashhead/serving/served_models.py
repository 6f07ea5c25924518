"""The models that are served: loaded at the start, known to clients by their names."""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..decoding.batch import check_batched_lookup
from ..decoding.guessing.guesses import check_lookup, has_wide_steps
from ..decoding.phase import MAY_DIFFER, Mode
from ..decoding.policy import decoding_mode
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..head.flash_head import FlashHead
from ..loading.builds import Build, build_beside
from ..loading.drafts import DraftOptions
from ..loading.head_options import LATER, HeadOptions
from ..loading.load import load_with_head
from ..loading.use import BUILDING
from ..models.compat.mlx_lm import KVCache, make_prompt_cache, maybe_quantize_kv_cache
from ..models.errors import UnsupportedHeadError
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..models.loading import context_of, load_dense
from ..models.templates import template_variables
from ..models.trained_drafter import TrainedDrafter
from .api_errors import ApiError
from .control_tokens import control_tokens
from .fill_in_the_middle import END_TOKENS, middle_format

# Variables that the server gives a template.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}

NO_WAIT = Mode.dense("--max-wait is 0")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """A model in memory, with a FlashHead or dense.

    Attributes:
        names: Those that clients know; answers carry the first.
        model: The model.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        draft_model: A model that proposes tokens, if there is one.
        context: The number of tokens of a prompt and its answer together.
        template_arguments: Variables of its chat template, from the server's flags.
        settings: How requests are decoded that say nothing else.
        build: The build of its FlashHead, if it has none yet.
        drafter: What guesses the tokens of an answer that is decoded alone.
        text_may_differ: Whether mlx-lm's own loop takes the draft model's tokens.
        cuttable: Whether its caches can be cut to any length.
        batchable: Whether its answers can be decoded together.
        template_settings: Variables of its chat template that the server does not give.
        takes_developer: Whether its chat template knows the role "developer".
        middle: The format in which it fills gaps, if it does.
        middle_ends: Texts that end the filled gap.
    """

    names: tuple[str, ...]
    model: nn.Module
    tokenizer: Any
    draft_model: nn.Module | None
    context: int
    template_arguments: dict[str, Any] = field(default_factory=dict)
    settings: DecodingSettings = field(default_factory=DecodingSettings)
    build: Build | None = None
    drafter: TrainedDrafter | None = None
    text_may_differ: bool = False

    def __post_init__(self):
        self.name = self.names[0]
        caches = make_prompt_cache(self.model)
        if self.draft_model is not None:
            caches += make_prompt_cache(self.draft_model)
        self.cuttable = all(type(cache) is KVCache for cache in caches)
        self.batchable = self.draft_model is None and all(hasattr(c, "merge") for c in caches)
        # The logits' shape is known before they are computed.
        self.vocab_size: int = self.model(mx.array([[0]])).shape[-1]
        variables = template_variables(self.tokenizer) - _GIVEN
        self.template_settings = variables - set(self.tokenizer.special_tokens_map)
        if self.tokenizer.has_thinking:
            # mlx-lm's name for it.
            self.template_settings |= {"enable_thinking"}
        self.takes_developer = "developer" in str(self.tokenizer.chat_template)
        self.control_tokens = control_tokens(self.tokenizer)
        vocabulary = self.tokenizer.get_vocab()
        self.middle = middle_format(vocabulary)
        self.middle_ends = [token for token in END_TOKENS if token in vocabulary]

    def decoding(self, *, dense: bool | None = None, n_probes: int | None = None) -> str:
        """How a request with these fields is decoded, in words."""
        return self._mode_for(dense, n_probes).words

    def _mode_for(self, dense: bool | None, n_probes: int | None) -> Mode:
        settings = self.settings
        if dense is None:
            dense = settings.dense and n_probes is None
        if not dense:
            if self.text_may_differ:
                return MAY_DIFFER
            if settings.max_wait == 0:
                return NO_WAIT
            if self.build is not None and self.head is None:
                return BUILDING
        return decoding_mode(self.model, verify=settings.verify, dense=dense, n_probes=n_probes)

    def gate_build(self, gate: Callable[[], bool]) -> None:
        """From now on the build of its FlashHead goes on while ``gate`` says so."""
        if self.build is not None:
            self.build.gate = gate

    def leave_build(self) -> None:
        """Ends the build of its FlashHead, which the next server goes on with."""
        if self.build is not None:
            self.build.leave()

    @property
    def head(self) -> FlashHead | None:
        """The model's FlashHead; None if it has none."""
        return get_flash_head(self.model)


def served_names(args: Namespace) -> list[tuple[str, ...]]:
    """The names of every model that the flags name, the default's first. Clients learn no paths."""
    own_name = _public_name(args.model)
    names: list[tuple[str, ...]] = [(own_name,)]
    if args.served_model_name not in (None, "", own_name):
        names = [(args.served_model_name, own_name)]
    for model in args.allow_models:
        names.append((_public_name(model),))
    return names


def _public_name(path_or_repo: str) -> str:
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path_or_repo


def find_model(models: Sequence[ServedModel], name: Any, *, or_first: bool = False) -> ServedModel:
    """Returns the served model of that name; the first without a name.

    Args:
        models: The models, the default first.
        name: What a client sent.
        or_first: Whether the first one has any other name too.

    Raises:
        ApiError: If no served model has the name.
    """
    # mlx-lm's word for the model of --model is "default_model".
    if name in (None, "default_model"):
        return models[0]
    by_name = {known: served for served in models for known in served.names}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    if or_first:
        return models[0]
    raise unknown_model(list(by_name))


def unknown_model(names: Sequence[str]) -> ApiError:
    """The error of a model that is not among the served ones."""
    return ApiError(
        f"No model of that name is served here: choose {' or '.join(names)}.",
        "model",
        status=404,
        code="model_not_found",
    )


def load_models(args: Namespace) -> list[ServedModel]:
    """Loads every model that the flags name, the default first.

    Raises:
        ValueError: If two have the same name, or one cannot be served with these flags.
    """
    names = served_names(args)
    all_names = [name for some in names for name in some]
    if len(set(all_names)) < len(all_names):
        listed = ", ".join(all_names)
        raise ValueError(f"Two of the models have the same name ({listed}): rename a folder.")
    models = []
    for path_or_repo, its_names in zip([args.model, *args.allow_models], names, strict=True):
        served = _load(args, path_or_repo, its_names)
        _check_caches(served, args)
        models.append(served)
    return models


def _check_caches(served: ServedModel, args: Namespace) -> None:
    """Checks that a model's caches can be quantized, and take guessed tokens, as the flags say.

    Raises:
        ValueError: If they cannot.
    """
    if args.kv_bits is not None and args.quantized_kv_start < served.context:
        check_quantized_cache(served.model, args.kv_bits, args.kv_group_size)
        if served.draft_model is not None:
            check_quantized_cache(served.draft_model, args.kv_bits, args.kv_group_size)
    proposer = Proposer(served.model, served.settings)
    if served.batchable and args.kv_bits is None:
        check_batched_lookup(proposer)
    elif served.draft_model is None:
        check_lookup(proposer, make_prompt_cache(served.model))


def _load(args: Namespace, path_or_repo: str, names: tuple[str, ...]) -> ServedModel:
    is_default = path_or_repo == args.model
    folder = resolve(path_or_repo)
    trusted: bool = args.trust_remote_code
    tokenizer_config: dict[str, Any] = {"trust_remote_code": trusted}
    adapter_path: str | None = None
    choices = HeadOptions.from_flags(args, dense=args.dense)
    drafting = DraftOptions()
    if is_default:
        adapter_path = args.adapter_path
        if args.chat_template:
            tokenizer_config["chat_template"] = args.chat_template
        drafting = DraftOptions(args.draft_model, args.mtp, args.draft_probes)
        drafting.check(path_or_repo)
    else:
        choices = _of_further_model(choices)
    try:
        model, tokenizer, settings = load_with_head(
            folder,
            choices,
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
            trust_remote_code=trusted,
        )
    except UnsupportedHeadError as error:
        logger.warning("%s is served dense: %s", path_or_repo, error)
        model, tokenizer, settings = load_dense(
            folder,
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
            trust_remote_code=trusted,
        )
    drafter = None
    draft_model = drafting.load(model, folder, choices, trust_remote_code=trusted)
    if isinstance(draft_model, TrainedDrafter):
        drafter = draft_model
        draft_model = None
    text_may_differ = False
    if draft_model is not None:
        # The first answer would try it otherwise.
        text_may_differ = not has_wide_steps(model, make_prompt_cache(model))
    build = None
    if choices.missing == LATER:
        build = build_beside(model, tokenizer, folder, choices)
    return ServedModel(
        names,
        model,
        tokenizer,
        draft_model,
        context=args.context_size or context_of(settings, tokenizer),
        template_arguments=args.chat_template_args,
        settings=DecodingSettings(
            verify=not args.no_verify,
            dense=args.dense and is_default,
            max_wait=args.max_wait,
            lookup=args.lookup,
        ),
        build=build,
        drafter=drafter,
        text_may_differ=text_may_differ,
    )


def _of_further_model(choices: HeadOptions) -> HeadOptions:
    """The options of a model beside the default: a source is one model's alone."""
    fine_head = None
    if choices.fine_head is True:
        fine_head = True
    return replace(choices, flash_head=None, n_probes=None, fine_head=fine_head)


def check_quantized_cache(model: nn.Module, bits: int, group_size: int) -> None:
    """Tries a quantized cache: of a token, and with a second one that reads it.

    Raises:
        ValueError: If this model's caches cannot be quantized so.
    """
    token = mx.array([[0]])
    cache = make_prompt_cache(model)
    try:
        model(token, cache=cache)
        maybe_quantize_kv_cache(cache, 0, group_size, bits)
        mx.eval(model(token, cache=cache), [layer.state for layer in cache])
    except Exception as error:
        # Each cache and each model raises its own.
        reason, *_ = str(error).strip().split("\n")
        raise ValueError(
            f"This model's caches cannot have `kv_bits` {bits} in groups of {group_size} "
            f"({reason or type(error).__name__}): choose another `kv_group_size`, or leave "
            "`kv_bits` out."
        ) from error
