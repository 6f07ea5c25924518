"""The HTTP server: OpenAI's API for FlashHead models, and a page for browsers.

A request, traced. ``serve`` opens the port, and starts the engine, which loads the models by
``served_models`` in its own thread. uvicorn's event loop in the main thread does the rest.

1. ``connections`` limits connections and the time for a request to arrive. Its front door lets in
   what ``access`` allows, answers errors, and writes the log. ``page_files`` has the page.
2. ``endpoints`` reads the body, in ``turns`` of clients' addresses. ``bodies`` counts what it holds
   before any of it is made. ``requests`` declares and checks the fields. ``jobs`` fills in the chat
   template and makes tokens. A mistake is an ``ApiError`` of ``api_errors``.
3. Each answer is a job in the queue of ``engine``, the one thread that computes. Its prompt is read
   a chunk at a time, and decoded beside the others (``decoding``).
4. Each token comes back through the queue of its answer (``answers``). ``choices`` makes OpenAI's
   JSON of it.
"""
