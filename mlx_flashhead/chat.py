"""Chats with a model and its FlashHead: the flags of ``mlx_lm.chat`` and some more."""

from .common import flags
from .common.arguments import Parser
from .common.command import command


def make_parser() -> Parser:
    parser = Parser(prog="mlx_flashhead.chat", description="Chat with a model and its FlashHead.")
    flags.add_model_flags(parser)
    flags.add_answer_flags(parser, max_tokens=256, seed=0)
    resume = "Continue the last conversation at a terminal."
    parser.add_argument("--resume", action="store_true", help=resume)
    group = parser.add_argument_group("FlashHead")
    flags.add_answering_options(group)
    dense = "Begin with the normal (dense) head."
    group.add_argument("--dense", action="store_true", help=dense)
    return parser


@command
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if not args.model:
        parser.error("--model is needed: give a folder or a repository of a model")
    if args.resume and args.system_prompt is not None:
        reason = "--resume continues a conversation that has its own system prompt"
        parser.error(f"{reason}: leave --system-prompt out")
    flags.check_before_loading(args)
    # mlx-lm takes a second to import, which mistakes and --help do without
    import mlx.core as mx

    from .chatting.conversation import FILES, Conversation, last_conversation
    from .chatting.session import COMMANDS, NO_FLASH_HEAD, WITH_FILES, ChatSession
    from .common.terminal import Terminal
    from .decoding.sampler import make_sampler
    from .loading.background import IdleBuild, background_build
    from .loading.head_options import LATER, HeadOptions
    from .loading.load import load_with_head
    from .models.fetch import resolve
    from .models.install import get_flash_head

    resumed = last_conversation() if args.resume else []
    how = HeadOptions.from_flags(args, dense=args.dense)
    folder, trusts = resolve(args.model), {"trust_remote_code": args.trust_remote_code}
    model, tokenizer, _ = load_with_head(
        folder, how, adapter_path=args.adapter_path, tokenizer_config=trusts, **trusts
    )
    if args.n_probes and (args.dense or args.no_build) and get_flash_head(model) is None:
        raise ValueError(NO_FLASH_HEAD)
    mx.random.seed(args.seed)
    conversation = Conversation(
        model, tokenizer, system_prompt=args.system_prompt, max_kv_size=args.max_kv_size
    )
    if resumed:
        conversation.replace(resumed)
    drawing = (args.temp, args.top_p, args.min_p, args.min_tokens_to_keep, args.top_k)
    ends = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    options = {
        "max_tokens": args.max_tokens,
        "prefill_step_size": args.prefill_step_size,
        "verify": not args.no_verify,
        "max_wait": args.max_wait,
        "sampler": make_sampler(*drawing, args.xtc_probability, args.xtc_threshold, ends),
    }
    terminal = Terminal([*COMMANDS], WITH_FILES, FILES.expanduser() / "history")
    build = background_build(model, tokenizer, folder, how) if how.missing == LATER else None
    idle = IdleBuild(build) if build else None
    try:
        ChatSession(conversation, terminal, args, options, idle).run()
    finally:
        if idle:
            idle.close()


if __name__ == "__main__":
    main()
