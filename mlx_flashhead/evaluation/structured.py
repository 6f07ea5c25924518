"""Answers within JSON schemas: whether they validate, and whether they are the dense model's."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..common.extras import from_extra
from ..common.timing import Spread
from ..lossless.generation import batch_generate
from ..lossless.sampler import make_sampler
from ..models.install import installed_head
from ..structured.grammar import Grammar
from ..structured.processor import GrammarProcessor

SAMPLED = 7  # answers at temperature 1, all in one batch, beside the greedy one


@dataclass(frozen=True)
class StructuredEvaluation:
    """What was measured.

    Attributes:
        n_probes: Clusters scored per token.
        n_clusters: Number of clusters.
        schemas: Number of schemas.
        answers: Answers with FlashHead, greedy and at temperature 1.
        cut: Those that were cut at the limit of tokens.
        valid: Those that their schema allows.
        same_as_dense: Greedy answers that are the dense model's, of as many as there are schemas.
        mask_us: Microseconds that a token's mask takes: median, quartiles and number.
        invalid: Answers that were neither cut nor valid.
    """

    n_probes: int
    n_clusters: int
    schemas: int
    answers: int
    cut: int
    valid: int
    same_as_dense: int
    mask_us: dict
    invalid: list[str]

    def to_dict(self) -> dict:
        """JSON-ready."""
        return asdict(self)


def evaluate_structured(
    model: nn.Module,
    tokenizer: Any,
    *,
    cases: Sequence[dict] | None = None,
    sampled: int = SAMPLED,
    max_tokens: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> StructuredEvaluation:
    """Answers requests within schemas, greedily and at temperature 1.

    Args:
        model: A model loaded by ``mlx_flashhead.load``.
        tokenizer: Its tokenizer.
        cases: Objects with a ``request`` and a ``schema``; default: those of this package.
        sampled: Answers to each at temperature 1.
        max_tokens: Tokens of an answer at most.
        seed: Seed of the sampled answers.
        progress: Show a bar.

    Raises:
        ValueError: If the model has no FlashHead, or a library is not installed.
    """
    head = installed_head(model)
    validators = from_extra("jsonschema", "structured", "evaluate --structured")
    cases = usual_cases() if cases is None else cases
    counts = {"answers": 0, "cut": 0, "valid": 0, "same_as_dense": 0}
    invalid: list[str] = []
    seconds: list[float] = []
    mx.random.seed(seed)
    for case in tqdm(cases, desc="Answering", unit="schema", disable=not progress):
        processor = GrammarProcessor(tokenizer, Grammar.from_json_schema(case["schema"]))
        prompt = _prompt(tokenizer, case["request"])
        answer = partial(_answers, model, tokenizer, prompt, processor, max_tokens)
        greedy = answer(1)
        with head.settings(max_positions=max(sampled, 1)):  # FlashHead's, however large the batch
            drawn = answer(sampled, sampler=make_sampler(temp=1.0, model=model))
        counts["same_as_dense"] += greedy == answer(1, dense=True)
        seconds += processor.mask_seconds
        validator = _validator(validators, case["schema"])
        for text, was_cut in greedy + drawn:
            counts["answers"] += 1
            counts["cut"] += was_cut
            if not was_cut and _validates(validator, text):
                counts["valid"] += 1
            elif not was_cut:
                invalid.append(text)
    return StructuredEvaluation(
        n_probes=head.n_probes,
        n_clusters=head.n_clusters,
        schemas=len(cases),
        mask_us=Spread.of([1e6 * s for s in seconds]).to_dict(),
        invalid=invalid,
        **counts,
    )


def _answers(
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    processor: GrammarProcessor,
    max_tokens: int,
    n: int,
    **options: Any,
) -> list[tuple[str, bool]]:
    """Texts of ``n`` answers, and whether each was cut at the limit."""
    found = batch_generate(
        model, tokenizer, [prompt] * n, max_tokens=max_tokens, logits_processors=[processor],
        return_token_ids=True, **options,
    )  # fmt: skip
    cut = [len(tokens) == max_tokens for tokens in found.token_ids or ()]
    texts = zip(found.texts, cut, strict=True)
    # one that is complete with its last token was not cut short of anything
    return [(text, was_cut and not processor.accepts(text)) for text, was_cut in texts]


def usual_cases() -> list[dict]:
    """Requests and schemas of many kinds."""
    return json.loads(files(__package__).joinpath("schemas.json").read_text(encoding="utf-8"))


def _validator(validators: Any, schema: dict) -> Any:
    # FormatChecker() would have the form of draft 3 for a time, which has no offset
    draft = validators.Draft202012Validator
    return draft(schema, format_checker=draft.FORMAT_CHECKER)


def _validates(validator: Any, text: str) -> bool:
    try:
        return validator.is_valid(json.loads(text))
    except json.JSONDecodeError:
        return False


def _prompt(tokenizer: Any, request: str) -> list[int]:
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(request))
    messages = [{"role": "user", "content": f"{request} Answer in JSON."}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
