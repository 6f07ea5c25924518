"""The logits processor that keeps a text to a grammar, and to the form of calls of tools."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.marks import keeps_state, masks
from .call_start import CallStart
from .dialects import FormatMarks
from .grammar import FORM_OF_CALLS, Grammar, ToolCalls
from .matchers import MaskTime, Run, checked_matcher, make_matcher
from .text_follower import TextFollower, TextRules
from .vocabulary import vocabulary_of


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
        self._vocabulary = vocabulary_of(tokenizer)
        self._time = MaskTime(seconds_per_mask)  # of the processors for other sequences, too
        self._rules = self._make_rules(required, after, thought)
        self._time.renew()
        self.begin()
        self._mark()

    def _mark(self) -> None:
        """Says what loops may do with it: a mask leaves the distances of logits as they are."""
        masks(self, self.allowed_words)
        keeps_state(self, begin=self.begin, for_sequence=self.for_sequence)

    def _make_rules(
        self, required: bool, after: Sequence[int], thought: tuple[str, str] | None
    ) -> TextRules:
        """What the text may be, with all that takes time before its first token."""
        vocabulary = self._vocabulary
        end_of_thought = b"".join(map(vocabulary.text_of, after)).decode()
        if thought is not None and not after:
            end_of_thought = thought[1]
        end_mark = vocabulary.mark(end_of_thought) if end_of_thought else None
        has_form = self.grammar is not None or required
        forms = self._make_forms(None if after else thought) if has_form else []
        call_start = None
        if self.calls is not None:
            section = checked_matcher(vocabulary, self.calls.section, self._time)
            call_start = CallStart(vocabulary, self.calls, section)
        return TextRules(vocabulary, has_form, forms, call_start, bool(after), end_mark)

    def _make_forms(self, thought: tuple[str, str] | None) -> list[Run]:
        """What the whole text may be: any of these."""
        forms = []
        if self.grammar is not None:
            forms.append(Run(checked_matcher(self._vocabulary, self.grammar, self._time), "form"))
        if self.calls is not None:
            calls = checked_matcher(self._vocabulary, self.calls.only, self._time)
            forms.append(Run(calls, "calls"))
        if thought is not None:
            opening = FormatMarks(self._vocabulary.special).expression(thought[0])
            beginning = Grammar(FORM_OF_CALLS, f"start: /[ \\n]{{0,2}}/ {opening}")
            forms.append(Run(make_matcher(self._vocabulary, beginning), "thought"))
        return forms

    def begin(self) -> None:
        """Forgets the text so far. The next tokens are a prompt."""
        self.problem: str | None = None
        self._n_prompt: int | None = None
        self._text = TextFollower(self._rules)

    def for_sequence(self) -> "GrammarProcessor":
        """A processor of the same grammar for another sequence, which shares the time of masks."""
        made = copy.copy(self)
        made.begin()
        made._mark()
        return made

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is a complete text of the grammar."""
        assert self.grammar is not None
        matcher = make_matcher(self._vocabulary, self.grammar)
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
            vocab_size: The number of logits V; by default the number of the tokenizer's tokens. A
                token that the tokenizer does not have is allowed in a free text alone. Bits beyond
                V have no meaning.

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
        if not self._time.is_over:
            self._time.spend(lambda: self._text.follow(generated))
        mask = self._text.mask
        self.problem = self._find_problem()
        if self.problem is not None:
            mask = self._vocabulary.words(self._vocabulary.end_tokens)
        if mask is None:
            return None
        # in a free text, what the tokenizer does not know is as allowed as without a mask
        is_free = self._text.place.is_free and self.problem is None
        further = 0xFFFFFFFF if is_free else 0
        words = np.full(-(-vocab_size // 32), further, dtype=np.uint32)
        words[: len(mask)] = mask[: len(words)]
        return words

    def _find_problem(self) -> str | None:
        if self._time.is_over:
            return f"its masks fail, or take more than {self._time.seconds_per_mask:g} s each"
        error = self._text.error()
        if error is not None:
            return error
        stray = self._text.place.stray
        if stray is not None and stray not in self._vocabulary.end_tokens:
            return f"the token {stray} is not allowed there"
        return None


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
