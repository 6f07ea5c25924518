"""Evaluates a model by the tasks of lm-eval, through mlx-lm's own adapter to it.

Choices are scored by their log-likelihood under the dense head, since unlikely tokens need exact
logits too. Text is generated with FlashHead and its check. Perplexity is measured under the dense
head and under FlashHead's full logits, which hold estimates for the tokens that were not scored.
No other module needs lm-eval.
"""

import difflib
import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import mlx.core as mx
import mlx.nn as nn
from lm_eval.tasks import TaskManager

from ..lossless.generation import batch_generate
from ..lossless.sampler import make_sampler
from ..models.compat.evaluate import Adapter, chat_template_fn, module
from ..models.compat.patching import replaced
from ..models.install import installed_head

DENSE, FLASH_HEAD = "dense", "FlashHead"
GENERATED, ROLLING = "generate_until", "loglikelihood_rolling"


class TaskModel(Adapter):
    """mlx-lm's adapter, on a FlashHead model that is loaded already."""

    def __init__(
        self, model: nn.Module, tokenizer, *, chat_template_args: dict | None = None, **options: Any
    ):
        super().__init__(model, tokenizer, **options)
        self.head = installed_head(model)
        self.estimates = False  # whether documents are scored under FlashHead's full logits
        self._chat_template = chat_template_fn(**chat_template_args or {})

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        return self._chat_template(self, chat_history, add_generation_prompt)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        # the limit is for answers, but the adapter cuts questions to it too
        with self.head.dense(), replaced(self, _max_tokens=None):
            return super().loglikelihood(requests)

    def generate_until(self, requests) -> list[str]:
        with replaced(module, batch_generate=batch_generate):
            return super().generate_until(requests)

    def loglikelihood_rolling(self, requests) -> list[float]:
        if self.estimates:
            return super().loglikelihood_rolling(requests)
        with self.head.dense():
            return super().loglikelihood_rolling(requests)

    def _score_fn(self, inputs, cache=None, step_size=2048):
        if self.estimates:  # more positions at once are computed densely
            step_size = self.head.max_positions // len(inputs)
        return super()._score_fn(inputs, cache=cache, step_size=step_size)


def find_tasks(names: Sequence[str], folder: str | None = None) -> TaskManager:
    """The manager of the tasks of a folder, and of lm-eval's own tasks if they are needed."""
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: there is no such folder of tasks.")
        # lm-eval's own tasks take many seconds to list
        local = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f" (near it: {', '.join(near)})" if near else ""
            raise ValueError(
                f"There is no task {name!r}{hint}: `lm-eval ls tasks` lists lm-eval's own, and "
                "--include-path FOLDER adds yours."
            )
    return manager


def evaluate_tasks(
    model: nn.Module, tokenizer, names: Sequence[str], manager: TaskManager, args: Namespace
) -> list[dict]:
    """Measures ``model``, which has a FlashHead, by tasks that ``manager`` knows.

    ``args`` are the command's. Returns the metrics of the tasks and groups, by lm-eval's names, and
    the heads that made them.
    """
    head = installed_head(model)
    lm = TaskModel(
        model,
        tokenizer,
        chat_template_args=args.chat_template_args,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        use_chat_template=args.apply_chat_template,
        sampler=make_sampler(temp=args.temp, top_p=args.top_p, top_k=args.top_k),
    )
    mx.random.seed(args.seed)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")

    def run(names: Sequence[str]) -> dict:
        return lm_eval.simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            log_samples=False,
            apply_chat_template=lm.use_chat_template,
            num_fewshot=args.num_shots,
            limit=args.limit,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            **dict.fromkeys(seeds, args.seed),
        )

    # a batch above the limit of positions would measure the dense head
    with head.settings(max_positions=max(args.batch_size, head.max_positions)):
        results = run(names)
        measures = list(_measures(results))
        rolling = [name for name, kind in _output_types(results).items() if kind == ROLLING]
        if rolling:
            lm.estimates = True
            measures += _measures(run(rolling), FLASH_HEAD)
    return measures


def results_file(folder: str, model: str, names: Sequence[str], num_shots: int | None) -> Path:
    """The file in which ``mlx_lm.evaluate --output-dir`` would write these results."""
    shots = [] if num_shots is None else [f"{num_shots:02d}"]
    parts = ["eval", model.replace("/", "_"), version("lm_eval"), *shots, *names]
    return Path(folder) / "_".join(parts)


def by_task(measures: Iterable[dict]) -> dict[str, dict[str, float]]:
    """The figures in the form of lm-eval's results; of two heads, the dense one's."""
    tasks: dict[str, dict[str, float]] = {}
    for one in measures:
        figures = tasks.setdefault(one["task"], {})
        figures.setdefault(f"{one['metric']},{one['filter']}", one["value"])
        if one["stderr"] is not None:
            figures.setdefault(f"{one['metric']}_stderr,{one['filter']}", one["stderr"])
    return tasks


def _output_types(results: dict) -> dict[str, str]:
    return {name: config.get("output_type") for name, config in results["configs"].items()}


def _head_of(name: str, results: dict) -> str:
    """The head that made a task's or a group's figures."""
    kinds = _output_types(results)
    if name in kinds:
        return FLASH_HEAD if kinds[name] == GENERATED else DENSE
    parts = results.get("group_subtasks", {}).get(name) or []
    return " + ".join(sorted({_head_of(part, results) for part in parts})) or DENSE


def _measures(results: dict, head: str | None = None) -> Iterable[dict]:
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or isinstance(value, str):
                continue
            yield {
                "task": name,
                "head": head or _head_of(name, results),
                "metric": metric,
                "filter": filter_name,
                "value": _finite(value),
                "stderr": _finite(values.get(f"{metric}_stderr,{filter_name}")),
                "n_shots": results.get("n-shot", {}).get(name),
                "samples": results.get("n-samples", {}).get(name, {}).get("effective"),
            }


def _finite(value: Any) -> float | None:
    """A figure in JSON; lm-eval has words for some."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None
