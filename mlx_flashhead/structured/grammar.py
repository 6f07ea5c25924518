"""Text that a JSON schema, a regular expression or a Lark grammar allows: the checked descriptions,
and the logits processor that keeps to one.

llguidance reads the descriptions. Unsupported parts are errors, so none is ignored silently.
"""

import argparse
import copy
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from ..common.command import from_extra
from ..common.guarded import Guard, GuardError
from ..common.marks import keeps_state, preserves_margins

# Between the tokens of JSON: nothing, a space, or a new line with an indentation. The limit keeps
# small models from endless spaces.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ ]{0,24})?"}
# The character 0 and its spellings. mlx-lm's detokenizers write it as another one.
_ZERO = re.compile(r"\x00|\\(x00|u0000|U00000000|[xuU]\{0+\})")
# Rules of a grammar and references of a schema. llguidance calls itself for each of a chain.
MAX_RULES = 1000
_RULE = re.compile(r'^[ \t]*[?!]?\w+[^\n:"/]*:|"\$ref"', re.MULTILINE)
_GUARD = Guard(Path(__file__).with_name("grammar_check.py"))

# Seconds of computing that all masks may take in addition to a limit for each.
CREDIT_SECONDS = 0.1
# Seconds in which one mask must be there, if masks have a limit. llguidance cannot be interrupted.
MASK_SECONDS = 0.5
# Earley items of one mask. Large schemas need up to 10,000; the default of 50,000 takes seconds.
MAX_ITEMS = 10_000


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text. What makes one raises a ValueError if it is wrong."""

    kind: str  # "JSON schema", "regular expression" or "grammar"
    compiled: str  # in llguidance's form

    @classmethod
    def from_json_schema(cls, schema: dict | bool) -> "Grammar":
        """JSON of a schema, which must be satisfiable and use supported keys alone."""
        if not isinstance(schema, dict) and schema is not True:
            form = 'it must be an object such as {"type": "object"}'
            raise ValueError(f"The JSON schema is {schema!r:.60}: {form}.")
        compile_json = llguidance().LLMatcher.grammar_from_json_schema
        try:
            text = json.dumps({} if schema is True else schema)
            compiled = compile_json(text, defaults=_JSON_OPTIONS)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"The JSON schema is wrong: {_sentence(str(error))}.") from None
        return cls._checked("JSON schema", compiled)

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`."""
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"The regular expression is {pattern!r:.60}: it must be a text.")
        if _ZERO.search(pattern):
            zero = "holds the character 0, which no text has here"
            raise ValueError(f"The regular expression {pattern!r:.60} {zero}: leave it out.")
        compiled = llguidance().LLMatcher.grammar_from_regex(pattern)
        return cls._checked("regular expression", compiled, f" {pattern!r:.60}")

    @classmethod
    def from_lark(cls, text: str) -> "Grammar":
        """Text that a Lark grammar derives from ``start``, in llguidance's dialect of Lark."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The grammar is {text!r:.60}: it must be a text in Lark's form.")
        return cls._checked("grammar", llguidance().LLMatcher.grammar_from_lark(text))

    @classmethod
    def _checked(cls, kind: str, compiled: str, shown: str = "") -> "Grammar":
        if problem := _problem(compiled):
            where = ""
            if place := re.match(r"(?:at )?(\d+)\((\d+)\): *(.*)", problem, re.DOTALL):
                where, problem = f" at line {place[1]}, column {place[2]}", place[3]
            raise ValueError(f"The {kind}{shown} is wrong{where}: {_sentence(problem)}.")
        return cls(kind, compiled)


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json-schema``, ``--regex`` and ``--grammar``, which exclude each other."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    schema = "Write JSON that the JSON schema in this file allows."
    group.add_argument("--json-schema", metavar="FILE", help=schema)
    group.add_argument("--regex", help="Write text that this regular expression matches.")
    group.add_argument("--grammar", metavar="FILE", help="Write text of this Lark grammar.")


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """The description of the text, if it is right; None without any of the options."""
    if args.regex is not None:
        return Grammar.from_regex(args.regex)
    path = args.grammar if args.json_schema is None else args.json_schema
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if args.json_schema is None:
            return Grammar.from_lark(text)
        return Grammar.from_json_schema(json.loads(text))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not JSON ({where}): give a file with a schema.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def llguidance(module: str = "llguidance") -> ModuleType:
    """llguidance or one of its modules; a ValueError that names its extra if it is absent."""
    return from_extra(module, "structured", "Structured output")


@lru_cache(64)
def _problem(compiled: str) -> str:
    """llguidance's objection to a grammar; empty if there is none. A helper process runs it, since
    some grammars take all of a stack, or of the memory."""
    if (n_rules := len(_RULE.findall(compiled))) > MAX_RULES:
        most = f"at most {MAX_RULES:,} are followed: simplify it"
        return f"it has {n_rules:,} rules and references, and {most}"
    try:
        return _GUARD.call(compiled)
    except (GuardError, RuntimeError) as error:
        return f"it {error}: simplify it"


def _sentence(problem: str) -> str:
    """What a message of several lines says, without its full stop."""
    if unsupported := re.match(r"Unimplemented keys: \[(.*)\]", problem):
        return f"{unsupported[1]} is not supported"
    if cause := re.search(r"^\s*error: (.+)", problem, re.MULTILINE):
        return cause[1]
    return problem.strip().partition("\n")[0].rstrip(".:")


class GrammarProcessor:
    """A logits processor that rules out the tokens that a grammar does not allow next.

    A token's mask needs the tokens before it, so the processor waits for them, and the logits are
    computed meanwhile. After the grammar's end it allows end-of-text tokens only. One processor
    follows one sequence. A call may have fewer tokens than the one before, as in speculation.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        after: Tokens after which the text begins, such as the end of a thought.
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
        grammar: Grammar,
        *,
        after: Sequence[int] = (),
        seconds_per_mask: float = math.inf,
    ):
        self.grammar, self._seconds_per_mask = grammar, seconds_per_mask
        self._after = list(after)
        ends = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
        inner = getattr(tokenizer, "_tokenizer", tokenizer)  # within mlx-lm's
        self._vocabulary = _vocabulary(inner, tuple(sorted(ends)))
        self._matcher = self._new_matcher()
        self._seconds_left = [CREDIT_SECONDS]  # for the sequences that are made of it, too
        self._in_time(self._matcher.compute_bitmask)
        if self._seconds_left[0] <= 0 or "Too many items" in self._matcher.get_error():
            raise ValueError(f"The {grammar.kind} is too ambiguous to be followed: simplify it.")
        if self._matcher.is_error():
            raise ValueError(f"No text fits the {grammar.kind}: check that it can end.")
        self._seconds_left = [CREDIT_SECONDS]
        self.begin()
        self._mark()

    def _mark(self) -> None:
        """Says what loops may do with it: a mask leaves the distances of logits as they are."""
        preserves_margins(self)
        keeps_state(self, begin=self.begin, for_sequence=self.for_sequence)

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
        self.problem: str | None = None

    def for_sequence(self) -> "GrammarProcessor":
        """A processor of the same grammar for another sequence, which shares the time of masks."""
        made = copy.copy(self)
        made._matcher = self._matcher.deep_copy()
        made.begin()
        made._mark()
        return made

    def accepts(self, text: str) -> bool:
        """Whether ``text`` is a complete text of the grammar."""
        matcher, tokens = self._new_matcher(), self._vocabulary.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for each token that may not follow ``tokens`` (n,)."""
        mx.async_eval(logits)
        if self._n_prompt is None:
            self._n_prompt = len(tokens)
        generated: Any = tokens[self._n_prompt :]
        generated = generated.tolist() if isinstance(generated, mx.array) else list(generated)
        n_after = len(self._after)
        ends = range(n_after, len(generated) + 1)
        begin = next((end for end in ends if generated[end - n_after : end] == self._after), None)
        if begin is None:
            return logits
        if self._seconds_left[0] > 0:
            self._in_time(lambda: self._follow(generated[begin:]))
        return mx.where(mx.array(self._allowed(logits.shape[-1])), logits, -mx.inf)

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
        if self._seconds_left[0] <= 0:
            self.problem = f"its masks fail, or take more than {self._seconds_per_mask:g} s each"
        elif self._matcher.is_error():
            self.problem = self._matcher.get_error().splitlines()[0]
        elif left and left[0] not in ends:
            self.problem = f"the token {left[0]} is not allowed there"
        allowed = np.zeros(vocab_size, dtype=bool)
        if left or self.problem or self._matcher.is_stopped():
            allowed[[token for token in ends if token < vocab_size]] = True
        else:
            mask = np.frombuffer(self._mask, dtype=np.uint8)
            bits = np.unpackbits(mask, bitorder="little")[:vocab_size]
            allowed[: len(bits)] = bits
        return allowed


def grammar_processor(
    tokenizer: Any,
    *,
    json_schema: dict | bool | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> GrammarProcessor:
    """A logits processor for one text, of mlx-lm's or Hugging Face's ``tokenizer`` and one form.

    Args:
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


@lru_cache(4)
def _vocabulary(tokenizer: Any, eos_token_ids: tuple[int, ...]) -> Any:
    """llguidance's form of a tokenizer of Hugging Face, which takes a second to make."""
    return llguidance("llguidance.hf").from_tokenizer(tokenizer, eos_token=[*eos_token_ids])
