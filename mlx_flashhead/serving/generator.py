"""The thread that generates: mlx-lm's, which one bad request cannot end."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import mlx.core as mx

from ..models.compat import ResponseGenerator
from .provider import ModelRequest, RequestError


def until_stop(responses: Iterator[Any], stop_words: list[str]) -> Iterator[Any]:
    """mlx-lm's responses up to a stop word in their text, which ends with that word.

    mlx-lm itself stops at the tokens that the word alone is made of. In a text it may be made of
    others: a word after a space mostly is.
    """
    if not stop_words:
        yield from responses
        return
    longest = max(map(len, stop_words))
    text = ""
    for response in responses:
        text = text[-longest:] + response.text
        ends = [text.find(word) + len(word) for word in stop_words if word in text]
        if ends and response.finish_reason != "stop":
            surplus = len(text) - min(ends)
            shown = response.text[: len(response.text) - surplus]
            # mlx-lm's handler drops the text of a response that says "stop", and takes None for it
            yield replace(response, text=shown, finish_reason=None)
            return
        yield response


class FlashHeadGenerator(ResponseGenerator):
    """mlx-lm's generator of responses, for requests with settings of the FlashHead."""

    def __init__(self, model_provider, prompt_cache):
        # of the requests under way; here, since the thread starts in what follows
        self._answers = WeakSet()
        self._contexts = WeakValueDictionary()
        super().__init__(model_provider, prompt_cache)

    def generate(self, request, generation_args, progress_callback=None):
        """As mlx-lm's, with two more attributes of the request.

        ``head_settings`` is what it asks of the FlashHead, ``problem`` becomes the error that it
        ends with, if any.
        """
        model = generation_args.model
        model.model = ModelRequest(model.model, request.head_settings)
        try:
            context, responses = super().generate(request, generation_args, progress_callback)
        except Exception as error:
            request.problem = error
            raise
        self._contexts[id(context)] = context
        return context, until_stop(responses, generation_args.stop_words)

    def stop_and_join(self) -> None:
        """Ends the thread; answers under way end where they are."""
        for context in list(self._contexts.values()):
            context.stop()
        super().stop_and_join()

    def _next_request(self, timeout=None):
        request = super()._next_request(timeout)
        if request is not None:
            self._answers.add(request[0])
        return request

    def _run_generate(self):
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                logging.exception("The requests under way have failed")
                for answer in list(self._answers):
                    answer.put(error)
        mx.clear_streams()  # MLX asks for it at a thread's end, before the interpreter's

    def _tokenize(self, tokenizer, request, args):
        """As mlx-lm's; what would fail later, amid other requests, is refused here."""
        try:
            prompt, *rest = super()._tokenize(tokenizer, request, args)
        except Exception as error:
            raise RequestError(f"The prompt cannot be made of this request: {error}") from error
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise RequestError("chat_template_kwargs must leave the prompt a list of tokens.")
        if not prompt:
            raise RequestError("The prompt is empty: it needs at least one token.")
        vocab_size = self.model_provider.vocab_size
        for token in args.logits.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias names the token {token}, but this model has {vocab_size}: "
                    f"choose 0 to {vocab_size - 1}."
                )
        if args.sampling.top_k >= vocab_size:
            args.sampling.top_k = 0  # of all tokens, none is cut off
        request.tokenizer = tokenizer
        return prompt, *rest
