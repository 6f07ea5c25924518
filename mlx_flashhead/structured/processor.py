"""A logits processor that keeps a text within a grammar.

It fits every loop that gives a processor the tokens so far and the logits, of one sequence or of a
batch. A token's mask needs the tokens before it, so the processor waits for them. The logits are
computed meanwhile.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from .grammar import Grammar, llguidance

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Seconds in which one mask must be there, if masks have a limit. llguidance cannot be interrupted.
MASK_SECONDS = 0.5
# Earley items of one mask. Large schemas need up to 10,000; the default of 50,000 takes seconds.
MAX_ITEMS = 10_000

# llguidance's form of each tokenizer with its end-of-text tokens, which takes a second to make.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


class GrammarProcessor:
    """Rules out the tokens that a grammar does not allow next.

    After the grammar's end it allows end-of-text tokens only. One processor follows one sequence. A
    call may have fewer tokens than the call before, as in speculative decoding.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        after: Tokens after which the text begins, such as the end of a thought. Until then every
            token is allowed.
        seconds_per_mask: Seconds of computing that a mask may take on average, over this processor
            and those that :meth:`for_sequence` makes. Beyond it their texts end, and ``problem``
            says so. Ambiguous grammars take more for each further token.

    Attributes:
        problem: Reason why the text does not follow the grammar; None as long as it does.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer, if no text has the
            form, or if its first mask takes too much computing.
    """

    preserves_margins = True  # a mask leaves the distances of logits as they are

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar,
        *,
        after: Sequence[int] = (),
        seconds_per_mask: float = math.inf,
    ):
        self.grammar, self._seconds_per_mask = grammar, seconds_per_mask
        self._after = list(after)
        self._vocabulary = _vocabulary(tokenizer)
        self._matcher: Any = self._new_matcher()
        self._shares_time = False
        self.begin()
        self._in_time(self._matcher.compute_bitmask)
        if self._out_of_time or "Too many items" in self._matcher.get_error():
            raise ValueError(f"The {grammar.kind} is too ambiguous to be followed: simplify it.")
        if self._matcher.is_error():
            raise ValueError(f"No text fits the {grammar.kind}: check that it can end.")
        self.begin()

    def _new_matcher(self) -> Any:
        limits = llguidance().LLParserLimits(step_max_items=MAX_ITEMS)
        make, compiled = llguidance().LLMatcher, self.grammar.compiled
        return make(self._vocabulary, compiled, log_level=0, limits=limits)

    def begin(self) -> None:
        """Forgets the text so far. The next tokens are a prompt."""
        if self._matcher is None or not self._matcher.reset():
            self._matcher = self._new_matcher()
        self._n_prompt: int | None = None
        self._generated: list[int] = []
        self._n_matched = 0  # of these, the number that the grammar has accepted
        if not self._shares_time:
            self._seconds_left = [CREDIT_SECONDS]  # for the sequences that are made of it, too
        self.problem: str | None = None

    def for_sequence(self) -> "GrammarProcessor":
        """A processor of the same grammar for another sequence, which shares the time of masks."""
        made = copy.copy(self)
        made._matcher = self._matcher.deep_copy()
        made._shares_time = True
        made.begin()
        return made

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is a complete text of the grammar."""
        matcher = self._new_matcher()
        tokens = self._vocabulary.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for each token that may not follow ``tokens`` (n,)."""
        mx.async_eval(logits)
        if self._n_prompt is None:
            self._n_prompt = len(tokens)
        generated: Any = tokens[self._n_prompt :]
        generated = generated.tolist() if isinstance(generated, mx.array) else list(generated)
        begin = _end_of(self._after, generated)
        if begin is None:
            return logits
        if not self._out_of_time:
            self._in_time(lambda: self._follow(generated[begin:]))
        return mx.where(mx.array(self._allowed(logits.shape[-1])), logits, -mx.inf)

    @property
    def _out_of_time(self) -> bool:
        return self._seconds_left[0] <= 0

    def _in_time(self, follow: Callable[[], Any]) -> None:
        """Calls ``follow``. With a limit it is left alone, in a thread, if it takes too long."""
        if math.isinf(self._seconds_per_mask):
            follow()
            return
        seconds: Future[float] = Future()

        def run() -> None:
            began = time.thread_time()
            try:
                follow()
                seconds.set_result(time.thread_time() - began)
            except BaseException as error:  # a panic in Rust is no Exception
                seconds.set_exception(error)

        Thread(target=run, name="mask", daemon=True).start()
        try:
            self._seconds_left[0] += self._seconds_per_mask - seconds.result(MASK_SECONDS)
        except TimeoutError:
            self._seconds_left[0] = -math.inf
            self._matcher = None

    def _follow(self, generated: list[int]) -> None:
        """Brings the matcher to the end of the generated tokens, and computes the mask there."""
        before, n_both = self._generated, min(len(self._generated), len(generated))
        shared = next((i for i in range(n_both) if before[i] != generated[i]), n_both)
        if shared < self._n_matched:
            self._matcher.rollback(self._n_matched - shared)
            self._n_matched = shared
        if self._n_matched == shared:
            self._n_matched += self._matcher.try_consume_tokens(generated[shared:])
        self._generated = generated
        self._mask = self._matcher.compute_bitmask()

    def _allowed(self, vocab_size: int) -> np.ndarray:
        """(V,) bool: the tokens that may come next."""
        ends, self.problem = self._vocabulary.eos_tokens, None
        left = self._generated[self._n_matched :]
        if self._out_of_time:
            self.problem = f"its masks take more than {self._seconds_per_mask:g} s each"
        elif self._matcher.is_error():
            self.problem = self._matcher.get_error().splitlines()[0]
        elif left and left[0] not in ends:
            self.problem = f"the token {left[0]} is not allowed there"
        allowed = np.zeros(vocab_size, dtype=bool)
        if left or self.problem or self._matcher.is_stopped():
            allowed[[token for token in ends if token < vocab_size]] = True
            return allowed
        mask = np.frombuffer(self._mask, dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[:vocab_size]
        allowed[: len(bits)] = bits
        return allowed


def _end_of(sought: list[int], tokens: list[int]) -> int | None:
    """Where ``sought`` first ends in ``tokens``; None if it is not there."""
    if not sought:
        return 0
    start = -1
    with suppress(ValueError):
        while True:
            start = tokens.index(sought[0], start + 1)
            if tokens[start : start + len(sought)] == sought:
                return start + len(sought)
    return None


def grammar_processor(
    tokenizer: Any,
    *,
    json_schema: dict | bool | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> GrammarProcessor:
    """A logits processor for one text. Pass one of the three forms.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        json_schema: A JSON schema; ``{"type": "object"}`` allows any JSON object.
        regex: A regular expression that the whole text matches.
        grammar: A Lark grammar with a rule ``start``.

    Raises:
        ValueError: If not one form is given, if it is wrong, or if llguidance is not installed.
    """
    if [json_schema, regex, grammar].count(None) != 2:
        raise ValueError("Give one of json_schema, regex and grammar.")
    if json_schema is not None:
        return GrammarProcessor(tokenizer, Grammar.from_json_schema(json_schema))
    if regex is not None:
        return GrammarProcessor(tokenizer, Grammar.from_regex(regex))
    return GrammarProcessor(tokenizer, Grammar.from_lark(grammar))  # type: ignore[arg-type]


def _vocabulary(tokenizer: Any) -> Any:
    """llguidance's tokenizer for one of mlx-lm's or Hugging Face's."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if not hasattr(inner, "backend_tokenizer"):
        needs = "Structured output needs a tokenizer of the tokenizers library"
        raise ValueError(f"{needs}, but this one is a {type(inner).__name__}: use another model.")
    ends = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
    ends = tuple(sorted(ends))
    made = _vocabularies.setdefault(inner, {})
    if ends not in made:
        made[ends] = llguidance("hf").from_tokenizer(inner, eos_token=list(ends))
    return made[ends]
