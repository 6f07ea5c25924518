"""A model under ``run`` in this process, and mlx-lm's own loops beside it."""

import importlib

import mlx.core as mx
import mlx_lm

from mlx_flashhead.loading import programs
from mlx_flashhead.loading.head_options import HeadOptions

generate = importlib.import_module("mlx_lm.generate")
# Where mlx-lm's loops look make_prompt_cache up: a later version has it in another module.
CACHES = generate
if not hasattr(generate, "make_prompt_cache"):
    CACHES = mlx_lm.models.cache
N_TOKENS = 12
# mlx-lm's own, before anything takes their places.
OWN = {
    name: getattr(generate, name)
    for name in ("BatchGenerator", "generate_step", "GenerationBatch", "PromptProcessingBatch")
}


class Under:
    """A model under ``run``, and what was said of it."""

    def __init__(self, folder):
        self.said = []
        options = HeadOptions(flash_head=str(folder / "head"), always=True, check=False)
        object.__setattr__(options, "say", self.said.append)
        self.patches = programs.Patches(options)
        self.model, self.tokenizer = mlx_lm.load(str(folder / "model"))
        self.patches.models.attach(self.model, lambda: self.tokenizer, folder / "model")
        self.batch_generator = self.patches.loops.batches(OWN["BatchGenerator"])
        self.steps = self.patches.loops.loop(self.patches.loops.text_loop, OWN["generate_step"])
        self.said.clear()

    def lines(self):
        """What was said of texts."""
        return [line.removeprefix("Text of ") for line in self.said]


def texts(batches, prompts, **options):
    """The tokens of prompts in a batch, as a program that keeps to its public face."""
    uids = batches.insert(prompts, [N_TOKENS] * len(prompts), **options)
    found = {uid: [] for uid in uids}
    responses = batches.next_generated()
    while responses:
        for response in responses:
            found[response.uid].append(response.token)
        responses = batches.next_generated()
    return list(found.values())


def steps_of(loop, model, prompt, **options):
    return [int(token) for token, _ in loop(mx.array(prompt), model, max_tokens=8, **options)]


def fails(*_, **__):
    raise RuntimeError("[metal] out of memory\nand more")
