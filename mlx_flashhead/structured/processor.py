"""The logits processor that keeps a text to a grammar, and to the form of calls of tools."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from threading import Thread
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..common.marks import keeps_state, masks
from .dialects import FormatMarks
from .grammar import FORM_OF_CALLS, Grammar, ToolCalls
from .vocabulary import Mark, llguidance, vocabulary_of

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Seconds in which one mask must be there, if masks have a limit. llguidance cannot be interrupted.
MASK_SECONDS = 0.5
# Matchers of a tokenizer that are kept for further texts of the same form.
MAX_MATCHERS = 16
# What llguidance may spend on a grammar of many tools at once, about 0.2 s.
LEXER_FUEL = 10_000_000
# Earley items of one mask. Large schemas need up to 10,000; the default of 50,000 takes seconds.
MAX_ITEMS = 10_000


class Mode(Enum):
    """What may come at a place of a text."""

    FREE = "anything, up to the mark of a call"
    THOUGHT = "anything, up to the end of the thought or the mark of a call"
    FORM = "the form of the whole text"
    CALL = "the rest of a section of calls"
    END = "the end of the text"


class Place(NamedTuple):
    """Where a text is after some tokens."""

    mode: Mode
    begin: int  # the number of tokens before those of the mode
    of_start: int = 0  # bytes of a call's mark that the text ends with
    of_end: int = 0  # bytes of the thought's end that it ends with
    stray: int | None = None  # the first token that the grammar does not allow


@dataclass(eq=False)
class Run:
    """A matcher that follows the text from one place on, for as long as the text fits it."""

    matcher: Any
    kind: str  # "form", "calls" or "thought"
    n_matched: int = 0

    def take(self, token: int, n_before: int) -> bool:
        """Follows one more token. Whether the text still fits."""
        if self.n_matched != n_before or not self.matcher.try_consume_tokens([token]):
            return False
        self.n_matched += 1
        return True

    def rewind(self, n_tokens: int) -> None:
        """Goes back to that many tokens, if it has followed more."""
        if self.n_matched > n_tokens:
            self.matcher.rollback(self.n_matched - n_tokens)
            self.n_matched = n_tokens


class GrammarProcessor:
    """A logits processor that rules out the tokens that a grammar does not allow next.

    A token's mask needs the tokens before it, so the processor waits for them, and the logits are
    computed meanwhile. After the grammar's end it allows end-of-text tokens only. One processor
    follows one sequence. A call may have fewer tokens than the one before, as in speculation.

    With ``calls`` the text may hold calls of tools, which are followed from their mark on: anything
    else is allowed if there is no grammar and no call is required. With a grammar the text is one
    of the two.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        grammar: What the whole text follows.
        calls: What calls of tools look like.
        required: Whether the text must be a call.
        after: Tokens after which the text begins, such as the end of a thought.
        thought: The marks of a thought that may come first: its beginning and its end.
        seconds_per_mask: Seconds of computing that a mask may take on average, over this processor
            and the ones that :meth:`for_sequence` makes. Beyond it their texts end. Ambiguous
            grammars take more for each further token.

    Attributes:
        problem: Reason why the text does not follow the grammar; None as long as it does.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer, or if no text has
            the form, or its first mask takes too much computing.
    """

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar | None = None,
        *,
        calls: ToolCalls | None = None,
        required: bool = False,
        after: Sequence[int] = (),
        thought: tuple[str, str] | None = None,
        seconds_per_mask: float = math.inf,
    ):
        self.grammar = grammar
        self.calls = calls
        self._seconds_per_mask = seconds_per_mask
        self._vocabulary = vocabulary_of(tokenizer)
        self._has_form = grammar is not None or required
        self._begins_in_thought = bool(after)
        self._start = None if calls is None else self._vocabulary.mark(calls.start)
        end_of_thought = b"".join(map(self._vocabulary.text_of, after)).decode()
        if thought is not None and not after:
            end_of_thought = thought[1]
        self._end_of_thought = self._vocabulary.mark(end_of_thought) if end_of_thought else None
        self._seconds_left = [CREDIT_SECONDS]  # for the sequences that are made of it, too
        self._forms = self._make_forms(thought)
        # matchers that have followed nothing yet: each text begins with copies
        self._section = None if calls is None else self._checked_matcher(calls.section)
        # by how many bytes of a call's mark a free text ends with: tokens that go on wrongly
        self._wrong_tokens = {} if calls is None else self._find_wrong_tokens(calls)
        self._seconds_left = [CREDIT_SECONDS]
        self.begin()
        self._mark()

    def _mark(self) -> None:
        """Says what loops may do with it: a mask leaves the distances of logits as they are."""
        masks(self, self.allowed_words)
        keeps_state(self, begin=self.begin, for_sequence=self.for_sequence)

    def _make_forms(self, thought: tuple[str, str] | None) -> list[Run]:
        """What the whole text may be: any of these."""
        forms = []
        if self.grammar is not None:
            forms.append(Run(self._checked_matcher(self.grammar), "form"))
        if self._has_form and self.calls is not None:
            forms.append(Run(self._checked_matcher(self.calls.only), "calls"))
        if self._has_form and thought is not None and not self._begins_in_thought:
            opening = FormatMarks(self._vocabulary.special).expression(thought[0])
            beginning = Grammar(FORM_OF_CALLS, f"start: /[ \\n]{{0,2}}/ {opening}")
            forms.append(Run(self._new_matcher(beginning), "thought"))
        return forms

    def _checked_matcher(self, grammar: Grammar) -> Any:
        """A matcher whose first mask has been computed, in time. It is to be copied."""
        known = self._vocabulary.matchers
        key = grammar.compiled, MAX_ITEMS
        if key in known:
            return known[key]
        matcher = self._new_matcher(grammar)
        self._in_time(matcher.compute_bitmask)
        if self._seconds_left[0] <= 0 or "Too many items" in matcher.get_error():
            raise ValueError(f"The {grammar.kind} is too ambiguous to be followed: simplify it.")
        if matcher.is_error():
            raise ValueError(f"No text fits the {grammar.kind}: check that it can end.")
        while len(known) >= MAX_MATCHERS:
            known.pop(next(iter(known)), None)
        known[key] = matcher
        return matcher

    def _new_matcher(self, grammar: Grammar) -> Any:
        fuel = LEXER_FUEL if grammar.kind == FORM_OF_CALLS else None
        limits = llguidance().LLParserLimits(step_max_items=MAX_ITEMS, initial_lexer_fuel=fuel)
        make = llguidance().LLMatcher
        return make(self._vocabulary.tokens, grammar.compiled, log_level=0, limits=limits)

    def begin(self) -> None:
        """Forgets the text so far. The next tokens are a prompt."""
        self._n_prompt: int | None = None
        self._generated: list[int] = []
        self._runs: dict[int, list[Run]] = {}  # by the number of tokens before them
        self._mask: np.ndarray | None = None
        self.problem: str | None = None
        if self._begins_in_thought:
            self._places = [Place(Mode.THOUGHT, 0)]
        else:
            self._places = [self._enter_form(0)]

    def for_sequence(self) -> "GrammarProcessor":
        """A processor of the same grammar for another sequence, which shares the time of masks."""
        made = copy.copy(self)
        made.begin()
        made._mark()
        return made

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is a complete text of the grammar."""
        assert self.grammar is not None
        matcher = self._new_matcher(self.grammar)
        tokens = self._vocabulary.tokens.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for each token that may not follow ``tokens`` (n,)."""
        mx.async_eval(logits)
        words = self._words_after(tokens, logits.shape[-1])
        if words is None:
            return logits
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.shape[-1]]
        return mx.where(mx.array(bits.astype(bool)), logits, -mx.inf)

    def allowed_words(self, context: Any, vocab_size: int | None = None) -> mx.array | None:
        """Returns the mask of the tokens that may come next, a bit for each.

        The bit of token t is bit t % 32 of word t // 32.

        Args:
            context: The tokens so far (n,), of the prompt and the text.
            vocab_size: The number of logits V; that of the tokenizer's tokens without it. A token
                that the tokenizer does not have is allowed in a free text alone. Bits beyond V have
                no meaning.

        Returns:
            (⌈V/32⌉,) uint32; None if every token is allowed.
        """
        words = self._words_after(context, vocab_size or self._vocabulary.size)
        return None if words is None else mx.array(words)

    def _words_after(self, tokens: Any, vocab_size: int) -> np.ndarray | None:
        if self._n_prompt is None:
            self._n_prompt = len(tokens)
        generated: Any = tokens[self._n_prompt :]
        generated = generated.tolist() if isinstance(generated, mx.array) else list(generated)
        if self._seconds_left[0] > 0:
            self._in_time(lambda: self._follow(generated))
        mask = self._mask
        self.problem = self._find_problem()
        if self.problem is not None:
            mask = self._vocabulary.words(self._vocabulary.end_tokens)
        if mask is None:
            return None
        # in a free text, what the tokenizer does not know is as allowed as without a mask
        is_free = self._places[-1].mode in (Mode.FREE, Mode.THOUGHT) and self.problem is None
        further = 0xFFFFFFFF if is_free else 0
        words = np.full(-(-vocab_size // 32), further, dtype=np.uint32)
        words[: len(mask)] = mask[: len(words)]
        return words

    def _find_problem(self) -> str | None:
        stray = self._places[-1].stray
        if self._seconds_left[0] <= 0:
            return f"its masks fail, or take more than {self._seconds_per_mask:g} s each"
        for runs in self._runs.values():
            for run in runs:
                if run.matcher.is_error():
                    return run.matcher.get_error().splitlines()[0]
        if stray is not None and stray not in self._vocabulary.end_tokens:
            return f"the token {stray} is not allowed there"
        return None

    def _in_time(self, follow: Callable[[], Any]) -> None:
        """Calls ``follow``; with a limit in a thread, which is left alone if it takes too long."""
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
        except BaseException:
            self._seconds_left[0] = -math.inf

    def _follow(self, generated: list[int]) -> None:
        """Goes to the end of the generated tokens, and computes the mask there."""
        before = self._generated
        n_both = min(len(before), len(generated))
        shared = next((i for i in range(n_both) if before[i] != generated[i]), n_both)
        self._rewind(shared)
        for token in generated[shared:]:
            self._places.append(self._next_place(token))
            self._generated.append(token)
        self._mask = self._mask_here()

    def _rewind(self, n_tokens: int) -> None:
        """Goes back to the place after so many tokens."""
        del self._generated[n_tokens:]
        del self._places[n_tokens + 1 :]
        for begin in [begin for begin in self._runs if begin > n_tokens]:
            del self._runs[begin]
        for begin, runs in self._runs.items():
            for run in runs:
                run.rewind(n_tokens - begin)

    def _next_place(self, token: int) -> Place:
        """The place after one more token."""
        place = self._places[-1]
        text = b""
        if self._start is not None or place.mode is Mode.THOUGHT:
            text = self._vocabulary.text_of(token)
        of_start, start_end = _advanced(self._start, place.of_start, text)
        if place.mode in (Mode.FREE, Mode.THOUGHT):
            of_end = 0
            thought_end = None
            if place.mode is Mode.THOUGHT:
                of_end, thought_end = _advanced(self._end_of_thought, place.of_end, text)
            if start_end is not None and (thought_end is None or start_end <= thought_end):
                return self._enter_call(place, token, is_whole=start_end == len(text))
            if thought_end is not None:
                return self._enter_form(len(self._places))
            return place._replace(of_start=of_start, of_end=of_end)
        n_before = len(self._places) - 1 - place.begin
        followed = [run for run in self._runs.get(place.begin, ()) if run.take(token, n_before)]
        if not followed:
            stray = token if place.stray is None else place.stray
            return place._replace(stray=stray, of_start=of_start)
        if any(run.kind == "thought" and run.matcher.is_stopped() for run in followed):
            return Place(Mode.THOUGHT, len(self._places))
        if place.mode is Mode.CALL and followed[0].matcher.is_stopped():
            assert self.calls is not None
            goes_on = self.calls.several and self.calls.is_closed
            return Place(Mode.FREE if goes_on else Mode.END, len(self._places))
        return place._replace(of_start=of_start)

    def _enter_form(self, begin: int) -> Place:
        """The place where the text begins, perhaps after a thought."""
        if not self._has_form:
            return Place(Mode.FREE, begin)
        # no thought follows another one
        forms = [form for form in self._forms if begin == 0 or form.kind != "thought"]
        self._runs[begin] = [Run(form.matcher.deep_copy(), form.kind) for form in forms]
        return Place(Mode.FORM, begin)

    def _enter_call(self, place: Place, token: int, *, is_whole: bool) -> Place:
        """The place after a token that completes the mark of a call, and may go on."""
        assert self.calls is not None and self._section is not None
        begin = len(self._places)
        if is_whole:
            run = self._section_after(self.calls.start)
        else:
            known = dict(self._vocabulary.mark(self.calls.start).overshooting(place.of_start))
            run = self._section_after(self.calls.start[: max(0, known[token])])
            if not run.matcher.try_consume_tokens([token]):
                return Place(Mode.CALL, begin, stray=token)
        self._runs[begin] = [run]
        return Place(Mode.CALL, begin)

    def _section_after(self, beginning: str) -> Run:
        """A section of calls of which the beginning of the mark has been written."""
        assert self._section is not None
        matcher = self._section.deep_copy()
        matcher.consume_tokens(self._vocabulary.tokens.greedy_tokenize(beginning))
        return Run(matcher, "calls")

    def _mask_here(self) -> np.ndarray | None:
        """The mask at the latest place, (⌈V/32⌉,) uint32; None if every token is allowed."""
        place = self._places[-1]
        if place.mode in (Mode.FREE, Mode.THOUGHT):
            return self._mask_of_free_text(place)
        ends = self._vocabulary.words(self._vocabulary.end_tokens)
        if place.mode is Mode.END or place.stray is not None:
            return ends
        n_tokens = len(self._generated) - place.begin
        masks = []
        for run in self._runs[place.begin]:
            if run.n_matched == n_tokens:
                stopped = run.matcher.is_stopped()
                mask = ends if stopped else np.frombuffer(run.matcher.compute_bitmask(), np.uint32)
                if run.kind == "form" and self._start is not None and not stopped:
                    # a call's mark in the midst of another text would be read as such
                    mask = mask & ~self._start.completing(place.of_start)
                masks.append(mask)
        return np.bitwise_or.reduce(masks)

    def _mask_of_free_text(self, place: Place) -> np.ndarray | None:
        """Everything but tokens that complete a call's mark and go on as no call does."""
        if self._start is None:
            return None
        wrong = self._wrong_tokens[place.of_start]
        return ~self._vocabulary.words(wrong) if wrong else None

    def _find_wrong_tokens(self, calls: ToolCalls) -> dict[int, list[int]]:
        """Returns those of :meth:`_find_wrong` for each number of bytes.

        They are found before any text: the first time it takes seconds, in which no mask would
        come.
        """
        known = self._vocabulary.wrong_tokens
        key = calls.section.compiled
        if key not in known:
            found = {
                length: self._find_wrong(length) for length in range(len(calls.start.encode()))
            }
            while len(known) >= MAX_MATCHERS:
                known.pop(next(iter(known)), None)
            known[key] = found
        return known[key]

    def _find_wrong(self, length: int) -> list[int]:
        """The tokens that complete a call's mark, after so many bytes of it, and go on wrongly."""
        assert self.calls is not None and self._start is not None
        masks: dict[int, np.ndarray] = {}
        wrong = []
        for token, n_before in self._start.overshooting(length):
            if n_before < 0:
                wrong.append(token)
                continue
            if n_before not in masks:
                run = self._section_after(self.calls.start[:n_before])
                masks[n_before] = np.frombuffer(run.matcher.compute_bitmask(), np.uint32)
            if not masks[n_before][token // 32] >> (token % 32) & 1:
                wrong.append(token)
        return wrong


def _advanced(mark: Mark | None, length: int, text: bytes) -> tuple[int, int | None]:
    return (0, None) if mark is None else mark.advance(length, text)


def grammar_processor(
    tokenizer: Any,
    *,
    json_schema: dict | bool | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> GrammarProcessor:
    """Makes a logits processor for one text that keeps to one form.

    Args:
        tokenizer: mlx-lm's or Hugging Face's.
        json_schema: A JSON schema; ``{"type": "object"}`` allows any JSON object.
        regex: A regular expression that the whole text matches.
        grammar: A Lark grammar with a rule ``start``.

    Raises:
        ValueError: If not one form is passed, if it is wrong, or if llguidance is not installed.
    """
    if [json_schema, regex, grammar].count(None) != 2:
        raise ValueError("Give one of json_schema, regex and grammar.")
    if json_schema is not None:
        return GrammarProcessor(tokenizer, Grammar.from_json_schema(json_schema))
    form = Grammar.from_lark(grammar or "") if regex is None else Grammar.from_regex(regex)
    return GrammarProcessor(tokenizer, form)
