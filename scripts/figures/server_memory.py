"""What a server's memory holds under load: docs/server.md.

    python scripts/figures/server_memory.py MODEL --tokens 500 --prompts 16

The server runs in this process, so that MLX can be asked for the bytes of its arrays. The prompts
are random tokens, so none begins as another does.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from random import Random
from threading import Thread

import mlx.core as mx
from rich.table import Table

from measured_server import HOST, free_port, is_healthy
from mlx_flashhead import server
from mlx_flashhead.common.arguments import Parser, whole_number
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import megabytes, new_table, show

ANSWER_TOKENS = 8
# Seconds. The engine stores a prompt's cache after it has answered.
PAUSE = 2.0
# Ids that no model lacks.
IDS = range(5, 250)


def make_parser() -> Parser:
    """The parser of this script."""
    parser = Parser(prog="server_memory.py", description="What a server's memory holds.")
    parser.add_argument("model", help="Folder or Hugging Face repository.")
    parser.add_argument("--tokens", type=whole_number(1), default=500, help="Of each prompt.")
    parser.add_argument("--prompts", type=whole_number(1), default=16, help="At once.")
    parser.add_argument("--flags", default="", help="Flags of the server, in quotes.")
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    port = free_port()
    sys.argv = ["server", "--model", args.model, "--port", str(port), "--log-level", "WARNING"]
    sys.argv += shlex.split(args.flags)
    Thread(target=measure, args=(port, args.tokens, args.prompts), daemon=True).start()
    server.main()


def measure(port: int, n_tokens: int, n_prompts: int) -> None:
    """Measures at the start, and after prompts that come at once. Then it ends the server."""
    try:
        table = new_table(None, ["", "process", "arrays", "at most", "free buffers"])
        while not is_healthy(port):
            time.sleep(PAUSE)
        add_row(table, "at the start")
        ask(port, 0, 8)
        add_row(table, "after a short prompt")
        with ThreadPoolExecutor(n_prompts) as clients:
            asked = [clients.submit(ask, port, seed, n_tokens) for seed in range(1, n_prompts + 1)]
        for answer in asked:
            answer.result()
        add_row(table, f"after {n_prompts} prompts of {n_tokens:,} tokens")
        show(table)
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def ask(port: int, seed: int, n_tokens: int) -> None:
    """Has a prompt of random tokens answered."""
    random = Random(seed)
    body = {"prompt": random.choices(IDS, k=n_tokens), "max_tokens": ANSWER_TOKENS}
    connection = HTTPConnection(HOST, port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise ValueError(f"The server answers {response.status}: {answer[:200]!r}.")
    connection.close()


def add_row(table: Table, when: str) -> None:
    """Adds what the process has now, and its arrays."""
    time.sleep(PAUSE)
    words = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    kilobytes = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    figures = [
        1024 * kilobytes,
        mx.get_active_memory(),
        mx.get_peak_memory(),
        mx.get_cache_memory(),
    ]
    table.add_row(when, *map(megabytes, figures))


if __name__ == "__main__":
    main()
