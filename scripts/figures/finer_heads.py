"""What the bits of a head cost and give under a 4-bit body: docs/finer-head.md.

    python scripts/figures/finer_heads.py models/smollm2 models/gemma3 --json FILE --quality
    python scripts/figures/finer_heads.py models/smollm2 models/gemma3 --json FILE --speed

--quality: perplexity on held-out text, KL and same best token from the model as it is, with the
body rounded to 4 bits and the head with the tied embedding to fewer; computed in float32 from the
rounded weights. --speed: tokens per second of each of these models, dense by mlx-lm's loop and as
this machine decodes it by itself, in turns; 16 bits are the model's own dtype. Both put their part
into the JSON file, and the table into the page.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np

import mlx_flashhead
from grid import DENSE, TUNED, WORK, in_rounds, index_of
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks import SAMPLERS
from mlx_flashhead.benchmarks.model_benchmark import PROMPT
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.benchmarks.variants import Variant, with_flash_head
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.conversion import run_task
from mlx_flashhead.conversion.calibration import read_text, text_states
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.matrix import as_float32
from mlx_flashhead.models.install import dense_copy, installed_head
from mlx_flashhead.models.loading import load_dense
from mlx_flashhead.models.locate import find_head
from pages import CHECKOUT, line, with_block
from step_times import BYTES

HEAD_BITS = (4, 6, 8, 16)
BODY_BITS = 4
GROUP = 64
TEXT = CHECKOUT / "tests" / "data" / "heldout.txt"
PAGE = CHECKOUT / "docs" / "finer-head.md"
# So many logits are computed at once, which bounds memory.
CHUNK_LOGITS = 1 << 24


def rounded(weight: mx.array, bits: int) -> mx.array:
    """The weight as it is after quantization to so many bits, in float32."""
    if bits == 16:
        return weight.astype(mx.bfloat16).astype(mx.float32)
    arrays = mx.quantize(weight.astype(mx.bfloat16), group_size=GROUP, bits=bits)
    return mx.dequantize(*arrays, group_size=GROUP, bits=bits).astype(mx.float32)


def quality(folder: Path, positions: int | None) -> dict[str, dict]:
    """Figures by form: the model as it is, and with each head under a rounded body."""
    model, tokenizer, _ = load_dense(folder)
    location = find_head(model)
    states = partial(text_states, model, tokenizer, location, read_text(TEXT), positions=positions)
    weight = location.module.weight
    exact, next_ids = run_task(states())
    exact_rows = as_float32(weight)
    figures = {"unquantized": compared(exact, exact_rows, exact, exact_rows, next_ids)}
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not location.module:
            module.weight = rounded(module.weight, BODY_BITS)
    for bits in HEAD_BITS:
        location.module.weight = rounded(weight, bits)
        rows = as_float32(location.module.weight)
        form_states, _ = run_task(states())
        figures[str(bits)] = compared(exact, exact_rows, form_states, rows, next_ids)
        figures[str(bits)]["head_mb"] = weight.size * BYTES[bits] / 1e6
    return figures


def compared(exact, exact_rows, states, rows, next_ids) -> dict[str, float]:
    """Perplexity, and KL and same best token from the exact states and rows."""
    nll = 0.0
    kl = 0.0
    same = 0.0
    size = max(1, CHUNK_LOGITS // len(rows))
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        log_p = log_softmax(exact[part] @ exact_rows.T)
        log_q = log_softmax(states[part] @ rows.T)
        nll -= np.take_along_axis(log_q, next_ids[part, None], axis=1).sum()
        kl += (np.exp(log_p) * (log_p - log_q)).sum()
        same += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum()
    n = len(states)
    perplexity = float(np.exp(nll / n))
    return {"perplexity": perplexity, "kl": float(kl / n), "same": float(same / n), "positions": n}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def speed(folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Greedy text with each head by mlx-lm's loop and with FlashHead, in turns, by bits."""
    figures = {}
    for bits in HEAD_BITS:
        model, tokenizer = mlx_flashhead.load(
            str(with_head(folder, bits, args.work)), flash_head=str(index_of(folder, args.work))
        )
        policy = policy_of(installed_head(model))
        forms = {DENSE: Variant(dense_copy(model)), TUNED: with_flash_head(model, verify=True)}
        prompt = tokenizer.encode(PROMPT)[: args.prompt_tokens]
        measured = in_rounds(forms, (prompt, 1, args.tokens, SAMPLERS["greedy"]), args.rounds)
        about = {"keeps_dense_head": policy.dense, "measured_gain": policy.tuning.gain}
        figures[str(bits)] = about | measured
        print(f"{folder.name}, {bits} bits: {measured['ratio']['median']:.2f} x", file=sys.stderr)
    return figures


def with_head(folder: Path, bits: int, work: Path) -> Path:
    """The model in 4 bits with a head of so many, made once."""
    small = work / f"{folder.name}-4bit-head{bits}"
    if not small.exists():
        path = find_head(load_dense(folder, lazy=True)[0]).path
        head = False
        if bits != 16:
            head = {"bits": bits, "group_size": GROUP}
        body = {"bits": BODY_BITS, "group_size": GROUP}
        choose = partial(chosen, path, head, body)
        mlx_lm.convert(str(folder), str(small), quantize=True, quant_predicate=choose)
    return small


def chosen(head_path: str, head: dict | bool, body: dict, path: str, *_) -> dict | bool:
    """How mlx-lm quantizes a layer."""
    if path == head_path:
        return head
    return body


def table(figures: dict) -> Iterator[str]:
    """Markdown: a line for each head of each model."""
    yield line(
        *("model", "head", "MB", "perplexity", "KL", "same best token"), "dense", "FlashHead"
    )
    yield line(*("---" for _ in range(8)))
    for name, by_form in figures["quality"].items():
        speeds = figures["speed"].get(name, {})
        name += f", {by_form['unquantized']['positions']:,} positions"
        for form, row in by_form.items():
            timed = speeds.get(form)
            cells = ["", ""]
            if timed is not None:
                cells = [f"{each:.2f}" for each in timed["tokens_per_second"].values()]
                if timed.get("keeps_dense_head"):
                    cells[1] = "stays dense"
            perplexity = f"{row['perplexity']:.1f}"
            if form == "unquantized":
                yield line(name, form, "", perplexity, "", "", *cells)
            else:
                yield line(
                    name,
                    f"{form} bits",
                    f"{row['head_mb']:.0f}",
                    perplexity,
                    f"{row['kl']:.3f}",
                    f"{row['same']:.1%}".replace("%", " %"),
                    *cells,
                )
            name = ""


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/finer_heads.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of models in 16 bits or more")
    file = {"type": writable, "metavar": "FILE", "required": True}
    parser.add_argument("--json", **file, help="the figures; continued")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--work", type=Path, default=WORK, help="default: %(default)s")
    add_number(parser, "--positions", None, "Of the held-out text (default: all).")
    add_number(parser, "--prompt-tokens", None, "Of the prompt, which a large model reads slowly.")
    add_number(parser, "--tokens", 24, "Tokens of a run")
    add_number(parser, "--rounds", 3, "Rounds that count")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = Path(args.json)
    figures = {"quality": {}, "speed": {}}
    if file.exists():
        figures = json.loads(file.read_text())
    for folder in args.models:
        if args.quality:
            figures["quality"][folder.name] = quality(folder, args.positions)
        if args.speed:
            figures["speed"][folder.name] = speed(folder, args)
            figures |= {"machine": machine(), "command": " ".join(sys.argv)}
        file.write_text(json.dumps(figures, indent=1) + "\n")
    print(*table(figures), sep="\n")
    if PAGE.exists():
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_block(text, "heads", list(table(figures))), encoding="utf-8")


if __name__ == "__main__":
    main()
