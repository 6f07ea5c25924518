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
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..common.command import from_extra
from ..common.guarded import Guard, GuardError

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

# llguidance's form of each tokenizer with its end-of-text tokens, which takes a second to make.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()


class GrammarError(ValueError):
    """A wrong schema, expression or grammar; the message says what is wrong in it."""


@dataclass(frozen=True)
class Grammar:
    """A checked description of a text. What makes one raises a GrammarError if it is wrong."""

    kind: str  # "JSON schema", "regular expression" or "grammar"
    compiled: str  # in llguidance's form

    @classmethod
    def from_json_schema(cls, schema: dict | bool) -> "Grammar":
        """JSON of a schema, which must be satisfiable and use supported keys alone. ``{"type":
        "object"}`` stands for any JSON object."""
        if not isinstance(schema, dict | bool):
            form = 'it must be an object such as {"type": "object"}'
            raise GrammarError(f"The JSON schema is {_shown(schema)}: {form}.")
        if schema is False:
            raise GrammarError("The JSON schema is false, which no text fits: give an object.")
        compile_json, compiled = llguidance().LLMatcher.grammar_from_json_schema, ""
        try:
            text = json.dumps({} if schema is True else schema)
            compiled = compile_json(text, defaults=_JSON_OPTIONS)
            problem = _problem(compiled)
        except RecursionError:
            problem = "it is nested too deeply"
        except ValueError as error:
            problem = str(error)
        if problem:
            raise GrammarError(f"The JSON schema is wrong: {_sentence(problem)}.")
        return cls("JSON schema", compiled)

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`."""
        if not isinstance(pattern, str) or not pattern:
            raise GrammarError(f"The regular expression is {_shown(pattern)}: it must be a text.")
        if _ZERO.search(pattern):
            zero = "holds the character 0, which no text has here"
            raise GrammarError(f"The regular expression {_shown(pattern)} {zero}: leave it out.")
        compiled = llguidance().LLMatcher.grammar_from_regex(pattern)
        if problem := _problem(compiled):
            error = re.search(r"error: ([^\n]+)", problem)
            reason = error[1] if error else _sentence(problem)
            raise GrammarError(f"The regular expression {pattern!r} is wrong: {reason}.")
        return cls("regular expression", compiled)

    @classmethod
    def from_lark(cls, text: str) -> "Grammar":
        """Text that a Lark grammar derives from ``start``, in llguidance's dialect of Lark."""
        if not isinstance(text, str) or not text.strip():
            raise GrammarError(f"The grammar is {_shown(text)}: it must be a text in Lark's form.")
        compiled = llguidance().LLMatcher.grammar_from_lark(text)
        if problem := _problem(compiled):
            where = ""
            if place := re.match(r"(?:at )?(\d+)\((\d+)\): *(.*)", problem, re.DOTALL):
                where, problem = f" at line {place[1]}, column {place[2]}", place[3]
            raise GrammarError(f"The grammar is wrong{where}: {_sentence(problem)}.")
        return cls("grammar", compiled)


def add_grammar_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json-schema``, ``--regex`` and ``--grammar``, which exclude each other."""
    group = parser.add_argument_group("structured output").add_mutually_exclusive_group()
    json_schema = "Write JSON that the JSON schema in this file allows."
    group.add_argument("--json-schema", metavar="FILE", help=json_schema)
    group.add_argument("--regex", help="Write text that this regular expression matches.")
    grammar = "Write text that the Lark grammar in this file allows."
    group.add_argument("--grammar", metavar="FILE", help=grammar)


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """The description of the text, if it is right; None without any of the options."""
    option, path = "--json-schema", args.json_schema
    if path is None:
        option, path = "--grammar", args.grammar
    try:
        if path is None:
            return None if args.regex is None else Grammar.from_regex(args.regex)
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if option == "--grammar":
            return Grammar.from_lark(text)
        return Grammar.from_json_schema(json.loads(text))
    except GrammarError as error:
        raise GrammarError(f"{path}: {error}" if path else str(error)) from None
    except UnicodeDecodeError:
        reason = "is not UTF-8 text: check the file."
    except OSError as error:
        reason = f"cannot be read ({error.strerror}): check the path."
    except RecursionError:
        reason = "is nested too deeply: simplify it."
    except json.JSONDecodeError as error:
        reason = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
    raise ValueError(f"{option} {path} {reason}")


def llguidance(submodule: str = "") -> ModuleType:
    """llguidance or one of its modules; a ValueError that names its extra if it is absent."""
    name = f"llguidance.{submodule}" if submodule else "llguidance"
    return from_extra(name, "structured", "Structured output")


@lru_cache(64)
def _problem(compiled: str) -> str:
    """llguidance's objection to a grammar; empty if there is none. A helper process runs it, since
    some grammars take all of a stack, or of the memory."""
    n_rules = sum(1 for _ in _RULE.finditer(compiled))
    if n_rules > MAX_RULES:
        most = f"at most {MAX_RULES:,} are followed: simplify it"
        return f"it has {n_rules:,} rules and references, and {most}"
    try:
        return _GUARD.call(compiled)
    except (GuardError, RuntimeError) as error:
        return f"it {error}: simplify it"


def _sentence(problem: str) -> str:
    """The first line of a message, without its full stop."""
    if unsupported := re.match(r"Unimplemented keys: \[(.*)\]", problem):
        return f"{unsupported[1]} is not supported"
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    if lines and lines[0].startswith("regex parse error"):
        lines = [f"no regular expression, {lines[-1].removeprefix('error: ')}"]
    return lines[0].rstrip(".:") if lines else "it cannot be followed"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"


class GrammarProcessor:
    """A logits processor that rules out the tokens that a grammar does not allow next.

    It fits every loop that gives a processor the tokens so far and the logits. A token's mask needs
    the tokens before it, so the processor waits for them, and the logits are computed meanwhile.
    After the grammar's end it allows end-of-text tokens only. One processor follows one sequence. A
    call may have fewer tokens than the call before, as in speculative decoding.

    Args:
        tokenizer: mlx-lm's or Hugging Face's tokenizer.
        after: Tokens after which the text begins, such as the end of a thought. Until then every
            token is allowed.
        seconds_per_mask: Seconds of computing that a mask may take on average, over this processor
            and the ones that :meth:`for_sequence` makes. Beyond it their texts end, and ``problem``
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
        self._matcher = self._new_matcher()
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
        matcher, tokens = self._new_matcher(), self._vocabulary.tokenize_bytes(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        """Logits (1, V) with -inf for each token that may not follow ``tokens`` (n,)."""
        mx.async_eval(logits)
        if self._n_prompt is None:
            self._n_prompt = len(tokens)
        generated: Any = tokens[self._n_prompt :]
        generated = generated.tolist() if isinstance(generated, mx.array) else list(generated)
        ends = range(len(self._after), len(generated) + 1)
        ends_there = (end for end in ends if generated[end - len(self._after) : end] == self._after)
        begin = next(ends_there, None)
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


def _vocabulary(tokenizer: Any) -> Any:
    """llguidance's tokenizer for one of mlx-lm's or Hugging Face's."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if not hasattr(inner, "backend_tokenizer"):
        raise ValueError(
            "Structured output needs a tokenizer of the tokenizers library, but this one is a "
            f"{type(inner).__name__}: use another model."
        )
    ends = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
    ends = tuple(sorted(ends))
    made = _vocabularies.setdefault(inner, {})
    if ends not in made:
        made[ends] = llguidance("hf").from_tokenizer(inner, eos_token=list(ends))
    return made[ends]
