"""Prompts for the text that a model writes for its calibration."""

from collections.abc import Iterator

import numpy as np

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


def chat_prompts(tokenizer, rng: np.random.Generator) -> Iterator[list[int]]:
    """Requests through the chat template, or as they are without one, without end."""
    while True:
        request = REQUESTS[rng.integers(len(REQUESTS))].format(
            SUBJECTS[rng.integers(len(SUBJECTS))]
        )
        if tokenizer.has_chat_template:
            messages = [{"role": "user", "content": request}]
            yield list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        else:
            yield list(tokenizer.encode(request))


def varied_prompts(tokenizer, vocab_size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Chat requests, beginnings of texts and single random tokens in turn, without end."""
    special = set(tokenizer.all_special_ids)
    beginning = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    n_tokens = min(vocab_size, len(tokenizer))
    for request in chat_prompts(tokenizer, rng):
        yield request
        yield list(tokenizer.encode(BEGINNINGS[rng.integers(len(BEGINNINGS))]))
        token = int(rng.integers(n_tokens))
        while token in special:
            token = int(rng.integers(n_tokens))
        yield [*beginning, token]
