"""What ``verbose`` prints of a text and of a batch, in the words of mlx-lm's functions."""

from collections.abc import Callable, Iterable
from typing import Protocol

RULE = "=" * 10


class Statistics(Protocol):
    """The numbers of tokens and the speeds of a text, or of a batch.

    Attributes:
        prompt_tokens: Tokens of the prompts.
        prompt_tps: Of these, tokens per second.
        generation_tokens: Tokens of the texts.
        generation_tps: Of these, tokens per second.
        peak_memory: The most memory at once, in gigabytes.
    """

    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float


class TextResponse(Statistics, Protocol):
    """A token of a text, with what is known of the text so far.

    Attributes:
        text: What the token adds to the text.
    """

    text: str


def print_text(
    responses: Iterable[TextResponse], more_lines: Callable[[TextResponse], Iterable[str]]
) -> str:
    """Prints a text as it goes, then its speed.

    Args:
        responses: The tokens of the text.
        more_lines: Makes the lines below the speed, of the last token.

    Returns:
        The text.
    """
    print(RULE)
    text = ""
    for response in responses:
        print(response.text, end="", flush=True)
        text += response.text
    print()
    print(RULE)
    if not text:
        print("No text generated for this prompt")
        return text
    print_statistics(response)
    for line in more_lines(response):
        print(line)
    return text


def print_finished(n_finished: int, n_prompts: int, *, is_last: bool = False) -> None:
    """Prints how many texts of a batch are complete, in place of what was printed before.

    Args:
        n_finished: Texts that are complete.
        n_prompts: All texts.
        is_last: Whether what comes next is printed below it.
    """
    progress = f"[batch_generate] Finished processing {n_finished}/{n_prompts}"
    if is_last:
        print(progress)
    else:
        print(progress, end=" ...\r")


def print_statistics(of: Statistics, prefix: str = "") -> None:
    """Prints the numbers of tokens, the speeds and the memory in three lines.

    Args:
        of: A text, or a batch.
        prefix: Begins each line.
    """
    print(f"{prefix}Prompt: {of.prompt_tokens} tokens, {of.prompt_tps:.3f} tokens-per-sec")
    print(
        f"{prefix}Generation: {of.generation_tokens} tokens, {of.generation_tps:.3f} tokens-per-sec"
    )
    print(f"{prefix}Peak memory: {of.peak_memory:.3f} GB")
