"""Requests for the answers that a model writes for its calibration."""

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
