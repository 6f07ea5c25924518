"""Flags of several commands: those of mlx-lm's ``generate`` and ``chat``, and FlashHead's.

mlx-lm's own parsers would take a second to import.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import Type, json_object, number, one_of, share, true_or_false, whole_number

# Seconds, as decoding has it, whose module would import MLX.
MAX_WAIT = 0.3
# What stands above the flags of a FlashHead.
FLASH_HEAD = (
    "FlashHead scores the tokens of a few clusters in place of all tokens, and the normal head "
    "verifies its choices: the text stays the same."
)
# Where the number of clusters comes from if no flag names one.
OWN_PROBES = "Clusters scored per token (default: the FlashHead's own number)."


def add_model_flags(parser: Any) -> None:
    """Adds the model, its adapters, and whether its own code may run."""
    add = parser.add_argument
    add("--model", help="Folder or Hugging Face repository of any model that mlx-lm loads.")
    add("--trust-remote-code", action="store_true", help="Run the model's own Python code.")
    add("--adapter-path", help="Folder of LoRA adapters for the model's body.")


def add_answer_flags(parser: Any, *, max_tokens: int, seed: int | None) -> None:
    """Adds the flags of an answer: its length, its sampling, and how the prompt is read."""

    def add(flag: str, type: Type, default: Any, text: str) -> None:
        parser.add_argument(flag, type=type, default=default, help=text)

    parser.add_argument("--system-prompt", help="System prompt for the chat template.")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=whole_number(1, or_no_limit=True),
        default=max_tokens,
        help="Longest answer in tokens, or -1 for no limit (default: %(default)s).",
    )
    add("--temp", number(0), 0.0, "Temperature; 0 is greedy (default: %(default)s).")
    add(
        "--top-p",
        share,
        1.0,
        "Keep the likeliest tokens that together have this probability (top-p); 1 keeps all "
        "(default: %(default)s).",
    )
    add(
        "--min-p",
        share,
        0.0,
        "Keep tokens at least this likely relative to the best (min-p); 0 keeps all "
        "(default: %(default)s).",
    )
    add(
        "--top-k",
        whole_number(0),
        0,
        "Keep this many of the likeliest tokens (top-k); 0 keeps all (default: %(default)s).",
    )
    add(
        "--min-tokens-to-keep",
        whole_number(1),
        1,
        "Keep at least this many tokens with min-p (default: %(default)s).",
    )
    add("--xtc-probability", share, 0.0, "Chance that XTC applies (default: %(default)s).")
    add(
        "--xtc-threshold",
        number(0, 0.5),
        0.0,
        "Where XTC applies, it removes all tokens above this probability but the least likely one "
        "(default: %(default)s).",
    )
    usual_seed = "by chance"
    if seed is not None:
        usual_seed = str(seed)
    text = f"The same seed draws the same text (default: {usual_seed})."
    add("--seed", whole_number(0), seed, text)
    add("--max-kv-size", whole_number(1), None, "Most tokens that the cache keeps (default: all).")
    add(
        "--prefill-step-size",
        whole_number(1),
        2048,
        "Prompt tokens that are read at a time (default: %(default)s).",
    )
    parser.add_argument(
        "--max-wait",
        type=share,
        metavar="SECONDS",
        help="Longest time that a token waits for its verification, 0 to 1; 0 uses the normal head "
        f"(default: {MAX_WAIT:g}).",
    )
    add_lookup_flag(parser.add_argument)


def add_lookup_flag(add: Callable[..., Any]) -> None:
    """Adds whether the next tokens are looked up, by a parser's or a group's ``add_argument``."""
    add(
        "--lookup",
        type=one_of("auto", "on", "off"),
        default="auto",
        metavar="WHEN",
        help="Guess the next tokens from the prompt and the text, and compute several in a step, "
        "which leaves the text as it is: where that is faster (auto), wherever tokens are found "
        "(on), or off (default: %(default)s).",
    )


def add_prompt_flags(parser: Any) -> None:
    """Adds the other flags of ``mlx_lm.generate``."""

    def json_text(text: str) -> str:
        return json.dumps(json_object(text))

    add = parser.add_argument
    add(
        "--prompt",
        "-p",
        default="hello",
        help='Text to answer; "-" reads standard input (default: %(default)s).',
    )
    add("--prefill-response", help="Beginning of the answer, for the chat template.")
    add("--image", nargs="+", default=(), help="Images for the prompt's placeholders, in order.")
    add("--extra-eos-token", nargs="+", default=(), help="More tokens that end the answer.")
    add("--ignore-chat-template", action="store_true", help="Give the model the prompt as it is.")
    add(
        "--use-default-chat-template",
        action="store_true",
        help="Without effect, as in mlx_lm.generate: tokenizers no longer have a default template.",
    )
    add("--chat-template-config", type=json_text, help="A JSON object for the chat template.")
    add(
        "--verbose",
        type=true_or_false,
        default=True,
        metavar="T|F",
        help="F prints the answer alone (default: T).",
    )
    add(
        "--prompt-cache-file", help="A file that mlx_lm.cache_prompt wrote; its prompt comes first."
    )
    add("--quantize-activations", "-qa", action="store_true", help="Quantize activations, too.")
    add_cache_flags(add, "Bits of a quantized cache (default: the cache is not quantized).")


def add_cache_flags(add: Callable[..., Any], bits_help: str) -> None:
    """Adds how a cache is quantized, by a parser's or a group's ``add_argument``.

    Args:
        add: That.
        bits_help: The help of ``--kv-bits``.
    """
    add("--kv-bits", type=one_of(2, 3, 4, 5, 6, 8), help=bits_help)
    add(
        "--kv-group-size",
        type=one_of(32, 64, 128),
        default=64,
        help="Group size of a quantized cache (default: %(default)s).",
    )
    add(
        "--quantized-kv-start",
        type=whole_number(0),
        default=5000,
        help="First token whose cache is quantized (default: %(default)s).",
    )


def add_draft_flags(add: Callable[..., Any], most: float = math.inf) -> None:
    """Adds what drafts the next tokens, by a parser's or a group's ``add_argument``.

    Args:
        add: That.
        most: The largest number of drafts at a time that a user may choose.
    """
    add(
        "--draft-model",
        metavar="FOLDER_OR_REPO",
        help="Guess the next tokens by this, which leaves the text as it is: a smaller model, an "
        "MTP layer, or an assistant of Gemma 4.",
    )
    _add_source(
        add,
        "--mtp",
        "Guess the next tokens by the model's own MTP layer, which leaves the text as it is: "
        "from its folder, else from its original, of which no more is fetched, once. SOURCE is a "
        "repository or a folder (without a value: the original that the model names).",
    )
    add(
        "--num-draft-tokens",
        type=whole_number(1, most),
        default=3,
        help="Most tokens that are guessed at a time (default: %(default)s).",
    )


def _add_source(add: Callable[..., Any], flag: str, text: str) -> None:
    """Adds a flag with a source, which is True if the flag has no value."""
    add(
        flag,
        nargs="?",
        const=True,
        type=lambda source: source or True,
        metavar="SOURCE",
        help=text,
    )


def add_draft_probes(add: Callable[..., Any]) -> None:
    """Adds how a smaller model's FlashHead drafts."""
    add(
        "--draft-probes",
        type=whole_number(1),
        help="Clusters scored for each token that a smaller model drafts (default: a tenth of its "
        "head, in bytes).",
    )


def check_draft_flags(parser: Any, args: Namespace) -> None:
    """Ends the command with a sentence if the flags of :func:`add_draft_flags` do not agree."""
    if args.mtp and args.draft_model is not None:
        parser.error("--mtp and --draft-model both guess the next tokens: give one of them")
    if getattr(args, "draft_probes", None) is not None and args.draft_model is None:
        parser.error("--draft-probes is for a draft model: add --draft-model, or leave it out")
    guesses = bool(args.mtp) or args.draft_model is not None
    for name in ("no_verify", "draw_probes"):
        if guesses and getattr(args, name, False):
            flag = name.replace("_", "-")
            parser.error(f"--{flag} verifies no guesses: leave --draft-model and --mtp out")


def add_source_options(group: Any, no_build: str | None = None) -> None:
    """Adds the flags that say which FlashHead is used, and whether one may be built."""
    group.add_argument(
        "--flash-head",
        metavar="FOLDER_OR_REPO",
        help="The FlashHead (default: the one in the model's folder, else one built before, else a "
        "new one).",
    )
    group.add_argument("--no-build", action="store_true", help=no_build or "Refuse to build one.")


def add_head_options(group: Any, no_build: str | None = None, *, probes: str = OWN_PROBES) -> None:
    """Adds the flags of a command that loads a model and builds a missing FlashHead first.

    Args:
        group: A parser, or a group of its flags.
        no_build: The help of ``--no-build``, if it does not refuse to build one.
        probes: The help of ``--n-probes``.
    """
    group.add_argument("--n-probes", type=whole_number(1), help=probes)
    add_source_options(group, no_build)
    _add_source(
        group.add_argument,
        "--fine-head",
        "Give a quantized model the finer output head of its original: better text, at about "
        "the same speed. Only its rows are fetched, once. SOURCE is a repository, a folder or a "
        "safetensors file (without a value: the original that the model names).",
    )
    group.add_argument(
        "--head-bits",
        type=one_of(6, 8, 16),
        metavar="6|8|16",
        help="Bits of the finer head; 16 keeps the original's (default: 8).",
    )


def add_always_option(group: Any) -> None:
    """Adds the flag that overrides what was measured."""
    text = "Use the FlashHead even where it makes this model no faster on this machine."
    group.add_argument("--flash-head-always", action="store_true", help=text)


def add_answering_options(group: Any) -> None:
    """Adds the flags of a command that answers before a FlashHead is built."""
    add_head_options(group, "Build no FlashHead: without one, answer with the normal head.")
    group.add_argument(
        "--build-first",
        action="store_true",
        help="Build a missing FlashHead before the first answer (default: when there is time).",
    )
    add_always_option(group)
    group.add_argument(
        "--no-verify",
        action="store_true",
        help="Take FlashHead's own choices (default: verify them, for the normal head's text).",
    )


def check_before_loading(args: Namespace) -> None:
    """Checks flags against the configuration of a model on this machine.

    Raises:
        ValueError: For images of a text model, or for more clusters than the model has tokens.
    """
    try:
        config = json.loads((Path(args.model or "").expanduser() / "config.json").read_bytes())
        text_config = config.get("text_config", {})
        vocab_size = config.get("vocab_size", text_config.get("vocab_size"))
    except (OSError, ValueError, AttributeError, RecursionError):
        # Loading says what is wrong.
        return
    if getattr(args, "image", ()) and not config.get("vision_config"):
        raise ValueError(f"{args.model} is a text model: leave --image out.")
    if args.n_probes and isinstance(vocab_size, int) and args.n_probes > vocab_size:
        raise ValueError(
            f"--n-probes is {args.n_probes:,}, but {args.model} has {vocab_size:,} tokens in "
            f"clusters, usually of 16: give at most {-(-vocab_size // 16):,}."
        )
