"""Generates text: ``mlx_lm.generate`` with a FlashHead, all its flags and some more."""

import json
import os
import secrets
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .common import flags
from .common.arguments import Parser
from .common.command import command
from .common.interrupts import ctrl_c_raises
from .common.suggested_model import model_is_needed
from .common.terminal import printable_output
from .structured.grammar import add_grammar_options, grammar_of
from .structured.processor import GrammarProcessor

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
        processes = mx.distributed.init()  # a group of one without mlx.launch
    except RuntimeError as error:
        remedy = "check the hosts and ports of mlx.launch"
        raise ValueError(f"The processes cannot be joined ({error}): {remedy}.") from error
    first = processes.rank() == 0
    with open(os.devnull, "w") as nowhere:
        # all processes make the same mistake, and the first one says it
        with redirect_stderr(sys.stderr if first else nowhere):
            args = parser.parse_args()
            _check_arguments(parser, args, processes.size())
        grammar = grammar_of(args)
        flags.check_before_loading(args)
        with redirect_stdout(sys.stdout if first else nowhere):
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
    text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    args.prompt_text = sys.stdin.read() if text == "-" else text
    if not args.prompt_text:
        parser.error(EMPTY)


def _generate(args: Namespace, processes: mx.distributed.Group, grammar: Any) -> None:
    """Loads, answers, and builds a missing FlashHead afterwards."""
    # mlx-lm takes a second to import, which mistakes and --help do without
    from .loading.head_options import LATER, HeadOptions
    from .loading.trials import trials_said
    from .models.compat.mlx_lm import generation_stream
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
    elif unbuilt:  # a script waits for its end
        name = args.model or loaded.folder
        options.say(
            f"FlashHead is not built yet: `mlx_flashhead.cache --build {name}` builds it, as does "
            "the next answer at a terminal."
        )
    if processes.size() > 1:  # the loop computes a token ahead, for which each needs the others
        mx.synchronize(generation_stream)
        mx.eval(mx.distributed.all_sum(mx.array(1), group=processes, stream=mx.cpu))


@dataclass
class _Loaded:
    """A model and what belongs to it."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    draft_model: Any = None


@dataclass
class _PromptCache:
    """What ``mlx_lm.cache_prompt`` wrote."""

    layers: list[Any]
    model: str
    tokenizer_config: dict[str, Any]


def _prompt_cache(args: Namespace) -> _PromptCache | None:
    """The cache of --prompt-cache-file. ValueError if it is none, or differs from the flags."""
    name = args.prompt_cache_file
    if name is None:
        return None
    from .models.compat.mlx_lm import QuantizedKVCache, load_prompt_cache

    if not Path(name).is_file():
        raise ValueError(f"--prompt-cache-file: there is no file {name}, check the path.")
    try:
        layers, metadata = load_prompt_cache(name, return_metadata=True)
    except (RuntimeError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--prompt-cache-file {name} is damaged, or no safetensors file of a prompt cache: "
            "make it again with mlx_lm.cache_prompt."
        ) from None
    try:
        cache = _PromptCache(layers, metadata["model"], json.loads(metadata["tokenizer_config"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--prompt-cache-file {name} does not name its model and tokenizer: make one with "
            "mlx_lm.cache_prompt."
        ) from None
    first = layers[0]
    quantized = isinstance(first, QuantizedKVCache)
    if quantized and args.kv_bits not in (None, first.bits):
        raise ValueError(
            f"--kv-bits is {args.kv_bits}, but the cache of --prompt-cache-file has "
            f"{first.bits}: leave it out."
        )
    if quantized and args.kv_group_size != first.group_size:
        raise ValueError(
            f"--kv-group-size is {args.kv_group_size}, but the cache of --prompt-cache-file "
            f"has {first.group_size}: give that."
        )
    if args.model and args.model != cache.model:
        raise ValueError(
            f"--model is {args.model}, but the cache of --prompt-cache-file is of "
            f"{cache.model}: give that one, or leave --model out."
        )
    return cache


def _load(
    args: Namespace, processes: mx.distributed.Group, options: Any, cache: _PromptCache | None
) -> _Loaded:
    """The model with its FlashHead, its tokenizer, and the draft model."""
    from .loading.drafts import DraftOptions
    from .loading.load import load_dense_head, load_with_head
    from .models.fetch import resolve
    from .models.install import get_flash_head

    name: str = cache.model if cache is not None else args.model
    tokenizer_config = {} if cache is None else dict(cache.tokenizer_config)
    tokenizer_config["trust_remote_code"] = args.trust_remote_code
    drafting = DraftOptions(args.draft_model, args.mtp, args.draft_probes)
    drafting.check(name)
    if processes.size() > 1:
        loaded = _load_part(args, processes, name, tokenizer_config)
    else:
        folder = resolve(name)
        load = load_dense_head if args.dense else load_with_head
        model, tokenizer, config = load(
            folder,
            options,
            adapter_path=args.adapter_path,
            tokenizer_config=tokenizer_config,
            model_config={"quantize_activations": args.quantize_activations},
            trust_remote_code=args.trust_remote_code,
        )
        loaded = _Loaded(model, tokenizer, config, folder)
        if args.n_probes and args.no_build and get_flash_head(model) is None:
            raise ValueError("--n-probes needs a FlashHead: leave --no-build out.")
    for token in args.extra_eos_token:
        loaded.tokenizer.add_eos_token(token)
    loaded.draft_model = drafting.load(
        loaded.model, loaded.folder, options, trust_remote_code=args.trust_remote_code
    )
    return loaded


def _load_part(
    args: Namespace, processes: mx.distributed.Group, name: str, tokenizer_config: dict[str, Any]
) -> _Loaded:
    """This process's part of the model. All processes draw from the same seed."""
    from .loading.load import sharded_load
    from .models.loading import load_dense_part

    group = processes if args.pipeline else None
    with_head = partial(
        sharded_load, return_config=True, flash_head=args.flash_head, n_probes=args.n_probes
    )
    load = load_dense_part if args.dense else with_head
    model, tokenizer, config = load(
        name,
        pipeline_group=group,
        tokenizer_config=tokenizer_config,
        trust_remote_code=args.trust_remote_code,
    )
    seed = args.seed
    if seed is None:  # each process samples every token, and all must agree
        drawn = mx.array(secrets.randbits(24))
        seed = mx.distributed.all_sum(drawn, group=processes, stream=mx.cpu).item()
    mx.random.seed(seed)
    return _Loaded(model, tokenizer, config, Path(name))


def _prompt(
    args: Namespace, loaded: _Loaded, cache: _PromptCache | None
) -> tuple[list[int], mx.array | None]:
    """Returns the prompt's token ids, and the embeddings (n, D) of one with images.

    Raises:
        ValueError: For a prompt that is empty or longer than the context.
    """
    tokenizer = loaded.tokenizer
    text = args.prompt_text
    templated = not args.ignore_chat_template and tokenizer.has_chat_template
    if templated:
        text = _filled_in(args, tokenizer, text)
        if cache is not None:  # which holds what is before the question
            before = _filled_in(args, tokenizer, "<query>")
            text = text[before.index("<query>") :]
    images = None
    if args.image:
        text, images = _with_images(args, loaded, text)
    token_ids = list(tokenizer.encode(text, add_special_tokens=not templated))
    if not token_ids:
        raise ValueError("The prompt is empty: give at least one token with --prompt.")
    from .models.loading import context_of

    context = context_of(loaded.config, tokenizer)
    if len(token_ids) >= context:
        raise ValueError(
            f"The prompt is longer than this model's {context:,}-token context: shorten it."
        )
    if images is None:
        return token_ids, None
    embeddings = loaded.model.embed_inputs(mx.array(token_ids), pixel_values=images)
    mx.eval(embeddings)  # the prompt is read on another stream
    return token_ids, embeddings


def _filled_in(args: Namespace, tokenizer: Any, question: str) -> str:
    """The chat template's text of a question, with --system-prompt and --prefill-response."""
    from .models.templates import apply_template

    messages = []
    if args.system_prompt is not None:
        messages.append({"role": "system", "content": args.system_prompt})
    messages.append({"role": "user", "content": question})
    has_prefill = args.prefill_response is not None
    if has_prefill:
        messages.append({"role": "assistant", "content": args.prefill_response})
    variables = json.loads(args.chat_template_config) if args.chat_template_config else {}
    return apply_template(
        tokenizer,
        messages,
        remedy="give --ignore-chat-template",
        continue_final_message=has_prefill,
        add_generation_prompt=not has_prefill,
        **variables,
    )


def _with_images(args: Namespace, loaded: _Loaded, text: str) -> tuple[str, Any]:
    """The prompt with the images' placeholders, and the images' values."""
    from PIL import Image

    from .models.compat.mlx_lm import load_processor

    processor = load_processor(loaded.model, loaded.config)
    if processor is None:
        raise ValueError(f"{args.model} does not take images: leave --image out.")
    images = [np.asarray(Image.open(file).convert("RGB")) for file in args.image]
    return processor(text, images=images)


def _answer(
    args: Namespace,
    loaded: _Loaded,
    prompt: list[int],
    embeddings: mx.array | None,
    cache: _PromptCache | None,
    grammar: Any,
) -> None:
    """Writes the answer to the terminal."""
    from .decoding.generation import generate
    from .decoding.sampler import make_sampler

    tokenizer = loaded.tokenizer
    processor = GrammarProcessor(tokenizer, grammar) if grammar else None
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
        draw_temperature=args.temp if args.draw_probes else None,
        max_wait=args.max_wait,
        lookup=args.lookup,
        max_tokens=args.max_tokens,
        sampler=sampler,
        logits_processors=[processor] if processor else None,
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        prompt_cache=None if cache is None else cache.layers,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        draft_model=loaded.draft_model,
        num_draft_tokens=args.num_draft_tokens,
        input_embeddings=embeddings,
    )
    if not args.verbose:
        print(text)
    if processor and not processor.accepts(text):
        cut = f"it was cut at --max-tokens {args.max_tokens}: give more"
        reason = processor.problem or cut
        print(f"The text does not complete the {grammar.form}: {reason}.", file=sys.stderr)


def _build(loaded: _Loaded, options: Any) -> None:
    """Builds the FlashHead for next time."""
    from .loading.background import LEFT, PREPARING, build_now
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
