"""Hidden states to fit on, recorded where they enter the head.

By default the model writes its own text, so no data is needed: answers to varied requests through
its chat template, continuations of the first words of varied texts, and of single random tokens. A
text can be given instead.

On SmolLM2-135M the first words took perplexity on unseen text from 1.19 to 1.17 times dense at 256
probes, and covered 0.3 points more of it.
"""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..models.compat.generate import BatchGenerator
from ..models.locate import HeadLocation, recorded_hidden
from ..models.sampling import make_sampler

SEQUENCE_TOKENS = 128
BATCH_SIZE = 32
WINDOW_TOKENS = 1024

SUBJECTS = (
    "the history of bridges", "a walk in the rain", "sorting a list in Python", "baking bread",
    "how vaccines work", "a detective in a small town", "learning the violin", "black holes",
    "a shell script that renames files", "the French Revolution", "training for a marathon",
    "an SQL query over orders", "a letter to an old friend", "photosynthesis", "negotiating a rent",
    "the rules of chess", "a REST API in JavaScript", "growing tomatoes", "compound interest",
    "a dragon who is afraid of heights", "unit tests in C", "the water cycle", "a job interview",
    "Italian cooking", "how a compiler works", "the moons of Jupiter", "a poem about winter",
    "travelling by night train", "linear algebra", "a cover letter for a nurse", "recycling",
    "regular expressions", "jazz and its origins", "first aid for burns", "a bank's terms of use",
    "the human heart", "climate and oceans", "a product description of a lamp", "HTML tables",
    "parenting a teenager", "probability and dice", "ancient Egypt", "a conversation at a market",
)  # fmt: skip
REQUESTS = (
    "Write a short story about {}.", "Explain {} to a beginner.", "Give me five facts about {}.",
    "What are common mistakes with {}?", "Write a dialogue about {}.", "Summarise {} in a table.",
    "Show me a worked example of {}.", "List the steps to get started with {}.",
    "Why does {} matter?", "Translate a sentence about {} into Spanish and French.",
)  # fmt: skip

BEGINNINGS = (
    "The old house at the end of the lane had", "In the spring of 1848,", "She opened the letter",
    "The committee announced on Tuesday that", "To install the package, run",
    "import numpy as np\n", "def merge_intervals(intervals):\n", "#include <stdio.h>\n\nint main",
    "SELECT name, COUNT(*)", "# Getting started\n\n", "The results of the experiment show that",
    "Dear Mr. Harrison,\n\n", "He had never believed in ghosts, but", "The river rises in",
    "In mathematics, a group is", "The recipe serves four. First,",
    '"Where have you been?" she asked.', "Once upon a time", "function debounce(fn, delay) {\n",
    "The function returns", "According to the report,", "The species is native to",
    "Chapter 1\n\n", "My grandmother used to say that", "Error: could not",
    "If you want to change the default settings,", "The treaty was signed in",
    "Abstract: We propose", "#!/bin/bash\n\nset -e\n", "class Node:\n    def __init__(self",
    "Question: ", "Ingredients:\n- ", "The film tells the story of", "Returns:\n    ",
    "Warning: this option", "On the other hand,", "It was a cold morning, and the",
    "The first thing you notice about", "Prices rose last month", "The album was released in",
    "We walked along the shore until", "In this tutorial we will", "The patient should",
    "A good teacher", "His father, a carpenter,", "The engine uses a", "The castle was built",
    "for (int i = 0; i <", "<!DOCTYPE html>\n<html>", "The city council voted",
    "Nobody knew why the", "Thank you for your message.", "The main advantage of", "Usage: ",
    "public class Account {\n", "Suppose that we have", "The war ended in",
    "I remember the summer", "Water boils at", "The garden was full of",
)  # fmt: skip


def generated_states(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    positions: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of text that the model writes itself, in batches.

    Args:
        model: A dense mlx-lm model.
        tokenizer: Its tokenizer.
        location: Its head.
        positions: How many states.
        seed: Seed of the prompts and of the sampling.
        temperature: Of the sampling.
        progress: Show a bar.

    Returns:
        States (positions, D) float32 in the order of generation, and the tokens drawn from them
        (positions,) int64.
    """
    mx.random.seed(seed)
    vocab_size = location.rows().n_rows
    prompts = _prompts(tokenizer, vocab_size, np.random.default_rng(seed))
    draw = make_sampler(temp=temperature)
    steps: list[tuple[mx.array, mx.array]] = []
    states: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    count = 0
    with (
        recorded_hidden(location) as recorded,
        tqdm(total=positions, desc="Calibrating", unit="token", disable=not progress) as bar,
    ):

        def sampler(logprobs):
            # prompts are padded to one length, so only what is sampled from is a real state
            tokens = draw(logprobs)
            steps.append((recorded[-1][:, -1].astype(mx.float32), tokens))
            recorded.clear()
            return tokens

        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in tokenizer.eos_token_ids],
            sampler=sampler,
            completion_batch_size=BATCH_SIZE,
        )
        missing = min(BATCH_SIZE, -(-positions // SEQUENCE_TOKENS))
        while count < positions:
            if missing:
                # by length, since prompts that are read together are padded to the longest
                fresh = sorted((next(prompts) for _ in range(missing)), key=len)
                generator.insert(fresh, [SEQUENCE_TOKENS] * missing)
            responses = generator.next_generated()
            missing = sum(response.finish_reason is not None for response in responses)
            for hidden, tokens in steps:
                states.append(np.array(hidden))
                drawn.append(np.array(tokens, dtype=np.int64))
                bar.update(min(len(hidden), positions - count))
                count += len(hidden)
            steps.clear()
        generator.close()
    return np.concatenate(states)[:positions], np.concatenate(drawn)[:positions]


def text_states(
    model: nn.Module,
    tokenizer,
    location: HeadLocation,
    text: str,
    *,
    positions: int | None = None,
    description: str = "Reading",
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of a text, in windows of 1,024 tokens that each start afresh.

    Where the tokenizer begins a text with a token of its own (BOS), each window begins with it.

    Args:
        model: A dense or FlashHead model.
        tokenizer: Its tokenizer.
        location: Its head.
        text: The text; special tokens in it, such as chat markup, are understood.
        positions: How many states at most; None: all.
        description: What the bar says.
        progress: Show a bar.

    Returns:
        States (N, D) float32 and the true next tokens (N,) int64.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    token_ids = np.array(tokenizer.encode(text), dtype=np.int64)
    if positions is not None:
        token_ids = token_ids[: positions + 1]
    if len(token_ids) < 2:
        raise ValueError("The text is too short to measure anything on: give one of some pages.")
    bos = tokenizer.bos_token_id
    beginning = [bos] if bos is not None and bos in tokenizer.encode("") else []
    collected = []
    with (
        recorded_hidden(location) as recorded,
        tqdm(total=len(token_ids) - 1, desc=description, unit="token", disable=not progress) as bar,
    ):
        for start in range(0, len(token_ids) - 1, WINDOW_TOKENS):
            window = token_ids[start : min(start + WINDOW_TOKENS, len(token_ids) - 1)]
            further = beginning if start else []  # the first window has it
            model(mx.array([[*further, *window.tolist()]]))
            # only the states are evaluated: the logits of the window are never made
            collected.append(np.array(recorded[-1][0, len(further) :].astype(mx.float32)))
            recorded.clear()
            bar.update(len(window))
    return np.concatenate(collected), token_ids[1:]


def read_text(path: str | Path) -> str:
    """A calibration or evaluation text.

    Raises:
        ValueError: If the file cannot be read, is not UTF-8 text, or is empty.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give a plain text file.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: give a text of some pages.")
    return text


def _prompts(tokenizer, vocab_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Chat requests, beginnings of texts and single random tokens in turn, without end."""
    special = set(tokenizer.all_special_ids)
    beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    while True:
        request = REQUESTS[rng.integers(len(REQUESTS))].format(
            SUBJECTS[rng.integers(len(SUBJECTS))]
        )
        if tokenizer.has_chat_template:
            messages = [{"role": "user", "content": request}]
            yield list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        else:
            yield list(tokenizer.encode(request))
        yield list(tokenizer.encode(BEGINNINGS[rng.integers(len(BEGINNINGS))]))
        token = int(rng.integers(min(vocab_size, len(tokenizer))))
        while token in special:
            token = int(rng.integers(min(vocab_size, len(tokenizer))))
        yield [*beginning, token]
