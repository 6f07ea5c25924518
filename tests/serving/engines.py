"""Models and engines as the server has them, in this process, and the answers of their jobs."""

from pathlib import Path

import mlx_flashhead
from mlx_flashhead.serving.answer_text import Token
from mlx_flashhead.serving.jobs import Job
from mlx_flashhead.serving.prompts import Prompt
from mlx_flashhead.serving.requests import Request
from mlx_flashhead.serving.served_models import ServedModel
from mlx_flashhead.serving.server_options import make_parser

LONG = [2 + (7 * i) % 250 for i in range(400)]
SHORT = [40, 41, 42]
# The tests' engines read so many tokens of a prompt at once.
CHUNK = 16


def flags(*arguments):
    """The server's flags."""
    return make_parser().parse_args(["--model", "model", *map(str, arguments)])


def convert(dense: Path, name: str, n_probes: int) -> Path:
    """Converts a folder into another one beside it."""
    target = dense.parent / name
    options = {"calibration": "none", "progress": False}
    mlx_flashhead.convert(str(dense), str(target), n_probes=n_probes, **options)
    return target


def served_model(folder: Path, context=512) -> ServedModel:
    """A converted folder's model."""
    return ServedModel(("tiny",), *mlx_flashhead.load(str(folder)), None, context)


def checked(
    served: ServedModel, body: dict, *, chat: bool = True, arguments=(), further=(), **options
):
    """A request, read."""
    models = [served, *further]
    return Request(body, chat=chat, models=models, flags=flags(*arguments), **options)


def job(engine, tokens, max_tokens=8, processors=(), landmarks=(), **fields):
    """A job of a request with these fields."""
    body = {"prompt": "x", "max_tokens": max_tokens, "logprobs": 0} | fields
    request = checked(engine.models.result()[0], body, chat=False)
    new = Job(request, Prompt(list(tokens), landmarks))
    new.processors += processors
    return new


def submit(engine, *arguments, **fields):
    new = job(engine, *arguments, **fields)
    engine.submit([new])
    return new


def endless(engine, tokens):
    """A job whose answer has begun, and does not end by itself."""
    new = submit(engine, tokens, 10_000, logit_bias={"50": 100})
    until(new, Token)
    return new


def until(job, kind):
    """The next event of a kind."""
    while True:
        _, event = job.events.get(timeout=30)
        if isinstance(event, kind):
            return event


def next_token(job):
    """The next token of an answer; raises what has ended the answer, if it failed."""
    event = until(job, Token | BaseException)
    if isinstance(event, BaseException):
        raise event
    return event


def tokens_of(job):
    """All tokens of an answer, but an end token; raises what has ended the answer, if it failed."""
    found = []
    while True:
        token = next_token(job)
        found += [token_id for (token_id, _), *_ in token.logprobs]
        if token.finish_reason is not None:
            return found


def whole_answer(job):
    """All tokens of an answer in one; raises what has ended the answer, if it failed."""
    answer = Token()
    while answer.finish_reason is None:
        answer.add(next_token(job))
    return answer


def generated(flash, tokens, max_tokens=8, **options):
    """The same by the package, with the normal head."""
    options["dense"] = True
    responses = mlx_flashhead.stream_generate(*flash, tokens, max_tokens=max_tokens, **options)
    return [r.token for r in responses if r.token not in flash[1].eos_token_ids]
