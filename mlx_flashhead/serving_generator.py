"""The thread that generates: mlx-lm's, which one bad request cannot end."""

import logging
from weakref import WeakSet

import mlx.core as mx

from .compat import ResponseGenerator
from .serving_provider import ModelRequest


class FlashHeadGenerator(ResponseGenerator):
    """mlx-lm's generator of responses, for requests with settings of the FlashHead."""

    def __init__(self, model_provider, prompt_cache):
        self._answers = WeakSet()  # of the requests under way; before the thread starts
        super().__init__(model_provider, prompt_cache)

    def generate(self, request, generation_args, progress_callback=None):
        """As mlx-lm's; ``request.head_settings`` is what the request asks of the head."""
        model = generation_args.model
        model.model = ModelRequest(model.model, request.head_settings)
        return super().generate(request, generation_args, progress_callback)

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
        prompt, *rest = super()._tokenize(tokenizer, request, args)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise ValueError("chat_template_kwargs must leave the prompt a list of tokens.")
        if not prompt:
            raise ValueError("The prompt is empty: it needs at least one token.")
        return prompt, *rest
