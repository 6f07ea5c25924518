#!/usr/bin/env python3
"""Trains a drafter of Qwen3.5's MTP form for a small model, and measures it: docs/drafts.md.

    mlx_flashhead.convert --model models/SmolLM2-135M-Instruct --mlx-path models/smollm2-flashhead
    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python scripts/figures/trained_drafter.py \
        models/smollm2-flashhead --json trained_drafter.json

The drafter is mlx-vlm's `qwen3_5_mtp`: a projection of the next token's embedding and the target's
hidden state, one transformer layer, and the target's own head. The target invents requests and
answers them, greedily and at a temperature, and the drafter learns the target's distributions from
its states, three tokens deep. Then the target answers the requests of requests.txt. Under its own
tokens each state says how many drafts in a row the target would accept, by the dense head and by
the few clusters of FlashHead that score a draft. Draft and target draw with the same noise.

MLX's own products are slow on a CPU, hence OpenBLAS. What is written and trained stays in the work
folder, and a second run begins with it; the drafter there is one that mlx-vlm loads.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_vlm.speculative.drafters.qwen3_5_mtp import ModelConfig, Qwen3_5MTPDraftModel
from tqdm import tqdm

from drafts import REQUESTS, few_logits, latest_tokens
from mlx_flashhead import get_flash_head, make_sampler
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, percent, show
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.noise import position_key
from mlx_flashhead.loading.drafts import load_draft
from mlx_flashhead.models.install import dense_copy
from mlx_flashhead.models.templates import prompt_of
from mlx_flashhead.wide.step import WIDTHS
from pages import CHECKOUT, line, with_block

HEATS = (0.0, 0.7)
DEPTHS = 7  # drafts of the widest step
SHOWN_DEPTHS = 4  # on the page; deeper ones were seldom reached
DENSE = "dense head"
REQUEST_TOKENS = 40
REQUEST_HEAT = 1.0
BATCH = 32  # texts that are written together
PAGE = CHECKOUT / "docs" / "speed.md"
WORK = Path(tempfile.gettempdir()) / "mlx-flashhead-trained-drafter"

# The training
TAUGHT_DEPTHS = (1.0, 0.7, 0.5)  # and what the loss of each counts
READ_TEXTS = 8  # of a step
BEST = 8  # tokens of each of the target's distributions that all are compared in
OTHERS = 1024  # more tokens, at random
PEAK_RATE = 1e-3
WARM_UP = 30  # steps


class Text(NamedTuple):
    """An answer of the target."""

    prompt: list[int]
    answer: list[int]
    heat: float  # the temperature
    seed: int


class Target:
    """A model whose states are drafted from.

    Args:
        path: A folder of mlx-lm's with a FlashHead.
    """

    def __init__(self, path: str):
        self.model, self.tokenizer = load_draft(path)
        head = get_flash_head(self.model)
        if head is None:
            raise ValueError(f"{path} has no FlashHead: convert it first.")
        self.head = head
        self._dense: Any = dense_copy(self.model)
        self.rows = head.clustered.token_rows().dequantized(mx.float32)
        self.args = self.model.args
        self.embed = self.model.model.embed_tokens
        mx.eval(self.rows)

    def write(self, prompts: list[list[int]], heat: float, n_tokens: int, seed: int) -> list[Text]:
        """Answers prompts, many at once."""
        texts = []
        for start in tqdm(range(0, len(prompts), BATCH), desc=f"Writing at {heat:g}"):
            of = prompts[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(of))]
            texts += self._write(of, heat, n_tokens, seeds)
        return texts

    def _write(self, prompts, heat: float, n_tokens: int, seeds: list[int]) -> list[Text]:
        stop = [[token] for token in self.tokenizer.eos_token_ids]
        loop = BatchGenerator(self._dense, stop_tokens=stop, completion_batch_size=BATCH)
        samplers = [make_sampler(temp=heat, seed=seed) for seed in seeds]
        ids = loop.insert(prompts, [n_tokens] * len(prompts), samplers=samplers)
        answers: dict[int, list[int]] = {uid: [] for uid in ids}
        while responses := loop.next_generated():
            for response in responses:
                answers[response.uid].append(response.token)
        loop.close()
        pairs = zip(prompts, answers.values(), seeds, strict=True)
        return [Text(prompt, answer, heat, seed) for prompt, answer, seed in pairs]

    def states(self, tokens: list[int]) -> mx.array:
        """What the head is called with (n, D) after each of the tokens (n,)."""
        states = []

        def record(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return mx.zeros((*hidden.shape[:-1], 1))

        with self.head.intercepted(record):
            self.model(mx.array([tokens]))
        return states[0][0].astype(mx.float32)

    def requests(self, n: int, seed: int) -> list[str]:
        """Requests that the target invents in a user's place."""
        messages = [{"role": "user", "content": "@@"}]
        template = self.tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = self.tokenizer.encode(template.split("@@")[0])
        given = {line.strip() for line in REQUESTS.read_text(encoding="utf-8").splitlines()}
        found: dict[str, None] = {}
        while len(found) < n:
            for text in self.write([prompt] * BATCH, REQUEST_HEAT, REQUEST_TOKENS, seed):
                request = self.tokenizer.decode(text.answer, skip_special_tokens=True).strip()
                if request and request not in given:
                    found[request] = None
            seed += BATCH
        return list(found)[:n]


def new_drafter(target: Target) -> Qwen3_5MTPDraftModel:
    """A drafter of the target's sizes, whose weights are random."""
    args = target.args
    head_size = args.hidden_size // args.num_attention_heads
    half = head_size // 2
    config = {
        "model_type": "qwen3_5_mtp",
        "block_size": DEPTHS + 1,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": args.hidden_size,
            "intermediate_size": args.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": args.num_attention_heads,
            "num_key_value_heads": args.num_key_value_heads,
            "head_dim": head_size,
            "rms_norm_eps": args.rms_norm_eps,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_position_embeddings,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "type": "default",
                "rope_theta": args.rope_theta,
                "partial_rotary_factor": 1.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            # of the linear attention, which an MTP layer does not have
            "linear_num_value_heads": 1,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 1,
            "linear_value_head_dim": 1,
            "linear_conv_kernel_dim": 4,
        },
    }
    drafter = Qwen3_5MTPDraftModel(ModelConfig.from_dict(config))
    drafter.own_config = config
    # It begins with the target's own state, as the target's head knows it.
    width = args.hidden_size
    drafter.fc.weight = mx.concatenate([0.5 * drafter.fc.weight[:, :width], mx.eye(width)], axis=1)
    drafter.norm.weight = mx.array(target.model.model.norm.weight).astype(mx.float32)
    mx.eval(drafter.parameters())
    return drafter


def chain(
    drafter: Qwen3_5MTPDraftModel, embeddings: mx.array, states: mx.array, depths: int
) -> Iterator[mx.array]:
    """The drafter's states behind every place of texts, one draft deeper each time.

    The drafts behind a place know the text up to it and each other, and nothing of the places
    after it. That is what a loop of drafts and steps computes.

    Args:
        drafter: The drafter.
        embeddings: (B, L + depths, D) of the texts' tokens.
        states: (B, L, D) of the target, from which it chose the tokens.
        depths: The number of drafts.

    Yields:
        (B, L, D) for each depth. At depth d the state at place j guesses token j + d + 1.
    """
    length = states.shape[1]
    cache = ConcatenateKVCache()
    mask = mx.tril(mx.ones((length, length), mx.bool_))
    own = mx.eye(length).astype(mx.bool_)
    for depth in range(1, depths + 1):
        known = embeddings[:, depth : depth + length]
        parts = [drafter.pre_fc_norm_embedding(known), drafter.pre_fc_norm_hidden(states)]
        hidden = drafter.fc(mx.concatenate(parts, axis=-1))
        places = mx.arange(length, dtype=mx.int32)[None] + (depth - 1)
        hidden = drafter.layers[0](hidden, mask=mask, cache=cache, position_ids=places)
        states = drafter.norm(hidden)
        mask = mx.concatenate([mask, own], axis=1)
        yield states


class Lesson(NamedTuple):
    """What is known of a text that is learned from."""

    tokens: list[int]
    n_prompt: int
    states: np.ndarray  # (n - 1, D) float32, after each token but the last
    best: np.ndarray  # (n - 1, BEST), the target's best tokens there


def lessons_of(target: Target, texts: Sequence[Text]) -> list[Lesson]:
    """The states of texts."""
    lessons = []
    for text in tqdm(texts, desc="Reading"):
        tokens = [*text.prompt, *text.answer]
        states = target.states(tokens[:-1])
        best = mx.argpartition(-(states @ target.rows.T), BEST, axis=-1)[:, :BEST]
        found = np.array(states), np.array(best)
        lessons.append(Lesson(tokens, len(text.prompt), *found))
    return lessons


class Teacher:
    """Makes a step's loss of some texts.

    Args:
        target: The target.
        lessons: All texts.
        seed: Of the random tokens.
    """

    def __init__(self, target: Target, lessons: list[Lesson], seed: int):
        self._target = target
        self._lessons = sorted(lessons, key=lambda lesson: len(lesson.tokens))
        self._random = np.random.default_rng(seed)

    def steps(self, n: int) -> Iterator[tuple[mx.array, ...]]:
        """The arguments of :func:`loss_of` for each step, of texts of about the same length."""
        starts = np.arange(0, len(self._lessons) - READ_TEXTS + 1, READ_TEXTS)
        while n > 0:
            for start in self._random.permutation(starts)[:n]:
                yield self._step(self._lessons[start : start + READ_TEXTS])
                n -= 1

    def _step(self, lessons: list[Lesson]) -> tuple[mx.array, ...]:
        longest = max(len(lesson.tokens) for lesson in lessons)
        length = longest - 2  # of the places whose next token but one is known
        depths = len(TAUGHT_DEPTHS)
        tokens = np.zeros((len(lessons), length + depths), np.int32)
        states = np.zeros((len(lessons), length + depths, lessons[0].states.shape[1]), np.float32)
        counts = np.zeros((len(lessons), length + depths), np.float32)
        for i, lesson in enumerate(lessons):
            n = len(lesson.tokens)
            tokens[i, :n] = lesson.tokens
            states[i, : n - 1] = lesson.states
            counts[i, lesson.n_prompt - 1 : n - 1] = 1  # of the states that chose the answer
        vocab = self._target.args.vocab_size
        compared = [tokens.ravel(), self._random.integers(0, vocab, OTHERS)]
        compared += [lesson.best.ravel() for lesson in lessons]
        rows = self._target.rows[mx.array(np.unique(np.concatenate(compared)))]
        embeddings = self._target.embed(mx.array(tokens)).astype(mx.float32)
        expected = mx.softmax(mx.array(states) @ rows.T, axis=-1)
        step = embeddings, mx.array(states[:, :length]), expected, mx.array(counts), rows
        mx.eval(step)
        return step


def loss_of(drafter, embeddings, states, expected, counts, rows) -> mx.array:
    """How far the drafts' distributions are from the target's, in nats of cross-entropy."""
    length = states.shape[1]
    loss = mx.array(0.0)
    for depth, drafted in enumerate(chain(drafter, embeddings, states, len(TAUGHT_DEPTHS)), 1):
        logits = drafted @ rows.T
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        nats = -(expected[:, depth : depth + length] * logprobs).sum(axis=-1)
        counted = counts[:, depth : depth + length]
        mean = (nats * counted).sum() / mx.maximum(counted.sum(), 1)
        loss = loss + TAUGHT_DEPTHS[depth - 1] * mean
    return loss / sum(TAUGHT_DEPTHS)


def train(target: Target, lessons: list[Lesson], n_steps: int, seed: int):
    """A trained drafter, and the mean loss of each tenth of its steps."""
    mx.random.seed(seed)
    drafter = new_drafter(target)
    warm_up = min(WARM_UP, n_steps // 4)
    rates = [linear_schedule(0, PEAK_RATE, warm_up), cosine_decay(PEAK_RATE, n_steps - warm_up)]
    optimizer = AdamW(join_schedules(rates, [warm_up]), betas=[0.9, 0.95], weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(drafter, partial(loss_of, drafter))
    losses = []
    for step in tqdm(Teacher(target, lessons, seed).steps(n_steps), total=n_steps, desc="Training"):
        loss, gradient = loss_and_gradient(*step)
        optimizer.update(drafter, gradient)
        mx.eval(loss, drafter.parameters(), optimizer.state)
        losses.append(loss.item())
    tenths = np.array_split(losses, min(10, n_steps))
    return drafter, [round(float(tenth.mean()), 3) for tenth in tenths]


def runs_of(
    target: Target, drafter: Qwen3_5MTPDraftModel, text: Text, n_probes: int
) -> dict[str, np.ndarray]:
    """How many drafts in a row are right behind each token of an answer but the last.

    Returns:
        For each way to score drafts (n - 1,), at most DEPTHS.
    """
    tokens = [*text.prompt, *text.answer]
    states = target.states(tokens[:-1])
    known = mx.array([[*tokens, *[0] * DEPTHS]])
    embeddings = target.embed(known).astype(mx.float32)
    first = len(text.prompt) - 1  # the place whose state chose the answer's first token
    n_rows = len(text.answer) - 1
    right: dict[str, list[np.ndarray]] = {}
    drafted = chain(drafter, embeddings[:, : len(states) + DEPTHS], states[None], DEPTHS)
    for depth, hidden in enumerate(drafted, 1):
        drafts = hidden[0, first : first + n_rows]
        of_answer = np.arange(depth, depth + n_rows)  # the tokens that they guess
        wanted = np.array([*text.answer, *[-1] * DEPTHS])[of_answer]
        keys = [position_key(text.seed, int(place)) for place in of_answer]
        draw = make_sampler(temp=text.heat).settings
        exact = drafts @ target.rows.T
        latest = latest_tokens(tokens, first + 2, n_rows, exact.shape[1])
        few = mx.where(mx.array(latest), exact, few_logits(target.head, drafts, exact, n_probes))
        for way, logits in ((DENSE, exact), (few_name(target, n_probes), few)):
            chosen = Draws.of([(draw, key) for key in keys]).choose(logits)
            right.setdefault(way, []).append(np.array(chosen) == wanted)
    return {way: np.cumprod(deep, axis=0).sum(axis=0) for way, deep in right.items()}


def few_name(target: Target, n_probes: int) -> str:
    """How FlashHead scores drafts, in words."""
    return f"FlashHead, {n_probes} of {target.head.n_clusters:,} clusters"


def figures_of(runs: list[np.ndarray]) -> dict[str, Any]:
    """Shares of each depth, and tokens a step, of the runs of some texts."""
    tried = [0] * DEPTHS
    right = [0] * DEPTHS
    for run in runs:
        for place, length in enumerate(run.tolist()):
            left = len(run) - place  # tokens of the text that may be guessed
            for depth in range(min(length + 1, DEPTHS, left)):
                tried[depth] += 1
                right[depth] += depth < length
    shares = [round(a / b, 4) if b else None for a, b in zip(right, tried, strict=True)]
    by_width = {}
    for width in WIDTHS:
        n_steps = sum(len(steps_of(run, width)) for run in runs)
        by_width[str(width)] = round(sum(map(len, runs)) / n_steps, 4)
    return {"right": right, "tried": tried, "shares": shares, "tokens_a_step": by_width}


def steps_of(run: np.ndarray, width: int) -> list[int]:
    """The drafts that are accepted in each step of a text, all of one width."""
    place = 0
    accepted = []
    while place < len(run):
        accepted.append(min(int(run[place]), width - 1))
        place += accepted[-1] + 1
    return accepted


def save(drafter: Qwen3_5MTPDraftModel, folder: Path) -> None:
    """Writes a drafter as mlx-vlm loads one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(drafter.own_config, indent=1) + "\n")
    weights = dict(tree_flatten(drafter.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def trained(target: Target, args: Any) -> tuple[Qwen3_5MTPDraftModel, dict[str, Any]]:
    """The drafter in the work folder, or a new one; and what is known of its training."""
    name = f"{args.texts}-{args.tokens}-{args.steps}-{args.seed}"
    folder = args.work / name
    about = folder / "training.json"
    if not about.exists():
        began = time.process_time()
        requests = target.requests(args.texts, args.seed)
        prompts = [prompt_of(target.tokenizer, request) for request in requests]
        half = len(prompts) // 2
        texts = target.write(prompts[:half], HEATS[0], args.tokens, args.seed)
        texts += target.write(prompts[half:], HEATS[1], args.tokens, args.seed + half)
        lessons = lessons_of(target, [text for text in texts if len(text.answer) > DEPTHS])
        drafter, losses = train(target, lessons, args.steps, args.seed)
        n_weights: int = sum(array.size for _, array in tree_flatten(drafter.parameters()))
        known = {
            "texts": len(lessons),
            "answer_tokens": sum(len(of.tokens) - of.n_prompt for of in lessons),
            "steps": args.steps,
            "texts_a_step": READ_TEXTS,
            "weights": n_weights,
            "losses": losses,
            "cpu_seconds": round(time.process_time() - began),
        }
        save(drafter, folder)
        about.write_text(json.dumps(known, indent=1) + "\n")
    drafter = new_drafter(target)
    drafter.load_weights(str(folder / "model.safetensors"))
    return drafter, json.loads(about.read_text())


def measured(target: Target, drafter: Qwen3_5MTPDraftModel, args: Any) -> dict[str, Any]:
    """The figures of answers to requests that the drafter has not seen."""
    n_probes = policy_of(target.head).draft_probes
    lines = REQUESTS.read_text(encoding="utf-8").splitlines()
    every = max(1, len(lines) // args.requests)
    prompts = [prompt_of(target.tokenizer, line) for line in lines[::every][: args.requests]]
    figures = {}
    for heat in HEATS:
        texts = target.write(prompts, heat, args.tokens, args.seed)
        texts = [text for text in texts if len(text.answer) > 1]
        runs: dict[str, list[np.ndarray]] = {}
        for text in tqdm(texts, desc=f"Drafting at {heat:g}"):
            for way, run in runs_of(target, drafter, text, n_probes).items():
                runs.setdefault(way, []).append(run)
        dense, few = (figures_of(of) for of in runs.values())
        pairs = zip(few["tokens_a_step"].items(), dense["tokens_a_step"].values(), strict=True)
        kept = {width: round((a - 1) / (b - 1), 4) for (width, a), b in pairs}
        names = list(runs)
        figures["greedy" if heat == 0 else f"{heat:g}"] = {
            names[0]: dense | {"runs": traces(runs[names[0]])},
            names[1]: few | {"kept_accepted": kept, "runs": traces(runs[names[1]])},
        }
    return figures


def traces(runs: list[np.ndarray]) -> list[str]:
    """The runs of each text, a digit for each of its tokens but the last."""
    return ["".join(map(str, run.tolist())) for run in runs]


def make_table(figures: dict[str, Any]):
    """A line for each temperature and way."""
    depths = (f"{depth}" for depth in range(1, DEPTHS + 1))
    widths = (f"T = {width}" for width in WIDTHS)
    table = new_table("A trained drafter", ("text", "drafts by", *depths, *widths), left=2)
    for text, ways in figures.items():
        for way, of in ways.items():
            shares = ("–" if share is None else percent(share, 0) for share in of["shares"])
            table.add_row(text, way, *shares, *(f"{n:.2f}" for n in of["tokens_a_step"].values()))
    return table


def page_lines(figures: dict[str, Any]) -> list[str]:
    """Markdown: a line for each temperature and way."""
    depths = (f"draft {depth}" for depth in range(1, SHOWN_DEPTHS + 1))
    titles = ("text", "drafts are scored by", *depths, *(f"T = {width}" for width in WIDTHS))
    lines = [line(*titles), line(*("---" for _ in titles))]
    for text, ways in figures.items():
        for way, of in ways.items():
            shares = (percent(share, 0) for share in of["shares"][:SHOWN_DEPTHS])
            steps = (f"{number:.2f}" for number in of["tokens_a_step"].values())
            lines.append(line(text, way, *shares, *steps))
    return lines


@command
def main() -> None:
    """Entry point."""
    description = __doc__.split("\n")[0]
    parser = Parser(prog="scripts/figures/trained_drafter.py", description=description)
    parser.add_argument("target", help="a folder in float32, with its FlashHead")
    parser.add_argument("--json", type=writable, metavar="FILE", help="where to write the figures")
    parser.add_argument("--work", type=Path, default=WORK, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    add_number(parser, "--texts", 256, "Answers to train on.")
    add_number(parser, "--tokens", 112, "Tokens of an answer at most.")
    add_number(parser, "--steps", 280, "Steps of the training.")
    add_number(parser, "--requests", 38, "Answers of each temperature to measure on.")
    add_number(parser, "--seed", 1, "Of the texts and the training.")
    args = parser.parse_args()
    mx.disable_compile()  # which takes a C++ compiler for each formula on a CPU
    args.work.mkdir(parents=True, exist_ok=True)
    target = Target(args.target)
    drafter, training = trained(target, args)
    figures = measured(target, drafter, args)
    show(make_table(figures))
    if args.json:
        about = {"kind": "trained drafter", "machine": machine(), "command": " ".join(sys.argv)}
        about |= {"target": Path(args.target).name, "training": training}
        Path(args.json).write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_block(page, "trained drafter", page_lines(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
