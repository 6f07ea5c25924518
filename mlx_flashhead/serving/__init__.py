"""The HTTP server: OpenAI's and Anthropic's APIs for FlashHead models, and a page for browsers.

A request, traced. ``serve`` opens the port, and starts the engine, which loads the models by
``served_models`` in its own thread. uvicorn's event loop in the main thread does the rest.

1. ``connections`` limits connections and the time for a request to arrive. Its front door lets in
   what ``access`` allows, answers errors, and writes the log.
2. ``endpoints`` has the paths. It reads a body in ``turns`` of clients' addresses, and ``bodies``
   counts what it holds before any of it is made. ``page_files`` has the page.
3. A ``Completion`` is the response to a request for texts. Its path says which of the ``dialects``
   it has: those of ``choices``, ``messages`` or ``responses``. The last two make a chat's fields of
   theirs, by ``content_parts``, so that all requests are one from here on. ``completion_fields``
   declares the fields, which ``fields`` reads, and ``requests`` checks them, with the
   ``tool_calls``. ``prompts`` fills in the chat template, and makes tokens.
4. Each of its texts is one of the ``jobs``, with a sampler, in the queue of ``engine``, the one
   thread that computes. In ``stages`` a prompt is read a chunk at a time, then decoded.
5. ``answer_text`` says what a token adds, and the dialect makes events or a body of it.

A mistake is an ``ApiError`` of ``api_errors``.
"""
