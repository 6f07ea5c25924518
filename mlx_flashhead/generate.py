"""Generates text: ``mlx_lm.generate`` with a FlashHead, all its flags and some more."""

import json
import math
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .common.arguments import Parser, whole_number
from .common.command import command, ending_soon
from .common.flags import (
    add_answer_flags,
    add_answering_options,
    add_model_flags,
    add_probes_option,
    add_prompt_flags,
    check_before_loading,
)
from .common.terminal import printable_output
from .structured.grammar import GrammarProcessor, add_grammar_options, grammar_of

# Flags that several processes do not support.
ALONE = (
    "adapter_path", "draft_model", "prompt_cache_file", "image", "quantize_activations",
    "fine_head",
)  # fmt: skip


def make_parser() -> Parser:
    """The command's arguments."""
    about = "Generate text with a model and its FlashHead."
    parser = Parser(prog="mlx_flashhead.generate", description=about)
    add_model_flags(parser)
    add_prompt_flags(parser)
    add_answer_flags(parser, max_tokens=100, seed=None)
    group = parser.add_argument_group("FlashHead")
    add_probes_option(group)
    add_answering_options(group)
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
    """Entry point of ``mlx_flashhead.generate``."""
    parser = make_parser()
    if {"-h", "--help"} & {*sys.argv[1:]}:
        parser.parse_args()
    try:
        processes = mx.distributed.init()  # a group of one without mlx.launch
    except RuntimeError as error:
        raise ValueError(
            f"The processes cannot be joined ({error}): check the hosts and ports of mlx.launch."
        ) from error
    with _first_process_speaks(processes, errors=True):  # all processes make the same mistake
        args = parser.parse_args()
        _check_arguments(parser, args, processes.size())
        grammar = grammar_of(args)
        check_before_loading(args)
    with _first_process_speaks(processes), ending_soon():
        _generate(args, processes, grammar)


@contextmanager
def _first_process_speaks(
    processes: mx.distributed.Group, *, errors: bool = False
) -> Iterator[None]:
    """Within the block, only the first process prints.

    ``errors`` silences standard error too. Otherwise another process prints its errors there, since
    it may be the only one that fails, and names itself.
    """
    rank = processes.rank()
    if rank == 0:
        yield
        return
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        if errors:
            stack.enter_context(redirect_stderr(nowhere))
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"process {rank}: {error}") from error


def _check_arguments(parser: Parser, args: Namespace, n_processes: int) -> None:
    if not args.model and args.prompt_cache_file is None:
        parser.error("--model is needed: give a folder or a repository of a model")
    if not args.prompt:
        parser.error("--prompt is empty: give a text, or - for standard input")
    if args.draw_probes and (args.dense or not args.temp > 0):
        parser.error("--draw-probes needs --temp above 0, and no --dense")
    if args.draft_probes is not None and args.draft_model is None:
        parser.error("--draft-probes is for a draft model: add --draft-model, or leave it out")
    for flag in ("n_probes", "flash_head", "no_verify"):
        if args.dense and getattr(args, flag):
            parser.error(f"--dense uses no FlashHead: leave --{flag.replace('_', '-')} out")
    if args.draw_probes and (args.json_schema or args.regex or args.grammar):
        parser.error(
            "--draw-probes draws the clusters without regard to the form of the text: leave it out"
        )
    if args.prompt_cache_file is not None:
        _check_prompt_cache(parser, args)
    if args.pipeline and n_processes == 1:
        parser.error("--pipeline needs several processes: start them with mlx.launch")
    for flag in ALONE:
        if n_processes > 1 and getattr(args, flag):
            name = flag.replace("_", "-")
            parser.error(f"--{name} is for one process: start it without mlx.launch")
    if n_processes > 1 and args.prompt == "-":
        parser.error(
            "--prompt - cannot read the input of mlx.launch, which has no end: give the prompt"
        )


def _check_prompt_cache(parser: Parser, args: Namespace) -> None:
    file = args.prompt_cache_file
    if not Path(file).is_file():
        parser.error(f"--prompt-cache-file {file}: there is no such file")
    if args.draft_model is not None:
        parser.error("--prompt-cache-file holds no cache of a draft model: leave --draft-model out")
    from .models.compat.mlx_lm import load_prompt_cache

    try:
        _, metadata = load_prompt_cache(file, return_metadata=True)
        json.loads(metadata["tokenizer_config"]), metadata["model"]
    except (RuntimeError, ValueError, KeyError, TypeError):
        parser.error(
            f"--prompt-cache-file {file} is damaged or not a prompt cache: make one with "
            "mlx_lm.cache_prompt"
        )


def _generate(args: Namespace, processes: mx.distributed.Group, grammar: Any) -> None:
    """Loads, answers, and builds a missing FlashHead afterwards."""
    # mlx-lm takes a second to import, which mistakes and --help do without
    from .loading.load import load_dense_head, load_draft, load_with_head, sharded_load
    from .loading.sources import LATER, HeadOptions
    from .lossless.generation import generate
    from .lossless.sequence import make_sampler
    from .models.compat.mlx_lm import generation_stream, run_generate
    from .models.fetch import resolve
    from .models.install import get_flash_head
    from .models.libraries import UNKNOWN_CONTEXT, apply_template, context_of, load_dense_part

    options = HeadOptions.from_flags(args)
    answering: list[Any] = []  # the model, its tokenizer and its folder, unless it is dense
    context = UNKNOWN_CONTEXT

    def load_for_main(path: Any, *, return_config: bool = False, **kwargs: Any) -> Any:
        nonlocal context
        if "tokenizer_config" not in kwargs:  # as mlx-lm loads the draft model
            return load_draft(
                path, draft_probes=args.draft_probes, trust_remote_code=args.trust_remote_code
            )
        if processes.size() > 1:
            how = {name: kwargs[name] for name in ("tokenizer_config", "trust_remote_code")}
            how["pipeline_group"] = processes if args.pipeline else None
            if args.dense:
                loaded = load_dense_part(path, **how)
            else:
                how |= {"flash_head": args.flash_head, "n_probes": args.n_probes}
                loaded = sharded_load(path, return_config=True, **how)
            seed = args.seed  # each process samples every token by itself, and all must agree
            if seed is None:
                drawn = mx.array(secrets.randbits(31) if processes.rank() == 0 else 0)
                drawn = mx.distributed.all_sum(drawn, group=processes, stream=mx.cpu)
                seed = cast(int, drawn.item())
            mx.random.seed(seed)
        elif args.dense:
            loaded = load_dense_head(resolve(path), options, **kwargs)
        else:
            folder = resolve(path)
            loaded = load_with_head(folder, options, **kwargs)
            answering[:] = *loaded[:2], folder
            if args.n_probes and args.no_build and get_flash_head(loaded[0]) is None:
                raise ValueError(
                    "--n-probes needs a FlashHead, and this model has none: leave --no-build out."
                )
        tokenizer = loaded[1]
        context = context_of(loaded[2], tokenizer)

        def fill_in(messages: Any, tokenize: bool = True, **options: Any) -> Any:
            options["remedy"] = "give --ignore-chat-template"
            text = apply_template(tokenizer, messages, **options)
            return tokenizer.encode(text, add_special_tokens=False) if tokenize else text

        # mlx-lm 0.31 hands an assignment on to the tokenizer within, which would call itself
        vars(tokenizer)["apply_chat_template"] = fill_in
        return loaded if return_config else loaded[:2]  # mlx-lm 0.31 takes two

    def generate_for_main(model: Any, tokenizer: Any, prompt: Any, **named: Any) -> str:
        if not len(prompt):
            raise ValueError("The prompt is empty: give at least one token with --prompt.")
        if len(prompt) >= context:
            raise ValueError(
                f"The prompt has {len(prompt):,} tokens, and at most {context - 1:,} fit, since "
                f"the answer needs one of the context's {context:,}: give a shorter --prompt."
            )
        named["verify"] = not args.no_verify
        named["prefill_step_size"] = args.prefill_step_size  # 0.31 leaves it out
        if args.max_wait is not None:
            named["max_wait"] = args.max_wait
        if args.draw_probes:
            named["draw_temperature"] = args.temp
        if grammar is None:
            return generate(model, tokenizer, prompt, **named)
        processor = GrammarProcessor(tokenizer, grammar)
        text = generate(model, tokenizer, prompt, logits_processors=[processor], **named)
        if not processor.accepts(text):
            cut = f"it was cut at --max-tokens {args.max_tokens}: give more"
            reason = processor.problem or cut
            print(f"The text does not complete the {grammar.kind}: {reason}.", file=sys.stderr)
        return text

    with printable_output():
        run_generate(
            args, load=load_for_main, make_sampler=make_sampler, generate=generate_for_main
        )
    if answering and options.missing == LATER:
        _build_for_next_time(options, *answering)
    if processes.size() > 1:  # mlx-lm computes a token ahead, for which each needs the others
        mx.synchronize(generation_stream)
        mx.eval(mx.distributed.all_sum(mx.array(1), group=processes, stream=mx.cpu))


def _build_for_next_time(options: Any, model: Any, tokenizer: Any, folder: Path) -> None:
    """Builds the FlashHead after the answer, if the model has none yet."""
    from .loading.background import background_build

    how = {"step_seconds": math.inf, "waits": False}
    build = background_build(model, tokenizer, folder, options, **how)
    if build is None:
        return
    sys.stdout.flush()
    options.say("Preparing FlashHead for next time. Ctrl-C skips it.")
    try:
        build.finish()
    except KeyboardInterrupt:
        options.say("Skipped. The next answer tries again.")
    finally:
        build.drop()


if __name__ == "__main__":
    main()
