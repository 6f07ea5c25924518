"""How close FlashHead comes to the dense head: each way to measure is a file.

A way has ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(args)``, which returns
figures that are JSON-ready.
"""
