"""mlx-lm's functions ``stream_generate``, ``generate`` and ``batch_generate`` with FlashHead.

The choices are those of the dense model.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from inspect import signature
from typing import Any, TypeVar, Unpack, cast

import mlx.core as mx
import mlx.nn as nn

from ..common.verbose import print_finished, print_statistics, print_text
from ..head.flash_head import FlashHead
from ..models.compat import mlx_lm as compat
from ..models.compat.mlx_lm import BatchResponse, GenerationResponse, TokenizerWrapper
from ..models.install import NO_FLASH_HEAD, get_flash_head
from ..models.trained_drafter import TrainedDrafter
from ..models.vlm import is_vlm
from .batch import Response, VerifiedBatchGenerator, check_batched_lookup
from .drafting import drafted_tokens
from .guessing.draft_model import draft_report
from .guessing.trained import drafter_report
from .loop import GuessedTokens, verified_tokens, with_guesses
from .proposer import Proposer
from .sampling import Processor, SamplerFunction
from .settings import (
    CacheOptions,
    DecodeOptions,
    DecodingSettings,
    GenerateOptions,
    SettingsOptions,
    StreamOptions,
    check_keywords,
    check_prompt,
)

# What there is of a text.
Held = TypeVar("Held")


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    max_tokens: int = 256,
    draft_model: nn.Module | TrainedDrafter | None = None,
    stream: Any = compat.generation_stream,
    *,
    logprobs: bool = True,
    **kwargs: Unpack[StreamOptions],
) -> Generator[GenerationResponse, None, None]:
    """Streams text from ``model``: ``mlx_lm.stream_generate`` with settings for the FlashHead.

    The text is the dense model's: the FlashHead proposes tokens, and the dense rows verify them
    before they are handed out. With a sampler or processor that is not known, the normal (dense)
    head decodes and calls it once a token.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompt: Text, token ids or an array of them.
        max_tokens: The most tokens of the text; -1 is no limit.
        draft_model: A smaller model, or a trained drafter, that guesses tokens, which the target
            verifies.
        stream: The stream of MLX that computes.
        logprobs: Whether the responses need log-probabilities, which are the dense model's.
        **kwargs: The settings n_probes, verify, dense, draw_temperature and max_wait, which
            :class:`DecodingSettings` explains, and mlx_lm's other keywords, such as sampler,
            logits_processors and prompt_cache: :class:`StreamOptions` has them all.

    Yields:
        mlx-lm's responses.

    Raises:
        ValueError: If the model has no FlashHead, a setting is not valid, or as from mlx-lm.
        TypeError: If there is no such keyword, or the prompt is a list of messages.
    """
    check_prompt(prompt)
    check_keywords(kwargs, StreamOptions.__annotations__)
    options = cast(dict[str, Any], kwargs)
    proposer = make_proposer(model, DecodingSettings.taken_from(options))
    yield from _responses(
        model,
        tokenizer,
        prompt,
        proposer=proposer,
        max_tokens=max_tokens,
        draft_model=draft_model,
        stream=stream,
        logprobs=logprobs,
        **options,
    )


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    verbose: bool = False,
    **kwargs: Unpack[GenerateOptions],
) -> str:
    """Generates a complete text: ``mlx_lm.generate`` with settings for the FlashHead.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompt: Text, token ids or an array of them.
        verbose: Print the text as it goes, and its speed.
        **kwargs: Those of :func:`stream_generate`; :class:`GenerateOptions` has them all.

    Returns:
        The text.

    Raises:
        ValueError: If the model has no FlashHead, a setting is not valid, or as from mlx-lm.
        TypeError: If there is no such keyword, or the prompt is a list of messages.
    """
    check_prompt(prompt)
    check_keywords(kwargs, GenerateOptions.__annotations__)
    options = cast(dict[str, Any], kwargs)
    proposer = make_proposer(model, DecodingSettings.taken_from(options))
    options.setdefault("logprobs", False)
    responses = _responses(model, tokenizer, prompt, proposer=proposer, **options)
    if not verbose:
        return "".join(response.text for response in responses)
    how_it_was_decoded = partial(_how_it_was_decoded, proposer, options.get("draft_model"))
    return print_text(responses, how_it_was_decoded)


def batch_generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[list[int]],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | list[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    **kwargs: Any,
) -> BatchResponse:
    """Generates texts for several prompts at once.

    It is ``mlx_lm.batch_generate`` with settings for the FlashHead.

    Args:
        model: A model loaded by ``mlx_flashhead.load``, or any dense one.
        tokenizer: Its tokenizer.
        prompts: The token ids of each prompt.
        prompt_caches: Caches that hold the beginning of each text; they are not changed.
        max_tokens: The most tokens of each text: one number, or a list.
        verbose: Print the progress and the speed.
        return_prompt_caches: Whether the caches are wanted.
        return_token_ids: Whether the token ids are wanted.
        return_logprobs: Whether the log-probability of each token is wanted.
        **kwargs: The settings of :class:`DecodingSettings`, and keywords of mlx-lm's
            ``BatchGenerator``, such as sampler and logits_processors. Each prompt gets its own copy
            of a processor that keeps a state, as a grammar's does.

    Returns:
        mlx-lm's response.

    Raises:
        ValueError: If a setting is not valid for the model, or as from mlx-lm.
        TypeError: If there is no such keyword.
    """
    known = {*signature(compat.BatchGenerator).parameters, *SettingsOptions.__annotations__}
    check_keywords(kwargs, known)
    proposer = make_proposer(model, DecodingSettings.taken_from(kwargs))
    check_batched_lookup(proposer, kwargs.get("max_kv_size"))
    generator = VerifiedBatchGenerator(
        model,
        proposer=proposer,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        logprobs=return_logprobs,
        **kwargs,
    )
    n_prompts = len(prompts)
    if verbose:
        print_finished(0, n_prompts)
    limits = _limit_of_each(max_tokens, n_prompts)
    uids = generator.insert(prompts, limits, caches=prompt_caches)
    token_ids: dict[int, list[int]] = {uid: [] for uid in uids}
    logprobs: dict[int, list[float]] = {uid: [] for uid in uids}
    caches: dict[int, list[Any] | None] = {}
    try:
        with generator.stats() as stats:
            for response in _batch_responses(generator):
                if response.finish_reason is not None:
                    caches[response.uid] = response.prompt_cache
                    if verbose:
                        print_finished(len(caches), n_prompts)
                if response.finish_reason == "stop":
                    continue
                token_ids[response.uid].append(response.token)
                if return_logprobs:
                    logprob = cast(float, response.logprobs[response.token].item())
                    logprobs[response.uid].append(logprob)
    finally:
        generator.close()
    texts = [tokenizer.decode(token_ids[uid]) for uid in uids]
    if verbose:
        print_finished(len(caches), n_prompts, is_last=True)
        print_statistics(stats, prefix="[batch_generate] ")
    return compat.batch_response(
        texts=texts,
        stats=stats,
        caches=_where_wanted(return_prompt_caches, caches, uids),
        token_ids=_where_wanted(return_token_ids, token_ids, uids),
        logprobs=_where_wanted(return_logprobs, logprobs, uids),
    )


def _limit_of_each(max_tokens: int | list[int], n_prompts: int) -> list[int]:
    """The most tokens of each text, where one number may stand for all."""
    if isinstance(max_tokens, int):
        return [max_tokens] * n_prompts
    return max_tokens


def _where_wanted(wanted: bool, of_texts: dict[int, Held], uids: list[int]) -> list[Held] | None:
    """What there is of each text, in the order of the prompts; None where it is not wanted."""
    if not wanted:
        return None
    return [of_texts[uid] for uid in uids]


def _batch_responses(generator: VerifiedBatchGenerator) -> Iterator[Response]:
    """The responses of all texts, one after the other."""
    while responses := generator.next_generated():
        yield from responses


def make_proposer(model: nn.Module, settings: DecodingSettings) -> Proposer:
    """Makes a proposer with the settings of a call.

    Raises:
        ValueError: Before anything is computed, if a setting is not valid for the model.
    """
    if is_vlm(model):
        raise ValueError(
            "This is a model of mlx-vlm: generate with mlx_vlm.generate, which uses its FlashHead."
        )
    head = get_flash_head(model)
    if head is not None:
        with head.settings(
            dense=settings.dense,
            n_probes=settings.n_probes,
            draw_temperature=settings.draw_temperature,
        ):
            pass
    elif settings.n_probes is not None or settings.draw_temperature is not None:
        raise ValueError(NO_FLASH_HEAD)
    return Proposer(model, settings)


def prompt_ids(tokenizer: Any, prompt: Any) -> mx.array:
    """The token ids (n,) of a prompt, as ``mlx_lm.stream_generate`` makes them."""
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        adds = bos is None or not prompt.startswith(bos)
        prompt = tokenizer.encode(prompt, add_special_tokens=adds)
    return mx.array(prompt)


def _responses(
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    *,
    proposer: Proposer,
    max_tokens: int = 256,
    draft_model: nn.Module | TrainedDrafter | None = None,
    stream: Any = compat.generation_stream,
    logprobs: bool = True,
    **kwargs: Unpack[DecodeOptions],
) -> Generator[GenerationResponse, None, None]:
    """A text as mlx-lm's responses: prompt → tokens → detokenizer."""
    if max_tokens == 0:
        raise ValueError("Maximum number of tokens must be non-zero (use -1 for no limit).")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    prompt = prompt_ids(tokenizer, prompt)
    detokenizer = tokenizer.detokenizer
    tokens = _tokens(
        prompt,
        model,
        draft_model,
        stream,
        proposer=proposer,
        logprobs=logprobs,
        max_tokens=max_tokens,
        **kwargs,
    )
    with compat.wired_limit(model, [stream]), closing(tokens):
        began = time.perf_counter()
        for n, (token, token_logprobs, from_draft) in enumerate(tokens, 1):
            if n == 1:
                prompt_tps = prompt.size / (time.perf_counter() - began)
                began = time.perf_counter()
            is_end = token in tokenizer.eos_token_ids
            if not is_end:
                detokenizer.add_token(token)
            finish_reason = _finish_reason(is_end, n == max_tokens)
            if finish_reason is not None:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=token,
                # None where they are not wanted.
                logprobs=cast(mx.array, token_logprobs),
                from_draft=from_draft,
                prompt_tokens=prompt.size,
                prompt_tps=prompt_tps,
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - began),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                return


def _finish_reason(is_end: bool, is_at_limit: bool) -> str | None:
    """Why a text ends at a token, in mlx-lm's words; None where it goes on."""
    if is_end:
        return "stop"
    if is_at_limit:
        return "length"
    return None


def _tokens(
    prompt: mx.array,
    model: nn.Module,
    draft_model: nn.Module | TrainedDrafter | None,
    stream: Any,
    *,
    proposer: Proposer,
    logprobs: bool,
    max_tokens: int,
    sampler: SamplerFunction | None = None,
    logits_processors: list[Processor] | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    num_draft_tokens: int = 2,
    **options: Unpack[CacheOptions],
) -> GuessedTokens:
    """The tokens of a text, from the loop with a draft model or from the one without."""
    if draft_model is not None:
        if input_embeddings is not None:
            raise ValueError("Speculative decoding does not support input embeddings.")
        _check_verified(proposer.settings)
        return drafted_tokens(
            prompt,
            model,
            draft_model,
            stream,
            proposer=proposer,
            max_tokens=max_tokens,
            num_draft_tokens=num_draft_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
            prompt_cache=prompt_cache,
            **options,
        )
    tokens = verified_tokens(
        prompt,
        model,
        stream,
        proposer=proposer,
        logprobs=logprobs,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        prompt_cache=prompt_cache,
        max_kv_size=max_kv_size,
        prompt_progress_callback=prompt_progress_callback,
        input_embeddings=input_embeddings,
        **options,
    )
    return with_guesses(tokens, proposer)


def _check_verified(settings: DecodingSettings) -> None:
    """Refuses drafts that nothing would verify, as the commands do.

    Raises:
        ValueError: If FlashHead alone shall choose.
    """
    if not settings.verify:
        raise ValueError("`verify=False` verifies no guesses: leave `draft_model` out.")
    if settings.draw_temperature is not None:
        raise ValueError("`draw_temperature` verifies no guesses: leave `draft_model` out.")


def _how_it_was_decoded(
    proposer: Proposer,
    draft_model: nn.Module | TrainedDrafter | None,
    latest: GenerationResponse,
) -> Iterator[str]:
    """Says in lines what has guessed, proposed and verified a text, up to its latest token."""
    if proposer.n_guessed or draft_model is not None:
        yield _guesses_line(proposer, latest.generation_tokens)
    if isinstance(draft_model, TrainedDrafter):
        yield f"Drafts: {drafter_report(draft_model, proposer.model)}"
    elif draft_model is not None:
        yield f"Drafts: {draft_report(draft_model)}"
    elif proposer.head is not None:
        yield _head_line(proposer, proposer.head)


def _guesses_line(proposer: Proposer, n_tokens: int) -> str:
    """How many of a text's ``n_tokens`` were guessed."""
    by = ""
    if proposer.n_guessed:
        judged = proposer.judged
        by = f" ({', '.join(_depth_and_share(name, judged[name]) for name in proposer.n_guessed)})"
    n_guessed = proposer.n_guessed.total()
    return f"Guessed: {n_guessed:,} of {n_tokens:,} tokens{by}, {proposer.n_steps:,} steps"


def _depth_and_share(name: str, judged: list[tuple[int, int]]) -> str:
    """What has guessed, how many tokens at a time, and how many of them were right.

    Args:
        name: Of what has guessed.
        judged: The tokens of each guess, and how many of them were right.
    """
    n_made = sum(n for n, _ in judged)
    n_right = sum(n_right for _, n_right in judged)
    return f"{name}, {round(n_made / len(judged))} deep, {100 * n_right / n_made:.0f} %"


def _head_line(proposer: Proposer, head: FlashHead) -> str:
    """What was used of the FlashHead."""
    if not proposer.unverified and not proposer.n_verifications:
        return "FlashHead: not used, the normal (dense) head chose every token"
    n_probes = proposer.settings.n_probes or head.n_probes
    if proposer.unverified:
        n_probes = proposer.settings.n_probes or head.unverified_probes
    clusters = f"{n_probes:,} of {head.n_clusters:,} clusters a token"
    if proposer.unverified:
        return f"FlashHead: unverified, {clusters}"
    counts = (
        f"{proposer.n_verifications:,} verifications, {proposer.n_rejected:,} proposals rejected"
    )
    return f"FlashHead: {clusters}, {counts}"
