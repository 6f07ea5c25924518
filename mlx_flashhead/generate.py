"""Generates text: ``mlx_lm.generate`` with a FlashHead, all its flags and some more."""

import json
import os
import secrets
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import mlx.core as mx

from .common import flags
from .common.arguments import Parser, whole_number
from .common.command import command, ended_by_signals
from .common.terminal import printable_output
from .structured.grammar import GrammarProcessor, add_grammar_options, grammar_of

# Flags that several processes do not support.
ALONE = (
    "adapter_path", "draft_model", "prompt_cache_file", "image", "quantize_activations",
    "fine_head",
)  # fmt: skip


def make_parser() -> Parser:
    about = "Generate text with a model and its FlashHead."
    parser = Parser(prog="mlx_flashhead.generate", description=about)
    flags.add_model_flags(parser)
    flags.add_prompt_flags(parser)
    flags.add_answer_flags(parser, max_tokens=100, seed=None)
    group = parser.add_argument_group("FlashHead")
    flags.add_answering_options(group)
    probes = "Clusters scored for each drafted token (default: a tenth of its head's bytes)."
    group.add_argument("--draft-probes", type=whole_number(1), help=probes)
    dense = "Use the normal (dense) head, for comparison."
    group.add_argument("--dense", action="store_true", help=dense)
    drawn = "Draw the clusters by probability at --temp, as in the paper, without verification."
    group.add_argument("--draw-probes", action="store_true", help=drawn)
    pipeline = "Under mlx.launch, share the layers out instead of splitting each of them."
    group.add_argument("--pipeline", action="store_true", help=pipeline)
    add_grammar_options(parser)
    return parser


@command
def main() -> None:
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
    if not args.model and args.prompt_cache_file is None:
        parser.error("--model is needed: give a folder or a repository of a model")
    if not args.prompt:
        parser.error("--prompt is empty: give a text, or - for standard input")
    if args.draw_probes and (args.dense or not args.temp > 0):
        parser.error("--draw-probes needs --temp above 0, and no --dense")
    if args.draw_probes and (args.json_schema or args.regex or args.grammar):
        parser.error("--draw-probes disregards the form of the text: leave it out")
    if args.draft_probes is not None and args.draft_model is None:
        parser.error("--draft-probes is for a draft model: add --draft-model, or leave it out")
    for flag in ("n_probes", "flash_head", "no_verify"):
        if args.dense and getattr(args, flag):
            parser.error(f"--dense uses no FlashHead: leave --{flag.replace('_', '-')} out")
    if args.pipeline and n_processes == 1:
        parser.error("--pipeline needs several processes: start them with mlx.launch")
    for flag in ALONE:
        if n_processes > 1 and getattr(args, flag):
            name = flag.replace("_", "-")
            parser.error(f"--{name} is for one process: start it without mlx.launch")
    if n_processes > 1 and args.prompt == "-":
        parser.error("--prompt - is the input of mlx.launch, which has no end: give the prompt")
    if args.prompt_cache_file is not None and args.draft_model is not None:
        parser.error("--prompt-cache-file holds no cache of a draft model: leave --draft-model out")
    if args.prompt_cache_file is not None:
        from .models.compat.mlx_lm import load_prompt_cache

        try:
            _, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
            json.loads(metadata["tokenizer_config"]), metadata["model"]
        except (RuntimeError, ValueError, KeyError, TypeError):
            wrong = "is missing, damaged or not a prompt cache: make one with mlx_lm.cache_prompt"
            parser.error(f"--prompt-cache-file {args.prompt_cache_file} {wrong}")


def _generate(args: Namespace, processes: mx.distributed.Group, grammar: Any) -> None:
    """Loads, answers, and builds a missing FlashHead afterwards."""
    # mlx-lm takes a second to import, which mistakes and --help do without
    from .decoding.generation import generate
    from .decoding.sampler import make_sampler
    from .loading.background import build_now
    from .loading.head_options import LATER, HeadOptions
    from .loading.load import load_dense_head, load_draft, load_with_head, sharded_load
    from .models.compat.mlx_lm import generation_stream, run_generate
    from .models.errors import UnsupportedHeadError
    from .models.fetch import resolve
    from .models.install import get_flash_head
    from .models.loading import UNKNOWN_CONTEXT, context_of, load_dense_part
    from .models.templates import apply_template

    options = HeadOptions.from_flags(args)
    unbuilt: Any = None  # a model without a FlashHead, its tokenizer and its folder
    context = UNKNOWN_CONTEXT

    def load(path: Any, *, return_config: bool = False, **kwargs: Any) -> Any:
        nonlocal unbuilt, context
        if "tokenizer_config" not in kwargs:  # as mlx-lm loads the draft model
            trust = args.trust_remote_code
            return load_draft(path, draft_probes=args.draft_probes, trust_remote_code=trust)
        if processes.size() > 1:
            how = {name: kwargs[name] for name in ("tokenizer_config", "trust_remote_code")}
            how["pipeline_group"] = processes if args.pipeline else None
            if args.dense:
                loaded = load_dense_part(path, **how)
            else:
                how |= {"flash_head": args.flash_head, "n_probes": args.n_probes}
                loaded = sharded_load(path, return_config=True, **how)
            if args.seed is None:  # each process samples every token, and all must agree
                drawn = mx.array(secrets.randbits(24))
                drawn = mx.distributed.all_sum(drawn, group=processes, stream=mx.cpu)
                args.seed = drawn.item()
            mx.random.seed(args.seed)
        elif args.dense:
            loaded = load_dense_head(resolve(path), options, **kwargs)
        else:
            folder = resolve(path)
            loaded = load_with_head(folder, options, **kwargs)
            if args.n_probes and args.no_build and get_flash_head(loaded[0]) is None:
                raise ValueError("--n-probes needs a FlashHead: leave --no-build out.")
            if options.missing == LATER and get_flash_head(loaded[0]) is None:
                unbuilt = *loaded[:2], folder
        tokenizer = loaded[1]
        context = context_of(loaded[2], tokenizer)

        def fill_in(messages: Any, tokenize: bool = True, **options: Any) -> Any:
            options["remedy"] = "give --ignore-chat-template"
            text = apply_template(tokenizer, messages, **options)
            return tokenizer.encode(text, add_special_tokens=False) if tokenize else text

        # mlx-lm 0.31 hands an assignment on to the tokenizer within, which would call itself
        vars(tokenizer)["apply_chat_template"] = fill_in
        return loaded if return_config else loaded[:2]  # mlx-lm 0.31 takes two

    def answer(model: Any, tokenizer: Any, prompt: Any, **named: Any) -> str:
        if not len(prompt):
            raise ValueError("The prompt is empty: give at least one token with --prompt.")
        if len(prompt) >= context:
            reason = f"The prompt has {len(prompt):,} tokens, and at most {context - 1:,} fit"
            raise ValueError(f"{reason}: give a shorter --prompt.")
        named["prefill_step_size"] = args.prefill_step_size  # 0.31 leaves it out
        named |= {"verify": not args.no_verify, "max_wait": args.max_wait}
        named["draw_temperature"] = args.temp if args.draw_probes else None
        processor = GrammarProcessor(tokenizer, grammar) if grammar else None
        named["logits_processors"] = [processor] if processor else None
        with ended_by_signals():
            text = generate(model, tokenizer, prompt, **named)
        if processor and not processor.accepts(text):
            cut = f"it was cut at --max-tokens {args.max_tokens}: give more"
            reason = processor.problem or cut
            print(f"The text does not complete the {grammar.kind}: {reason}.", file=sys.stderr)
        return text

    with printable_output():
        run_generate(args, load=load, make_sampler=make_sampler, generate=answer)
    if unbuilt is not None:
        sys.stdout.flush()
        options.say("Preparing FlashHead for next time. Ctrl-C skips it.")
        try:
            model, tokenizer, folder = unbuilt
            build_now(model, tokenizer, folder, options)
        except UnsupportedHeadError as error:
            options.say(f"Without FlashHead: {error}")
        except KeyboardInterrupt:
            options.say("Skipped. The next answer tries again.")
    if processes.size() > 1:  # mlx-lm computes a token ahead, for which each needs the others
        mx.synchronize(generation_stream)
        mx.eval(mx.distributed.all_sum(mx.array(1), group=processes, stream=mx.cpu))


if __name__ == "__main__":
    main()
