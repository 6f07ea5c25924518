"""The logits processor that keeps a text to a grammar, and to the form of calls of tools."""

import copy
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..common.masks import Mask
from .grammar import LIMITS, Grammar, sentence
from .tool_grammar import ToolCalls, text_grammar
from .vocabulary import Vocabulary, llguidance, vocabulary_of

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Matchers that are kept for further texts of the same form.
MAX_MATCHERS = 16


class MaskTime:
    """The time that masks may take. llguidance's limits bound that of each.

    Args:
        seconds_per_mask: Seconds of computing that a mask may take on average; infinity for any.
    """

    def __init__(self, seconds_per_mask: float):
        self.seconds_per_mask = seconds_per_mask
        self._left = CREDIT_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether masks have taken more than they may."""
        return self._left <= 0

    def spend(self, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, which finds a mask."""
        began = time.thread_time()
        found = compute()
        self._left += self.seconds_per_mask - (time.thread_time() - began)
        return found


@lru_cache(MAX_MATCHERS)
def checked_matcher(vocabulary: Vocabulary, grammars: str, form: str) -> Any:
    """A matcher whose first mask has been computed. It is to be copied.

    Args:
        vocabulary: The tokens.
        grammars: llguidance's, as JSON.
        form: What describes the text, for the error.

    Raises:
        ValueError: If no text follows them.
    """
    limits = llguidance().LLParserLimits(**LIMITS)
    matcher = llguidance().LLMatcher(vocabulary.tokens, grammars, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(f"The {form} cannot be followed: {sentence(matcher.get_error())}.")
    return matcher


class GrammarProcessor(Mask):
    """A logits processor that rules out the tokens that a grammar does not allow next.

    A token's mask needs the tokens before it, so the processor waits for them, and the logits are
    computed meanwhile. After the grammar's end it allows end-of-text tokens only. One processor
    follows one text. A call may have fewer tokens than the one before, as in speculation.

    With ``calls`` the text may hold calls of tools, which are followed from their mark on: anything
    else is allowed if there is no grammar and no call is required. With a grammar the text is one
    of the two.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        grammar: What the whole text follows.
        calls: What calls of tools look like.
        required: Whether the text must be a call.
        thought: The marks of a thought that may come first: its beginning and its end. The prompt
            has begun it if the first one is empty.
        seconds_per_mask: Seconds of computing that a mask may take on average, over this processor
            and the ones that :meth:`for_text` makes. Beyond it their texts end. Ambiguous
            grammars take more for each further token.

    Attributes:
        problem: Reason why the text does not follow the grammar; None as long as it does.

    Raises:
        ValueError: If llguidance is not installed or cannot read the tokenizer, or if no text has
            the form, or its first mask takes too much computing.
    """

    forces = True

    def __init__(
        self,
        tokenizer: Any,
        grammar: Grammar | None = None,
        *,
        calls: ToolCalls | None = None,
        required: bool = False,
        thought: tuple[str, str] | None = None,
        seconds_per_mask: float = math.inf,
    ):
        self.grammar = grammar
        self._vocabulary = vocabulary_of(tokenizer)
        # It counts the processors for other texts, too.
        self._time = MaskTime(seconds_per_mask)
        text = text_grammar(self._vocabulary, grammar, calls, required=required, thought=thought)
        form = "form of calls"
        if grammar is not None:
            form = grammar.form
        self._fresh = checked_matcher(self._vocabulary, text, form)
        self.begin()

    def begin(self) -> None:
        """Forgets the text so far. The next tokens are a prompt."""
        self.problem: str | None = None
        self._n_prompt: int | None = None
        self._matcher = self._fresh.deep_copy()
        # The tokens that the matcher has taken.
        self._followed: list[int] = []

    def for_text(self) -> "GrammarProcessor":
        """A processor of the same grammar for another text, which shares the time of masks."""
        made = copy.copy(self)
        made.begin()
        return made

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is a complete text of the grammar."""
        matcher = self._fresh.deep_copy()
        tokens = self._vocabulary.tokens.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def forced_tokens(self, context: Any, most: int) -> list[int]:
        """The tokens that come next whatever the model says, as far as the grammar tells.

        They are the tokenizer's own for a text without another way on. The state stays as it is.

        Args:
            context: The tokens so far (n,), of the prompt and the text.
            most: How many to return at most.
        """
        if self._follow(context) or self._time.is_over:
            return []
        forced: list[int] = self._time.spend(self._matcher.compute_ff_tokens)
        return forced[:most]

    def n_allowed(self, tokens: Any, guessed: list[int], vocab_size: int) -> int:
        """How many of ``guessed`` may follow ``tokens``, found without a mask."""
        if self._follow(tokens) or self._time.is_over:
            return 0
        known: int = self._time.spend(lambda: self._matcher.validate_tokens(guessed))
        return known

    def allowed(self, tokens: Any, vocab_size: int) -> np.ndarray | None:
        """The mask of the tokens that may come next, a bit for each.

        The bit of token t is bit t % 32 of word t // 32.

        Args:
            tokens: Those so far (n,), of the prompt and the text.
            vocab_size: The number of logits V. A token that the tokenizer does not have is allowed
                where all others are.

        Returns:
            (⌈V/32⌉,) uint32; None if every token is allowed.
        """
        self.problem = self._follow(tokens)
        known = self._vocabulary
        if self.problem is None:
            mask = np.frombuffer(self._time.spend(self._matcher.compute_bitmask), np.uint32)
            self.problem = self._error()
        if self.problem is not None:
            mask = known.words(known.end_tokens)
        if np.array_equal(mask, known.everything):
            return None
        words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        words[: len(mask)] = mask[: len(words)]
        return words

    def _follow(self, tokens: Any) -> str | None:
        """Brings the matcher to the end of the tokens so far, and returns what is wrong."""
        text = self._text_of(tokens)
        if self._matcher.is_error() and text[: len(self._followed)] != self._followed:
            # A guess has led it into the error.
            self._matcher = self._fresh.deep_copy()
            self._followed = []
        problem = self._error()
        if problem is not None:
            return problem
        shared = _n_shared(self._followed, text)
        n_wrong = len(self._followed) - shared
        if n_wrong:
            self._matcher.rollback(n_wrong)
        new = text[shared:]
        n_taken = 0
        if new:
            n_taken = self._time.spend(lambda: self._matcher.try_consume_tokens(new))
        self._followed = text[: shared + n_taken]
        if n_taken < len(new):
            stray = new[n_taken]
            if stray not in self._vocabulary.end_tokens:
                return f"the token {stray} is not allowed there"
        return self._error()

    def _text_of(self, tokens: Any) -> list[int]:
        """The tokens so far without those of the prompt."""
        if self._n_prompt is None:
            self._n_prompt = len(tokens)
        text: Any = tokens[self._n_prompt :]
        if isinstance(text, mx.array):
            return cast(list[int], text.tolist())
        return list(text)

    def _error(self) -> str | None:
        if self._time.is_over:
            return f"its masks take more than {self._time.seconds_per_mask:g} s each"
        if self._matcher.is_error():
            return str(self._matcher.get_error().splitlines()[0])
        return None


def _n_shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    n_both = min(len(one), len(other))
    for i in range(n_both):
        if one[i] != other[i]:
            return i
    return n_both


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
    if regex is not None:
        return GrammarProcessor(tokenizer, Grammar.from_regex(regex))
    return GrammarProcessor(tokenizer, Grammar.from_lark(cast(str, grammar)))
