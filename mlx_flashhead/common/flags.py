"""Flags of several commands: those of mlx-lm's ``generate`` and ``chat``, whose own parsers would
take a second to import, and FlashHead's."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from .arguments import Type, json_object, number, one_of, share, whole_number


def add_model_flags(parser: Any) -> None:
    add = parser.add_argument
    add("--model", help="Folder or Hugging Face repository of any model that mlx-lm loads.")
    add("--trust-remote-code", action="store_true", help="Run Python code of the model's own.")
    add("--adapter-path", help="LoRA adapters of the model's body.")


def add_answer_flags(parser: Any, *, max_tokens: int, seed: int | None) -> None:
    """Adds the flags of an answer: its length, its sampling, and how the prompt is read."""

    def add(flag: str, type: Type, default: Any, text: str) -> None:
        parser.add_argument(flag, type=type, default=default, help=text)

    longest = "Longest answer, or -1 for no limit (default: %(default)s)."
    tokens = whole_number(1, or_no_limit=True)
    at_least_1 = whole_number(1)
    parser.add_argument("--system-prompt", help="System prompt for the chat template.")
    parser.add_argument("--max-tokens", "-m", type=tokens, default=max_tokens, help=longest)
    add("--temp", number(0), 0.0, "Temperature; 0 is greedy (default: 0).")
    add("--top-p", share, 1.0, "Top-p sampling; 1 is off (default: 1).")
    add("--min-p", share, 0.0, "Min-p sampling; 0 is off (default: 0).")
    add("--top-k", whole_number(0), 0, "Top-k sampling; 0 is off (default: 0).")
    add("--min-tokens-to-keep", at_least_1, 1, "Fewest tokens that min-p keeps (default: 1).")
    add("--xtc-probability", share, 0.0, "How often XTC is used (default: 0).")
    add("--xtc-threshold", number(0, 0.5), 0.0, "XTC removes tokens above it but one (default: 0).")
    add("--seed", whole_number(0), seed, "The same seed draws the same text.")
    add("--max-kv-size", at_least_1, None, "Tokens that the cache keeps (default: all).")
    add("--prefill-step-size", at_least_1, 2048, "Prompt tokens read at a time (default: 2048).")
    wait = "Longest time that tokens wait for their verification, 0 to 1 (default: 0.1)."
    parser.add_argument("--max-wait", type=share, metavar="SECONDS", help=wait)


def add_prompt_flags(parser: Any) -> None:
    """Adds the other flags of ``mlx_lm.generate``."""

    def is_true(word: str) -> bool:
        return word.lower() not in ("false", "f")

    def json_text(text: str) -> str:
        return json.dumps(json_object(text))

    add = parser.add_argument
    add("--prompt", "-p", default="hello", help='Text to answer; "-" reads standard input.')
    add("--prefill-response", help="Beginning of the answer, for the chat template.")
    add("--image", nargs="+", default=(), help="Images for the prompt's placeholders, in order.")
    add("--extra-eos-token", nargs="+", default=(), help="More tokens that end the answer.")
    add("--ignore-chat-template", action="store_true", help="Give the model the prompt as it is.")
    add("--use-default-chat-template", action="store_true", help="Use the default chat template.")
    add("--chat-template-config", type=json_text, help="A JSON object for the template.")
    add("--verbose", type=is_true, default=True, help="F prints the answer alone.")
    add("--prompt-cache-file", help="File of mlx_lm.cache_prompt, whose prompt goes before.")
    add("--quantize-activations", "-qa", action="store_true", help="Quantize activations, too.")
    add("--kv-bits", type=one_of(2, 3, 4, 5, 6, 8), help="Bits of the cache (default: as it is).")
    add("--kv-group-size", type=one_of(32, 64, 128), default=64, help="Group size of these bits.")
    add("--quantized-kv-start", type=whole_number(0), default=5000, help="First token of theirs.")
    add("--draft-model", help="A smaller model that drafts, with its FlashHead if it has one.")
    drafts = "Tokens that are drafted at a time (default: %(default)s)."
    add("--num-draft-tokens", type=whole_number(1), default=3, help=drafts)


def add_source_options(group: Any, no_build: str | None = None) -> None:
    source = "The FlashHead (default: the model folder's, else one built before, else a new one)."
    group.add_argument("--flash-head", metavar="FOLDER_OR_REPO", help=source)
    group.add_argument("--no-build", action="store_true", help=no_build or "Refuse to build one.")


def add_head_options(group: Any, no_build: str | None = None) -> None:
    """Adds the flags of a command that loads a model and builds a missing FlashHead first."""
    text = "Clusters scored per token (default: the number that is fastest on this machine)."
    group.add_argument("--n-probes", type=whole_number(1), help=text)
    add_source_options(group, no_build)
    finer = (
        "Give a quantized model the finer output head of its original: better text, at about the "
        "same speed. Only its rows are fetched, once. SOURCE is a repository, a folder or a "
        "safetensors file (default: the original that the model names)."
    )
    source: Any = {"nargs": "?", "const": True, "type": lambda text: text or True}
    group.add_argument("--fine-head", **source, metavar="SOURCE", help=finer)
    bits = "Bits of the finer head; 16 keeps the original's (default: 8)."
    group.add_argument("--head-bits", type=one_of(6, 8, 16), metavar="6|8|16", help=bits)


def add_always_option(group: Any) -> None:
    text = "Use the FlashHead even where it makes this model no faster on this machine."
    group.add_argument("--flash-head-always", action="store_true", help=text)


def add_answering_options(group: Any) -> None:
    """Adds the flags of a command that answers before a FlashHead is built."""
    add_head_options(group, "Build no FlashHead: without one, answer with the normal head.")
    first = "Build a missing FlashHead before the first answer (default: when there is time)."
    group.add_argument("--build-first", action="store_true", help=first)
    add_always_option(group)
    own = "Take FlashHead's choices (default: verify them, for the normal head's text)."
    group.add_argument("--no-verify", action="store_true", help=own)


def check_before_loading(args: Namespace) -> None:
    """Checks flags against the configuration of a model on this machine; ValueError for images of a
    text model, or for more clusters than it has tokens."""
    try:
        config = json.loads((Path(args.model or "").expanduser() / "config.json").read_bytes())
        vocab_size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return  # loading says what is wrong
    if getattr(args, "image", ()) and not config.get("vision_config"):
        raise ValueError(f"{args.model} is a text model: leave --image out.")
    if args.n_probes and isinstance(vocab_size, int) and args.n_probes > vocab_size:
        reason = f"{args.model} has {vocab_size:,} tokens, and fewer clusters"
        raise ValueError(f"--n-probes is {args.n_probes:,}: {reason}.")
