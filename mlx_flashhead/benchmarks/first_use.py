"""The first use of a model: the time to its first token by stage, and that of the second use."""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from ..loading.cache import HOME_VARIABLE
from ..loading.load import load
from ..lossless.generation import stream_generate
from ..models.install import installed_head
from .conversion import INDEX_STAGES, TOTAL, stage_times

START, FIRST_TOKEN = "start of Python", "first token"
STAGES = (
    ("loading", "loading.load", "load_dense"),
    *INDEX_STAGES,
    ("writing", "loading.cache", "write_companion"),
    ("installing", "loading.attach", "install_index"),
    (FIRST_TOKEN, "benchmarks.first_use", "answer"),
)


def first_use_benchmark(model: str, *, prompt: str = "Why is the sky blue?") -> dict:
    """Uses a model twice, in two processes, with a separate place for the built FlashHead.

    Args:
        model: A folder or repository without a FlashHead.
        prompt: The prompt.

    Returns:
        Seconds by stage of both uses, and the built FlashHead, JSON-ready.
    """
    with tempfile.TemporaryDirectory() as home:
        first, second = (_alone(model, prompt, home) for _ in range(2))
    return {"model": Path(model).name} | first | {"again": second["seconds"]}


def _alone(model: str, prompt: str, home: str) -> dict:
    start = time.perf_counter()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(_use, model, prompt, home).result()
    total = time.perf_counter() - start
    inside = found["seconds"].pop(TOTAL)
    found["seconds"] = {START: total - inside} | found["seconds"] | {TOTAL: total}
    return found


def _use(model: str, prompt: str, home: str) -> dict:
    os.environ[HOME_VARIABLE] = home
    with stage_times(STAGES) as seconds:
        loaded, tokenizer = load(model)
        answer(loaded, tokenizer, prompt)
    head = installed_head(loaded)
    return {"seconds": seconds, "n_probes": head.n_probes, "n_clusters": head.n_clusters}


def answer(model, tokenizer, prompt: str) -> str:
    """The first piece of text of the answer to a prompt, through the chat template if there is one.

    A function of its own, so that its time can be measured.
    """
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return next(stream_generate(model, tokenizer, prompt, max_tokens=1)).text
