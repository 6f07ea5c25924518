"""The HTTP server: OpenAI's API for FlashHead models, and a page for browsers.

A request, traced. ``serve`` opens the port, and starts the engine, which loads the models by
``served_models`` in its own thread. uvicorn's event loop in the main thread does the rest.

1. ``connections`` limits uvicorn's connections, and the time for a request to arrive.
2. ``access`` checks whether it may be served: its Host, Origin, token and size. It answers
   errors, and writes the log. Files of the page come from ``page_files``.
3. ``endpoints`` reads the body: ``requests`` checks each field, ``jobs`` fills
   in the chat template and makes tokens. A mistake is an ``ApiError`` (``api_error``).
4. Each answer is a job (``jobs``) in the queue of ``engine``, the one thread that
   computes. It reads the prompt a chunk at a time, from the longest beginning that is kept
   (``prefill``), and decodes it beside the others (``decoding``).
5. Each token comes back through the answer's queue: its text, its calls of tools,
   and its log-probabilities. ``completions`` makes OpenAI's JSON of them, which
   ``endpoints`` sends whole or in chunks.
"""
