"""The models that are served: loaded at the start, known to clients by their names."""

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..decoding.batch import check_batched_lookup
from ..decoding.guessing.guesses import check_lookup
from ..decoding.policy import decoding_mode
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..head.flash_head import FlashHead
from ..loading.background import Build, build_beside
from ..loading.drafts import DraftOptions
from ..loading.head_options import LATER, HeadOptions
from ..loading.load import load_with_head
from ..models.compat.mlx_lm import KVCache, make_prompt_cache, maybe_quantize_kv_cache
from ..models.errors import UnsupportedHeadError
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..models.loading import context_of, load_dense
from ..models.templates import template_variables
from ..models.trained_drafter import TrainedDrafter
from .control_tokens import control_tokens
from .fill_in_the_middle import END_TOKENS, middle_format

# Variables that the server gives a template.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """A model in memory, with a FlashHead or dense."""

    names: tuple[str, ...]  # for clients; answers carry the first
    model: nn.Module
    tokenizer: Any  # mlx-lm's wrapper
    draft_model: nn.Module | None
    context: int  # tokens of a prompt and its answer together
    template_arguments: dict[str, Any] = field(default_factory=dict)  # from the server's flags
    settings: DecodingSettings = field(default_factory=DecodingSettings)  # of requests
    build: Build | None = None  # of its FlashHead, if it has none yet
    drafter: TrainedDrafter | None = None  # guesses the tokens of an answer that is decoded alone

    def __post_init__(self):
        self.name = self.names[0]
        drafts = [] if self.draft_model is None else make_prompt_cache(self.draft_model)
        caches = make_prompt_cache(self.model) + drafts
        self.cuttable = all(type(cache) is KVCache for cache in caches)  # to any length
        self.batchable = self.draft_model is None and all(hasattr(c, "merge") for c in caches)
        self.vocab_size: int = self.model(mx.array([[0]])).shape[-1]  # computes nothing
        # variables of the chat template that the server does not give, as far as it is Jinja's
        variables = template_variables(self.tokenizer) - _GIVEN
        self.template_settings = variables - set(self.tokenizer.special_tokens_map)
        if self.tokenizer.has_thinking:
            self.template_settings |= {"enable_thinking"}  # mlx-lm's name for it
        self.takes_developer = "developer" in str(self.tokenizer.chat_template)  # as a role
        self.control_tokens = control_tokens(self.tokenizer)
        vocabulary = self.tokenizer.get_vocab()
        self.middle = middle_format(vocabulary)  # in which it fills gaps, if it does
        self.middle_ends = [token for token in END_TOKENS if token in vocabulary]

    def decoding(self, *, dense: bool | None = None, n_probes: int | None = None) -> str:
        """How a request with these fields is decoded: "verified", "unverified" or "dense: …why"."""
        verify = self.settings.verify
        dense = self.settings.dense and n_probes is None if dense is None else dense
        if self.draft_model is not None and not dense:  # a pass verifies several of its tokens
            return "dense: the draft model proposes tokens"
        if self.settings.max_wait == 0 and not dense:
            return "dense: --max-wait is 0"
        if n_probes is not None and self.head:
            return "verified" if verify else "unverified"  # even where it is no faster
        if self.build is not None and self.head is None and not dense:
            return "dense: FlashHead is being built"
        return decoding_mode(self.model, verify=verify, dense=dense)

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
    own = dict.fromkeys(filter(None, (args.served_model_name, _public_name(args.model))))
    return [tuple(own), *((_public_name(model),) for model in args.allow_models)]


def _public_name(path_or_repo: str) -> str:
    path = Path(path_or_repo).expanduser()
    return path.resolve().name if path.is_dir() else path_or_repo


def load_models(args: Namespace) -> list[ServedModel]:
    """Loads every model that the flags name, the default first.

    Raises:
        ValueError: If two have the same name, or one cannot be served with these flags.
    """
    names = served_names(args)
    all_names = [name for some in names for name in some]
    if len({*all_names}) < len(all_names):
        listed = ", ".join(all_names)
        raise ValueError(f"Two of the models have the same name ({listed}): rename a folder.")
    paths = zip([args.model, *args.allow_models], names, strict=True)
    models = [_load(args, path, its_names) for path, its_names in paths]
    for served in models:
        proposer = Proposer(served.model, served.settings)
        if served.batchable and args.kv_bits is None:
            check_batched_lookup(proposer)
        elif served.draft_model is None:
            check_lookup(proposer, make_prompt_cache(served.model))
    return models


def _load(args: Namespace, path_or_repo: str, names: tuple[str, ...]) -> ServedModel:
    default = path_or_repo == args.model
    folder = resolve(path_or_repo)
    trusted: bool = args.trust_remote_code
    tokenizer_config: dict[str, Any] = {"trust_remote_code": trusted}
    adapter_path: str | None = args.adapter_path if default else None
    choices = HeadOptions.from_flags(args, dense=args.dense)
    drafting = DraftOptions()
    if default:
        if args.chat_template:
            tokenizer_config["chat_template"] = args.chat_template
        drafting = DraftOptions(args.draft_model, args.mtp, args.draft_probes)
        drafting.check(path_or_repo)
    else:  # a source is one model's
        fine_head = choices.fine_head if choices.fine_head is True else None
        choices = replace(choices, flash_head=None, n_probes=None, fine_head=fine_head)
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
    drafts = drafting.load(model, folder, choices, trust_remote_code=trusted)
    drafter = drafts if isinstance(drafts, TrainedDrafter) else None
    draft_model = drafts if drafter is None else None
    context = args.context_size or context_of(settings, tokenizer)
    if args.kv_bits is not None and args.quantized_kv_start < context:
        for each in filter(None, (model, draft_model)):
            check_quantized_cache(each, args.kv_bits, args.kv_group_size)
    later = choices.missing == LATER
    build = build_beside(model, tokenizer, folder, choices) if later else None
    return ServedModel(
        names,
        model,
        tokenizer,
        draft_model,
        context,
        template_arguments=args.chat_template_args,
        settings=DecodingSettings(
            verify=not args.no_verify,
            dense=args.dense and default,
            max_wait=args.max_wait,
            lookup=args.lookup,
        ),
        build=build,
        drafter=drafter,
    )


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
    except Exception as error:  # each cache and each model raises its own
        reason, *_ = str(error).strip().split("\n")
        raise ValueError(
            f"This model's caches cannot have `kv_bits` {bits} in groups of {group_size} "
            f"({reason or type(error).__name__}): choose another `kv_group_size`, or leave "
            "`kv_bits` out."
        ) from error
