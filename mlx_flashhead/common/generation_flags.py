"""The flags of mlx-lm's ``generate`` and ``chat``, with limits: the values that both refuse are the
same. mlx-lm's own parsers would take a second to import, and its ``chat`` has flags that a model
with a FlashHead refuses."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from .arguments import json_object_text, number, one_of, share, whole_number


def add_model_flags(parser: Any) -> None:
    """Adds the flags that choose a model."""
    add = parser.add_argument
    add("--model", help="Folder or Hugging Face repository of any model that mlx-lm loads.")
    add("--trust-remote-code", action="store_true", help="Run Python code of the model's own.")
    add("--adapter-path", help="LoRA adapters of the model's body.")


def add_answer_flags(parser: Any, *, max_tokens: int, seed: int | None) -> None:
    """Adds the flags of an answer: its length, its sampling, and how the prompt is read."""
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--system-prompt", help="System prompt for the chat template.")
    add(
        "--max-tokens",
        "-m",
        type=whole_number(1, or_no_limit=True),
        default=max_tokens,
        help=f"Longest answer, or -1 for no limit {default}.",
    )
    add("--temp", type=number(0), default=0.0, help="Temperature; 0 is greedy (default: 0).")
    add("--top-p", type=share, default=1.0, help="Top-p sampling; 1 is off (default: 1).")
    add("--min-p", type=share, default=0.0, help="Min-p sampling; 0 is off (default: 0).")
    add("--top-k", type=whole_number(0), default=0, help="Top-k sampling; 0 is off (default: 0).")
    add(
        "--min-tokens-to-keep",
        type=whole_number(1),
        default=1,
        help="Fewest tokens that min-p keeps (default: 1).",
    )
    add("--xtc-probability", type=share, default=0.0, help="How often XTC is used (default: 0).")
    add(
        "--xtc-threshold",
        type=number(0, 0.5),
        default=0.0,
        help="Probability above which XTC removes all tokens but the last (default: 0).",
    )
    add("--seed", type=whole_number(0), default=seed, help="The same seed draws the same text.")
    add(
        "--max-kv-size",
        type=whole_number(1),
        help="Tokens that the cache keeps: the first four and the newest (default: all).",
    )
    add(
        "--prefill-step-size",
        type=whole_number(1),
        default=2048,
        help=f"Tokens of the prompt that are read at a time {default}.",
    )
    add(
        "--max-wait",
        type=share,
        metavar="SECONDS",
        help="Longest time that tokens wait for their verification, 0 to 1 (default: 0.1).",
    )


def add_prompt_flags(parser: Any) -> None:
    """Adds the other flags of ``mlx_lm.generate``."""
    add = parser.add_argument
    add("--prompt", "-p", default="hello", help='Text to answer; "-" reads standard input.')
    add("--prefill-response", help="Beginning of the answer, for the chat template.")
    add("--image", nargs="+", default=(), help="Images for the prompt's placeholders, in order.")
    add("--extra-eos-token", nargs="+", default=(), help="More tokens that end the answer.")
    add("--ignore-chat-template", action="store_true", help="Give the model the prompt as it is.")
    add("--use-default-chat-template", action="store_true", help="Use the default chat template.")
    add("--chat-template-config", type=json_object_text, help="A JSON object for the template.")
    add(
        "--verbose",
        type=lambda word: word.lower() not in ("false", "f"),
        default=True,
        help="F prints the answer alone.",
    )
    add("--prompt-cache-file", help="File of mlx_lm.cache_prompt, whose prompt goes before.")
    add("--quantize-activations", "-qa", action="store_true", help="Quantize activations, too.")
    add("--kv-bits", type=one_of(2, 3, 4, 5, 6, 8), help="Bits of the cache (default: as it is).")
    add("--kv-group-size", type=one_of(32, 64, 128), default=64, help="Group size of these bits.")
    add("--quantized-kv-start", type=whole_number(0), default=5000, help="First token of theirs.")
    add("--draft-model", help="A smaller model that drafts, with its FlashHead if it has one.")
    add(
        "--num-draft-tokens",
        type=whole_number(1),
        default=3,
        help="Tokens that are drafted at a time (default: %(default)s).",
    )


def check_before_loading(args: Namespace) -> None:
    """Refuses what the model's configuration already excludes, if its folder is here.

    Raises:
        ValueError: For images of a text model, or for more clusters than the model has tokens.
    """
    try:
        config = json.loads((Path(args.model or "").expanduser() / "config.json").read_bytes())
        vocab_size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return  # loading says what is wrong
    if getattr(args, "image", ()) and not config.get("vision_config"):
        raise ValueError(f"{args.model} is a text model: leave --image out.")
    if args.n_probes and isinstance(vocab_size, int) and args.n_probes > vocab_size:
        raise ValueError(
            f"--n-probes is {args.n_probes:,}: {args.model} has {vocab_size:,} tokens, and fewer "
            "clusters."
        )
