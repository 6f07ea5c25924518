"""Chats with a model and its FlashHead: the flags of ``mlx_lm.chat`` and some more."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from .common import flags
from .common.arguments import Parser
from .common.command import command
from .common.interrupts import ctrl_c_raises
from .common.suggested_model import asked_for_model, model_is_needed

SEED = 0


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.chat``."""
    parser = Parser(prog="mlx_flashhead.chat", description="Chat with a model and its FlashHead.")
    flags.add_model_flags(parser)
    flags.add_draft_flags(parser.add_argument)
    flags.add_answer_flags(parser, max_tokens=256, seed=SEED)
    parser.add_argument(
        "--resume", action="store_true", help="Continue the last conversation at a terminal."
    )
    group = parser.add_argument_group("FlashHead", flags.FLASH_HEAD)
    flags.add_answering_options(group)
    flags.add_draft_probes(group.add_argument)
    group.add_argument("--dense", action="store_true", help="Begin with the normal (dense) head.")
    return parser


def _check_arguments(parser: Parser, args: Namespace) -> None:
    """Ends the command with a sentence if the flags contradict each other or the model."""
    args.model = args.model or asked_for_model()
    if not args.model:
        parser.error(model_is_needed())
    if args.resume and args.system_prompt is not None:
        parser.error(
            "--resume continues a conversation that has its own system prompt: leave "
            "--system-prompt out"
        )
    flags.check_draft_flags(parser, args)
    flags.check_before_loading(args)


@command
def main() -> None:
    """Entry point."""
    parser = make_parser()
    args = parser.parse_args()
    _check_arguments(parser, args)
    # mlx-lm takes a second to import: mistakes and --help do without.
    from .chatting.conversation import FILES
    from .chatting.session import COMMANDS, WITH_FILES
    from .common.terminal import Terminal
    from .loading.trials import trials_said

    terminal = Terminal([*COMMANDS], WITH_FILES, FILES.expanduser() / "history")
    with trials_said(terminal.say):
        _chat(args, terminal)


def _chat(args: Namespace, terminal: Any) -> None:
    """Loads the model, and chats until the user leaves."""
    import mlx.core as mx

    from .chatting.conversation import Conversation, last_conversation
    from .chatting.session import NO_FLASH_HEAD, ChatSession
    from .loading.builds import build_beside
    from .loading.drafts import DraftOptions
    from .loading.head_options import LATER, HeadOptions
    from .loading.load import load_with_head
    from .models.fetch import resolve
    from .models.install import get_flash_head

    resumed = []
    if args.resume:
        resumed = last_conversation()
    choices = HeadOptions.from_flags(args, dense=args.dense)
    drafting = DraftOptions(args.draft_model, args.mtp, args.draft_probes)
    drafting.check(args.model)
    folder = resolve(args.model)
    if terminal.interactive:
        terminal.say(f"Loading {args.model} …")
    model, tokenizer, _ = load_with_head(
        folder,
        choices,
        adapter_path=args.adapter_path,
        tokenizer_config={"trust_remote_code": args.trust_remote_code},
        trust_remote_code=args.trust_remote_code,
    )
    if args.n_probes and (args.dense or args.no_build) and get_flash_head(model) is None:
        raise ValueError(NO_FLASH_HEAD)
    draft_model = drafting.load(model, folder, choices, trust_remote_code=args.trust_remote_code)
    mx.random.seed(args.seed)
    conversation = Conversation(
        model,
        tokenizer,
        system_prompt=args.system_prompt,
        max_kv_size=args.max_kv_size,
        draft_model=draft_model,
    )
    if resumed:
        conversation.replace(resumed)
    lines: list[str] = []
    build = None
    if choices.missing == LATER:
        build = build_beside(model, tokenizer, folder, replace(choices, tell=lines.append))
    try:
        with ctrl_c_raises():
            options = _answer_options(args, tokenizer)
            ChatSession(conversation, terminal, args, options, build, lines).run()
    finally:
        if build is not None:
            # What it has computed is kept.
            build.leave()


def _answer_options(args: Namespace, tokenizer: Any) -> dict[str, Any]:
    """The keywords of each answer: its length, its sampler, and how it is verified."""
    from .decoding.sampling import make_sampler

    ends = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        args.top_k,
        args.xtc_probability,
        args.xtc_threshold,
        ends,
    )
    return {
        "max_tokens": args.max_tokens,
        "prefill_step_size": args.prefill_step_size,
        "verify": not args.no_verify,
        "max_wait": args.max_wait,
        "lookup": args.lookup,
        "num_draft_tokens": args.num_draft_tokens,
        "sampler": sampler,
    }


if __name__ == "__main__":
    main()
