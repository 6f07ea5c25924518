"""Generates text: ``mlx_lm.generate`` with a FlashHead, all its flags and some more."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .common import flags
from .common.arguments import Parser
from .common.command import command
from .common.interrupts import ctrl_c_raises
from .common.suggested_model import model_is_needed
from .common.terminal import printable_output
from .structured.grammar import Grammar, add_grammar_options, grammar_of
from .structured.processor import GrammarProcessor

# These import mlx-lm, which takes a second. Mistakes and --help do without.
if TYPE_CHECKING:
    from .loading.head_options import HeadOptions
    from .models.prompt_cache_file import CachedPrompt
    from .models.trained_drafter import TrainedDrafter

EMPTY = "--prompt is empty: give a text, or - for standard input"
# Flags that several processes do not support.
ALONE = (
    "adapter_path", "draft_model", "mtp", "prompt_cache_file", "image", "quantize_activations",
    "fine_head",
)  # fmt: skip


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.generate``."""
    about = "Generate text with a model and its FlashHead."
    parser = Parser(prog="mlx_flashhead.generate", description=about)
    flags.add_model_flags(parser)
    flags.add_prompt_flags(parser)
    flags.add_draft_flags(parser.add_argument)
    flags.add_answer_flags(parser, max_tokens=100, seed=None)
    group = parser.add_argument_group("FlashHead", flags.FLASH_HEAD)
    flags.add_answering_options(group)
    flags.add_draft_probes(group.add_argument)
    group.add_argument(
        "--dense", action="store_true", help="Use the normal (dense) head, for comparison."
    )
    group.add_argument(
        "--draw-probes",
        action="store_true",
        help="Draw the clusters by probability at --temp, as in the paper, without verification.",
    )
    group.add_argument(
        "--pipeline",
        action="store_true",
        help="Under mlx.launch, give each process some layers, instead of a part of every layer.",
    )
    add_grammar_options(parser)
    return parser


@command
def main() -> None:
    """Entry point."""
    parser = make_parser()
    try:
        # Without mlx.launch this is a group of one process.
        processes = mx.distributed.init()
    except RuntimeError as error:
        remedy = "check the hosts and ports of mlx.launch"
        raise ValueError(f"The processes cannot be joined ({error}): {remedy}.") from error
    with open(os.devnull, "w") as nowhere:
        output = sys.stdout
        errors = sys.stderr
        if processes.rank() > 0:
            output = nowhere
            errors = nowhere
        # All processes make the same mistake, and the first one says it.
        with redirect_stderr(errors):
            args = parser.parse_args()
            _check_arguments(parser, args, processes.size())
        grammar = grammar_of(args)
        flags.check_before_loading(args)
        with redirect_stdout(output):
            _generate(args, processes, grammar)


def _check_arguments(parser: Parser, args: Namespace, n_processes: int) -> None:
    several = n_processes > 1
    formed = args.json_schema or args.regex or args.grammar
    drafts = args.draft_model is not None
    cached = args.prompt_cache_file is not None
    mistakes = [
        (not args.model and not cached, model_is_needed()),
        (not args.prompt, EMPTY),
        (
            args.draw_probes and (args.dense or not args.temp > 0),
            "--draw-probes needs --temp above 0, and no --dense",
        ),
        (
            args.draw_probes and formed,
            "--draw-probes disregards the form of the text: leave it out",
        ),
        (
            args.pipeline and not several,
            "--pipeline needs several processes: start them with mlx.launch",
        ),
        (
            several and args.prompt == "-",
            "--prompt - is the input of mlx.launch, which has no end: give the prompt",
        ),
        (
            cached and drafts,
            "--prompt-cache-file holds no cache of a draft model: leave --draft-model out",
        ),
    ]
    for flag in ("n_probes", "flash_head", "no_verify"):
        name = flag.replace("_", "-")
        wrong = args.dense and getattr(args, flag)
        mistakes.append((wrong, f"--dense uses no FlashHead: leave --{name} out"))
    for flag in ALONE:
        name = flag.replace("_", "-")
        wrong = several and getattr(args, flag)
        mistakes.append((wrong, f"--{name} is for one process: start it without mlx.launch"))
    for wrong, sentence in mistakes:
        if wrong:
            parser.error(sentence)
    flags.check_draft_flags(parser, args)
    args.prompt_text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if args.prompt_text == "-":
        args.prompt_text = sys.stdin.read()
    if not args.prompt_text:
        parser.error(EMPTY)


@dataclass
class _Loaded:
    """A model and what belongs to it."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    draft_model: "nn.Module | TrainedDrafter | None" = None


def _generate(args: Namespace, processes: mx.distributed.Group, grammar: Grammar | None) -> None:
    """Loads, answers, and builds a missing FlashHead afterwards."""
    from .loading.head_options import LATER, HeadOptions
    from .loading.trials import trials_said
    from .models.install import get_flash_head

    options = HeadOptions.from_flags(args)
    if args.seed is not None:
        mx.random.seed(args.seed)
    with printable_output(), trials_said(options.say):
        cache = _prompt_cache(args)
        loaded = _load(args, processes, options, cache)
        prompt, embeddings = _prompt(args, loaded, cache)
        _answer(args, loaded, prompt, embeddings, cache, grammar)
    unbuilt = options.missing == LATER and not args.dense and get_flash_head(loaded.model) is None
    if unbuilt and sys.stdout.isatty():
        _build(loaded, options)
    elif unbuilt:
        # A script waits for its end.
        name = args.model or loaded.folder
        options.say(
            f"FlashHead is not built yet: `mlx_flashhead.cache --build {name}` builds it, as does "
            "the next answer at a terminal."
        )
    if processes.size() > 1:
        from .loading.several_processes import wait_for_all

        wait_for_all(processes)


def _prompt_cache(args: Namespace) -> "CachedPrompt | None":
    """The cache of --prompt-cache-file. ValueError if it is none, or differs from the flags."""
    if args.prompt_cache_file is None:
        return None
    from .models.prompt_cache_file import read_prompt_cache

    cache = read_prompt_cache(args.prompt_cache_file)
    cache.check(model=args.model, kv_bits=args.kv_bits, kv_group_size=args.kv_group_size)
    return cache


def _load(
    args: Namespace,
    processes: mx.distributed.Group,
    options: "HeadOptions",
    cache: "CachedPrompt | None",
) -> _Loaded:
    """The model with its FlashHead, its tokenizer, and the draft model."""
    from .loading.drafts import DraftOptions

    name: str = args.model
    tokenizer_config: dict[str, Any] = {}
    if cache is not None:
        name = cache.model
        tokenizer_config |= cache.tokenizer_config
    tokenizer_config["trust_remote_code"] = args.trust_remote_code
    drafting = DraftOptions(args.draft_model, args.mtp, args.draft_probes)
    drafting.check(name)
    if processes.size() > 1:
        loaded = _load_part(args, processes, options, name, tokenizer_config)
    else:
        loaded = _load_whole(args, options, name, tokenizer_config)
    for token in args.extra_eos_token:
        loaded.tokenizer.add_eos_token(token)
    loaded.draft_model = drafting.load(
        loaded.model, loaded.folder, options, trust_remote_code=args.trust_remote_code
    )
    return loaded


def _load_whole(
    args: Namespace, options: "HeadOptions", name: str, tokenizer_config: dict[str, Any]
) -> _Loaded:
    """The model, in one process."""
    from .loading.load import load_dense_head, load_with_head
    from .models.fetch import resolve
    from .models.install import get_flash_head

    folder = resolve(name)
    load = load_with_head
    if args.dense:
        load = load_dense_head
    model, tokenizer, config = load(
        folder,
        options,
        adapter_path=args.adapter_path,
        tokenizer_config=tokenizer_config,
        model_config={"quantize_activations": args.quantize_activations},
        trust_remote_code=args.trust_remote_code,
    )
    if args.n_probes and args.no_build and get_flash_head(model) is None:
        raise ValueError("--n-probes needs a FlashHead: leave --no-build out.")
    return _Loaded(model, tokenizer, config, folder)


def _load_part(
    args: Namespace,
    processes: mx.distributed.Group,
    options: "HeadOptions",
    name: str,
    tokenizer_config: dict[str, Any],
) -> _Loaded:
    """This process's part of the model. All processes draw from the same seed."""
    from .loading.several_processes import load_part, seed_for_all

    model, tokenizer, config = load_part(
        processes,
        name,
        options,
        dense=args.dense,
        by_layers=args.pipeline,
        tokenizer_config=tokenizer_config,
        trust_remote_code=args.trust_remote_code,
    )
    seed_for_all(processes, args.seed)
    return _Loaded(model, tokenizer, config, Path(name))


def _prompt(
    args: Namespace, loaded: _Loaded, cache: "CachedPrompt | None"
) -> tuple[list[int], mx.array | None]:
    """Returns the prompt's token ids, and the embeddings (n, D) of one with images.

    Raises:
        ValueError: For a prompt that is empty or longer than the context.
    """
    from .models.loading import context_of

    tokenizer = loaded.tokenizer
    text = args.prompt_text
    templated = not args.ignore_chat_template and tokenizer.has_chat_template
    if templated:
        text = _filled_in(args, tokenizer, text)
    if templated and cache is not None:
        # The cache holds what is before the question.
        before = _filled_in(args, tokenizer, "<query>")
        text = text[before.index("<query>") :]
    images = None
    if args.image:
        from .models.image_prompts import with_images

        text, images = with_images(loaded.model, loaded.config, text, args.image)
    token_ids = list(tokenizer.encode(text, add_special_tokens=not templated))
    if not token_ids:
        raise ValueError("The prompt is empty: give at least one token with --prompt.")
    context = context_of(loaded.config, tokenizer)
    if len(token_ids) >= context:
        raise ValueError(
            f"The prompt is longer than this model's {context:,}-token context: shorten it."
        )
    if images is None:
        return token_ids, None
    from .models.image_prompts import embedded

    return token_ids, embedded(loaded.model, token_ids, images)


def _filled_in(args: Namespace, tokenizer: Any, question: str) -> str:
    """The chat template's text of a question, with --system-prompt and --prefill-response."""
    from .models.templates import question_text

    variables = {}
    if args.chat_template_config:
        variables = json.loads(args.chat_template_config)
    return question_text(
        tokenizer,
        question,
        system_prompt=args.system_prompt,
        prefill=args.prefill_response,
        remedy="give --ignore-chat-template",
        variables=variables,
    )


def _answer(
    args: Namespace,
    loaded: _Loaded,
    prompt: list[int],
    embeddings: mx.array | None,
    cache: "CachedPrompt | None",
    grammar: Grammar | None,
) -> None:
    """Writes the answer to the terminal."""
    from .decoding.generation import generate
    from .decoding.sampling import make_sampler

    tokenizer = loaded.tokenizer
    processor = None
    processors: list[Callable[[mx.array, mx.array], mx.array]] = []
    if grammar is not None:
        processor = GrammarProcessor(tokenizer, grammar)
        processors.append(processor)
    layers = None
    if cache is not None:
        layers = cache.layers
    draw_temperature = None
    if args.draw_probes:
        draw_temperature = args.temp
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
    text = generate(
        loaded.model,
        tokenizer,
        prompt,
        verbose=args.verbose,
        n_probes=args.n_probes,
        verify=not args.no_verify,
        draw_temperature=draw_temperature,
        max_wait=args.max_wait,
        lookup=args.lookup,
        max_tokens=args.max_tokens,
        sampler=sampler,
        logits_processors=processors,
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        prompt_cache=layers,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        draft_model=loaded.draft_model,
        num_draft_tokens=args.num_draft_tokens,
        input_embeddings=embeddings,
    )
    if not args.verbose:
        print(text)
    if grammar is not None and processor is not None and not processor.accepts(text):
        reason = processor.problem
        if reason is None:
            reason = f"it was cut at --max-tokens {args.max_tokens}: give more"
        print(f"The text does not complete the {grammar.form}: {reason}.", file=sys.stderr)


def _build(loaded: _Loaded, options: "HeadOptions") -> None:
    """Builds the FlashHead for next time."""
    from .loading.builds import LEFT, PREPARING, build_now
    from .models.errors import UnsupportedHeadError

    sys.stdout.flush()
    options.say(PREPARING)
    try:
        with ctrl_c_raises():
            build_now(loaded.model, loaded.tokenizer, loaded.folder, options)
    except UnsupportedHeadError as error:
        options.say(f"Without FlashHead: {error}")
    except KeyboardInterrupt:
        options.say(LEFT)


if __name__ == "__main__":
    main()
