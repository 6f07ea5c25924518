"""The models that are served: loaded at the start, known to clients by their names."""

import logging
import re
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
import mlx.nn as nn
from jinja2 import meta

from ..head.flash_head import FlashHead
from ..loading.background import BackgroundBuild, background_build
from ..loading.load import load_draft, load_with_head
from ..loading.look_up import LATER, head_options
from ..models.compat.cache import KVCache, make_prompt_cache
from ..models.compat.chat_templates import LimitedEnvironment
from ..models.context import context_of
from ..models.dense import load_dense
from ..models.errors import UnsupportedHeadError
from ..models.fetch import resolve
from ..models.install import get_flash_head
from ..publishing.origin import local_origin

# Variables that the server or the tokenizer gives a template.
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})
_GENERATION_TAG = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """A model in memory.

    Attributes:
        names: Its names for clients. Answers carry the first.
        model: The model, with a FlashHead or dense.
        tokenizer: mlx-lm's wrapper.
        draft_model: Drafts tokens for it, if there is one.
        context: Tokens of a prompt and its answer together.
        template_arguments: Settings of its chat template from the server's flags.
        dense: Whether every token is scored unless a request says otherwise.
        head: Its FlashHead, None if it is dense.
        vocab_size: Tokens V.
        batchable: Whether several sequences can be decoded at once.
        cuttable: Whether its caches can always be cut back to their beginning.
        template_settings: Names that its chat template takes from ``chat_template_kwargs``.
        longest_token: Characters of the longest token.
        check: Whether the dense rows check every token.
        build: The build of its FlashHead, if it has none yet.
    """

    names: tuple[str, ...]
    model: nn.Module
    tokenizer: Any
    draft_model: nn.Module | None
    context: int
    template_arguments: dict[str, Any] = field(default_factory=dict)
    dense: bool = False
    check: bool = True
    build: BackgroundBuild | None = None

    def __post_init__(self):
        self.head: FlashHead | None = get_flash_head(self.model)
        caches = make_prompt_cache(self.model)
        self.cuttable = all(type(cache) is KVCache for cache in caches)
        self.batchable = self.draft_model is None and all(hasattr(c, "merge") for c in caches)
        # reads a shape, so nothing is computed
        self.vocab_size: int = self.model(mx.array([[0]])).shape[-1]
        self.template_settings = template_settings(self.tokenizer)
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))

    @property
    def head_in_use(self) -> str:
        """The head that answers: "FlashHead", or "dense" and why."""
        if self.head is not None and not self.dense:
            return "dense: FlashHead is no faster here" if self.head.stays_dense else "FlashHead"
        return "dense: FlashHead is being built" if self.build is not None else "dense"

    @property
    def name(self) -> str:
        """The name that answers carry."""
        return self.names[0]


def load_models(args: Namespace) -> list[ServedModel]:
    """Loads every model that the flags name, the default first.

    Raises:
        ValueError: If a model cannot be loaded, or two have the same name.
    """
    aliases = [args.served_model_name] if args.served_model_name else []
    models = [_load(args, args.model, aliases, default=True)]
    models += [_load(args, path, [], default=False) for path in args.allow_models]
    names = Counter(name for served in models for name in served.names)
    twice = {name for name, number in names.items() if number > 1}
    if twice:
        raise ValueError(
            f"Two of the models have the name {min(twice)}: rename a folder, or leave one out."
        )
    return models


def template_settings(tokenizer: Any) -> frozenset[str]:
    """Names of a chat template's variables that the server does not give.

    A template that is Python code takes mlx-lm's ``enable_thinking`` alone.
    """
    own = set()
    if tokenizer.has_thinking:
        own.add("enable_thinking")  # mlx-lm's name for the template's own
    template = tokenizer.chat_template
    if isinstance(template, str):
        # a plain environment would compute constants
        environment = LimitedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        try:
            tree = environment.parse(_GENERATION_TAG.sub("", template))
        except jinja2.TemplateError:
            return frozenset(own)
        own |= meta.find_undeclared_variables(tree)
    given = _GIVEN | {"strftime_now", "raise_exception"} | set(tokenizer.special_tokens_map)
    return frozenset(own - given)


def _load(args: Namespace, path_or_repo: str, aliases: list[str], *, default: bool) -> ServedModel:
    folder = resolve(path_or_repo)
    config = {"trust_remote_code": args.trust_remote_code}
    if args.chat_template and default:
        config["chat_template"] = args.chat_template
    options = {
        "tokenizer_config": config,
        "adapter_path": args.adapter_path if default else None,
        "trust_remote_code": args.trust_remote_code,
    }
    choices = head_options(args, dense=args.dense)
    if not default:
        choices = replace(choices, flash_head=None, n_probes=None)
    try:
        model, tokenizer, config = load_with_head(folder, choices, **options)
    except UnsupportedHeadError as error:
        logger.warning("%s is served dense: %s", path_or_repo, error)
        model, tokenizer, config = load_dense(folder, **options)
    if (head := get_flash_head(model)) is not None:
        logger.info("%s is served with %r: %s", path_or_repo, head, head.backend_reason)
    path = Path(path_or_repo).expanduser()
    # no client learns where a folder is
    own_name = path.resolve().name if path.is_dir() else path_or_repo
    later = choices.missing == LATER
    return ServedModel(
        names=tuple(dict.fromkeys((*aliases, own_name))),
        model=model,
        tokenizer=tokenizer,
        draft_model=_draft(args, tokenizer) if default and args.draft_model else None,
        context=args.context_size or context_of(config, tokenizer),
        template_arguments=args.chat_template_args,
        dense=args.dense and default,
        check=not args.no_check,
        build=background_build(model, tokenizer, local_origin(folder), choices) if later else None,
    )


def _draft(args: Namespace, tokenizer: Any) -> nn.Module:
    model, draft_tokenizer = load_draft(
        args.draft_model, draft_probes=args.draft_probes, trust_remote_code=args.trust_remote_code
    )
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        logger.warning("%s has another tokenizer: few drafts will be accepted.", args.draft_model)
    if (head := get_flash_head(model)) is not None:
        logger.info("%s drafts with %r", args.draft_model, head)
    return model
