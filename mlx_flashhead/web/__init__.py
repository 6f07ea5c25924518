"""The page for browsers, and who may open it and the API on a local network.

Nothing in here knows a model: `access` holds the rules as pure functions, `handler` applies them to
requests and hands out the files in ``page/``, `lan` finds the address and prints its QR code.
"""
