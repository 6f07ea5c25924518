"""Generates text: ``mlx_lm.generate`` with a FlashHead, all its flags and some more."""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common.arguments import adopt, whole_number
from .common.command import command, ending_soon
from .common.head_flags import add_answering_options, add_probes_option
from .common.processes import draw_alike, first_process_speaks, join_processes, leave_together
from .common.terminal import printable_output
from .loading.background import background_build
from .loading.load import load_draft, load_with_head, sharded_load
from .loading.sources import LATER, HeadOptions
from .lossless.generation import generate
from .lossless.sampler import make_sampler
from .models.compat.mlx_lm import (
    generate_parser,
    generation_stream,
    load_prompt_cache,
    run_generate,
)
from .models.dense import load_dense, load_dense_part
from .models.fetch import resolve
from .models.tokenizers import UNKNOWN_CONTEXT, context_of
from .publishing.origin import local_origin
from .structured.grammar_options import add_grammar_options, grammar_of
from .structured.processor import GrammarProcessor


def make_parser():
    """mlx-lm's parser, extended."""
    parser = adopt(
        generate_parser(),
        "mlx_flashhead.generate",
        "Generate text with a model and its FlashHead.",
        {
            "model": "Folder or Hugging Face repository of any model that mlx-lm loads.",
            "draft_model": "A model for speculative decoding. It drafts with its FlashHead if it "
            "has one.",
        },
    )
    group = parser.add_argument_group("FlashHead")
    add_probes_option(group)
    add_answering_options(group)
    group.add_argument(
        "--draft-probes",
        type=whole_number(1),
        help="Clusters scored for each drafted token (default: as many as read a "
        "tenth of its head's bytes).",
    )
    group.add_argument(
        "--dense", action="store_true", help="Score every token: the dense model, for comparison."
    )
    group.add_argument(
        "--draw-probes",
        action="store_true",
        help="Draw the clusters by probability at --temp, as in the paper, instead of sampling "
        "from full logits.",
    )
    group.add_argument(
        "--pipeline",
        action="store_true",
        help="Under mlx.launch, share the layers out instead of splitting each of them.",
    )
    add_grammar_options(parser)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.generate``."""
    processes = join_processes()
    with first_process_speaks(processes, errors=True):  # all processes make the same mistake
        parser = make_parser()
        args = parser.parse_args()
        _check_arguments(parser, args)
        _check_processes(parser, args, processes)
        grammar = grammar_of(args)

    answering: list[Any] = []
    context = UNKNOWN_CONTEXT
    with first_process_speaks(processes):

        def load_for_main(path, *, return_config=False, **kwargs):
            if "tokenizer_config" not in kwargs:  # as mlx-lm loads the draft model
                return load_draft(
                    path, draft_probes=args.draft_probes, trust_remote_code=args.trust_remote_code
                )
            if processes.size() > 1:
                loaded = _load_part(args, processes, path, **kwargs)
            elif args.dense:
                loaded = load_dense(resolve(path), **kwargs)
            else:
                folder = resolve(path)
                loaded = load_with_head(folder, HeadOptions.from_flags(args), **kwargs)
                answering[:] = *loaded[:2], local_origin(folder)  # which may be gone later
            nonlocal context
            context = context_of(loaded[2], loaded[1])
            # mlx-lm 0.31 hands an assignment on to the tokenizer within, which would call itself
            template = _checked_template(loaded[1].apply_chat_template)
            vars(loaded[1])["apply_chat_template"] = template
            return loaded if return_config else loaded[:2]  # mlx-lm 0.31 takes two

        def generate_for_main(model, tokenizer, prompt, **named):
            _check_prompt(prompt, context)
            named["verify"] = not args.no_verify
            named["prefill_step_size"] = args.prefill_step_size  # which 0.31 does not hand on
            if args.draw_probes:
                named["draw_temperature"] = args.temp
            if grammar is None:
                return generate(model, tokenizer, prompt, **named)
            processor = GrammarProcessor(tokenizer, grammar)
            text = generate(model, tokenizer, prompt, logits_processors=[processor], **named)
            if not processor.accepts(text):
                reason = (
                    processor.problem or f"it was cut at --max-tokens {args.max_tokens}: give more"
                )
                print(
                    f"The text is not a whole one of the {grammar.kind}: {reason}.", file=sys.stderr
                )
            return text

        with ending_soon():
            with printable_output():
                run_generate(
                    args, load=load_for_main, make_sampler=make_sampler, generate=generate_for_main
                )
            _build_for_next_time(args, *answering)
        leave_together(processes, generation_stream)


def _check_prompt(prompt, context: int) -> None:
    """Refuses a prompt that is empty or too long, before anything is computed or printed."""
    if not len(prompt):
        raise ValueError("The prompt is empty: give at least one token with --prompt.")
    if len(prompt) >= context:
        raise ValueError(
            f"The prompt has {len(prompt):,} tokens, and at most {context - 1:,} are read, since "
            f"the answer needs one of the context's {context:,}: give a shorter --prompt."
        )


def _build_for_next_time(args, model=None, tokenizer=None, origin=None) -> None:
    """Builds the FlashHead after the answer, if the model has none yet."""
    options = HeadOptions.from_flags(args)
    if model is None or options.missing != LATER:
        return
    build = background_build(model, tokenizer, origin, options, math.inf)
    if build is None:
        return
    sys.stdout.flush()
    options.say("Preparing FlashHead for next time …, Ctrl-C skips it.")
    try:
        build.finish()
    except KeyboardInterrupt:
        options.say("Skipped: what is missing is built another time.")
    finally:
        build.drop()


def _checked_template(apply_chat_template: Callable) -> Callable:
    """The same, with errors of the template as a ValueError."""

    @functools.wraps(apply_chat_template)
    def apply(*args, **kwargs):
        try:
            return apply_chat_template(*args, **kwargs)
        except Exception as error:  # templates and their engine raise any type
            reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
            raise ValueError(
                f"The model's chat template cannot be filled in ({reason}): give "
                "--ignore-chat-template."
            ) from error

    return apply


def _load_part(args, processes, path, *, tokenizer_config, trust_remote_code, **_):
    how = {
        "pipeline_group": processes if args.pipeline else None,
        "tokenizer_config": tokenizer_config,
        "trust_remote_code": trust_remote_code,
    }
    if args.dense:
        loaded = load_dense_part(path, **how)
    else:
        how |= {"flash_head": args.flash_head, "n_probes": args.n_probes}
        loaded = sharded_load(path, return_config=True, **how)
    draw_alike(processes, args.seed)
    return loaded


def _check_arguments(parser, args) -> None:
    if not args.model and args.prompt_cache_file is None:
        parser.error("--model is needed: a folder or a repository of a model")
    if args.draw_probes and (args.dense or not args.temp > 0):
        parser.error("--draw-probes needs --temp above 0, and no --dense")
    if args.draft_probes is not None and args.draft_model is None:
        parser.error("--draft-probes are a draft model's: add --draft-model, or leave it out")
    if args.dense and args.n_probes is not None:
        parser.error("--dense scores every token: leave --n-probes out")
    if args.dense and args.flash_head is not None:
        parser.error("--dense takes no FlashHead: leave --flash-head out")
    if args.draw_probes and (args.json_schema or args.regex or args.grammar):
        parser.error(
            "--draw-probes draws the clusters without regard to the form of the text: leave it out"
        )
    if args.prompt_cache_file is not None:
        _check_prompt_cache(parser, args)


def _check_prompt_cache(parser, args) -> None:
    file = args.prompt_cache_file
    if not Path(file).is_file():
        parser.error(f"--prompt-cache-file {file}: there is no such file")
    try:
        _, metadata = load_prompt_cache(file, return_metadata=True)
        json.loads(metadata["tokenizer_config"]), metadata["model"]
    except (RuntimeError, ValueError, KeyError, TypeError):
        parser.error(
            f"--prompt-cache-file {file} is damaged or not a prompt cache: make one with "
            "mlx_lm.cache_prompt"
        )
    if args.draft_model is not None:
        parser.error("--prompt-cache-file holds no cache of a draft model: leave --draft-model out")


def _check_processes(parser, args, processes) -> None:
    if processes.size() == 1:
        if args.pipeline:
            parser.error("--pipeline needs several processes: start them with mlx.launch")
        return
    for option, given in (
        ("--adapter-path", args.adapter_path),
        ("--draft-model", args.draft_model),
        ("--prompt-cache-file", args.prompt_cache_file),
        ("--image", args.image),
        ("--quantize-activations", args.quantize_activations),
    ):
        if given:
            parser.error(f"{option} is for one process: start it without mlx.launch")
    if args.prompt == "-":
        parser.error(
            "--prompt - cannot read the input of mlx.launch, which has no end: give the prompt"
        )


if __name__ == "__main__":
    main()
