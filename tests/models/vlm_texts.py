"""Texts by mlx-vlm: of one prompt, and of many at once with the face of mlx-lm's generator."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.utils import StoppingCriteria

from mlx_flashhead.models.vlm import embeddings


def write_together(
    model: Any, prompts: list[list[int]], max_tokens: int, **options: Any
) -> list[list[int]]:
    """The greedy texts after prompts, from token ids alone; 299 ends one."""
    # a stand-in, since the generator adds to the stop tokens of its tokenizer
    tokenizer = SimpleNamespace(stopping_criteria=StoppingCriteria([299]))
    options = {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)} | options
    generator = BatchGenerator(model.language_model, tokenizer, **options)
    given = [embeddings(model, mx.array([prompt])) for prompt in prompts]
    generator.insert(prompts, [max_tokens] * len(prompts), prompt_kwargs=given)
    texts: dict[int, list[int]] = {}
    while generator.has_work:
        for response in generator.next()[1]:
            texts.setdefault(response.uid, []).append(response.token)
    generator.close()
    return list(texts.values())


def write_alone(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """The greedy text after a prompt, by mlx-vlm's loop of one text."""
    steps = generate_step(mx.array([prompt]), model, None, None, max_tokens=max_tokens, **options)
    return [int(token) for token, _ in steps]
