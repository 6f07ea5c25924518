"""FlashHead with the settings tuned on this machine against mlx-lm's own loop: docs/speed.md.

    python scripts/figures/grid.py models/SmolLM2-135M-Instruct models/Gemma-3-270M --json grid.json

Each model in float32 and in 4 bits, with each kind of request, 1 and 4 texts, in turns; the ratio
is that of each turn. The figures are written after every case, and a second run continues where the
first one ended. The 4-bit models and the FlashHeads stay in the work folder; the table goes into
the page.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import mlx_lm
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_flashhead
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks import SAMPLERS
from mlx_flashhead.benchmarks.model_benchmark import PROMPT
from mlx_flashhead.benchmarks.reporting import in_turns, machine, spread, spread_cells
from mlx_flashhead.benchmarks.variants import Variant, with_flash_head
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, show
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.models.install import dense_copy, installed_head
from mlx_flashhead.structured.processor import grammar_processor
from pages import CHECKOUT, line, with_block

MLX_LMS_TOP_P = "mlx-lm's top-p"
PENALTY = "penalty"
BIASES = "20 biases"
SCHEMA = "JSON schema"
SAMPLING = dict.fromkeys((PENALTY, BIASES, SCHEMA), SAMPLERS["greedy"])
SAMPLING |= SAMPLERS | {MLX_LMS_TOP_P: {"temp": 0.7, "top_p": 0.9}}
REQUESTS = (*SAMPLERS, MLX_LMS_TOP_P, PENALTY, BIASES, SCHEMA)
STORY = {
    "type": "object",
    "properties": {"story": {"type": "string", "minLength": 400}},
    "required": ["story"],
}
BATCHES = (1, 4)
BITS = (32, 4)
DENSE = "mlx-lm"
TUNED = "tuned"
PAGE = CHECKOUT / "docs" / "speed.md"
WORK = Path(tempfile.gettempdir()) / "mlx-flashhead-grid"


def measure(args: argparse.Namespace, cases: list[dict]) -> Iterator[None]:
    """Adds to ``cases`` what it lacks; yields after each case."""
    done = {(c["model"], c["bits"], c["request"], c["batch"]) for c in cases}
    for folder, bits in itertools.product(args.models, BITS):
        settings = [
            (request, batch)
            for batch, request in itertools.product(BATCHES, REQUESTS)
            if (folder.name, bits, request, batch) not in done
        ]
        if not settings:
            continue
        model, tokenizer = prepared(folder, bits, args.work)
        head = installed_head(model)
        forms = {DENSE: Variant(dense_copy(model)), TUNED: with_flash_head(model, verify=True)}
        policy = policy_of(head)
        about = {"model": folder.name, "bits": bits, "keeps_dense_head": policy.dense}
        about |= {"measured_gain": policy.tuning.gain, "n_probes": head.n_probes}
        about |= {"date": machine()["date"]}
        for request, batch in settings:
            case = about | {"request": request, "batch": batch}
            if batch == 1:
                tokens = args.tokens
            else:
                tokens = args.tokens // 2
            prompt = tokenizer.encode(PROMPT)
            processors = partial(make_processors, request, tokenizer)
            run = prompt, batch, tokens, SAMPLING[request], processors
            compared = forms
            if request == MLX_LMS_TOP_P:
                ours = forms[TUNED]._replace(make_sampler=forms[DENSE].make_sampler)
                compared = forms | {TUNED: ours}
            cases.append(case | in_rounds(compared, run, args.rounds))
            yield


def make_processors(request: str, tokenizer: TokenizerWrapper) -> list:
    """The logits processors of one text, which both loops get."""
    if request == PENALTY:
        return make_logits_processors(repetition_penalty=1.1)
    if request == BIASES:
        return make_logits_processors(logit_bias={100 * i: 1.0 for i in range(1, 21)})
    if request == SCHEMA:
        return [grammar_processor(tokenizer, json_schema=STORY)]
    return []


def prepared(folder: Path, bits: int, work: Path) -> tuple:
    """The model with its FlashHead, and its tokenizer."""
    index = index_of(folder, work)
    if bits != BITS[0]:
        small = work / f"{folder.name}-{bits}bit"
        if not small.exists():
            mlx_lm.convert(str(folder), str(small), quantize=True, q_bits=bits)
        folder = small
    return mlx_flashhead.load(str(folder), flash_head=str(index))


def index_of(folder: Path, work: Path) -> Path:
    """The FlashHead of a model, which serves it in all precisions; built once."""
    index = work / f"{folder.name}-flashhead"
    if not index.exists():
        mlx_flashhead.convert(str(folder), str(index), index_only=True, calibration_positions=4000)
    return index


def in_rounds(forms: dict[str, Variant], run: tuple, rounds: int) -> dict:
    """The ratio of each turn, tokens per second of all texts, and whether greedy texts agree."""
    texts: dict[str, list[int]] = {}

    def seconds_of(name: str, _: int) -> float:
        seconds, texts[name] = forms[name].decode(*run)
        return seconds

    *_, seconds = in_turns({name: partial(seconds_of, name) for name in forms}, rounds)
    turns = zip(seconds[DENSE], seconds[TUNED], strict=True)
    figures = {
        "ratio": spread([dense / tuned for dense, tuned in turns]),
        "tokens_per_second": {name: run[1] / median(times) for name, times in seconds.items()},
    }
    if not run[3]["temp"]:
        figures["same_text"] = texts[DENSE] == texts[TUNED]
    return figures


def make_table(cases: list[dict]):
    """A line for each case."""
    headings = ("model", "bits", "request", "batch", "ratio", "quartiles", DENSE, TUNED, "")
    table = new_table("Ratio of each turn, and tokens/s", headings, left=4)
    for case in cases:
        stays = ""
        if case["keeps_dense_head"]:
            stays = "stays dense"
        table.add_row(
            case["model"],
            f"{case['bits']}",
            case["request"],
            f"{case['batch']}",
            *spread_cells(case["ratio"], 3),
            *(f"{speed:.2f}" for speed in case["tokens_per_second"].values()),
            stays,
        )
    return table


def _ratio(case: dict | None) -> str:
    if case is None:
        return ""
    return f"{case['ratio']['median']:.2f}"


def page_lines(cases: list[dict]) -> Iterator[str]:
    """Markdown: a line for each model, precision and batch, a column for each kind of request."""
    yield line("model", "bits", "texts", *REQUESTS)
    yield line(*("---" for _ in range(3 + len(REQUESTS))))
    by_case = {(c["model"], c["bits"], c["batch"], c["request"]): c for c in cases}
    for model, bits, batch in dict.fromkeys(key[:3] for key in by_case):
        row = [by_case.get((model, bits, batch, request)) for request in REQUESTS]
        ratios = [_ratio(case) for case in row]
        stays = any(case is not None and case["keeps_dense_head"] for case in row)
        if stays:
            precision = f"{bits}, stays dense"
        else:
            precision = f"{bits}"
        yield line(model, precision, f"{batch}", *ratios)


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/grid.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of models in 16 bits or more")
    file = {"type": writable, "metavar": "FILE", "required": True}
    parser.add_argument("--json", **file, help="the figures; continued")
    parser.add_argument("--work", type=Path, default=WORK, help="default: %(default)s")
    add_number(parser, "--tokens", 24, "Tokens of a run; half as many of 4 texts")
    add_number(parser, "--rounds", 3, "Rounds that count")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = Path(args.json)
    began = time.monotonic()
    cases = []
    if file.exists():
        cases = json.loads(file.read_text())["cases"]
    total = len(args.models) * len(BITS) * len(REQUESTS) * len(BATCHES)
    for _ in measure(args, cases):
        about = {"kind": "grid", "machine": machine(), "command": " ".join(sys.argv)}
        file.write_text(json.dumps(about | {"cases": cases}, indent=1) + "\n")
        case = cases[-1]
        minutes = (time.monotonic() - began) / 60
        print(
            f"[{len(cases)} of {total}, {minutes:.1f} min] {case['model']}, {case['bits']} bits, "
            f"{case['request']}, batch {case['batch']}: {case['ratio']['median']:.2f} x",
            file=sys.stderr,
        )
    show(make_table(cases))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_block(page, "grid", list(page_lines(cases))), encoding="utf-8")


if __name__ == "__main__":
    main()
