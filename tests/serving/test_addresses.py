"""What the terminal shows when the server opens to the network, and the token's file."""

import asyncio
import io
import os
import signal
import socket
import stat
import sys
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pyte
import pytest
import zxingcpp

from engines import flags
from mlx_flashhead.serving import serve
from mlx_flashhead.serving.access import Access, access_of, kept_token
from mlx_flashhead.serving.serve import announce, own_address, url
from mlx_flashhead.serving.server_options import DEFAULT_TOKEN_FILE, is_loopback
from scripted_server import TOKEN


def scanned(lines):
    """What a camera reads from a terminal with light letters on dark ground."""
    lines = list(lines)
    width = max(map(len, lines))
    rows = []
    for line in lines:
        # A letter has two points, one above the other.
        for light_letters in ("█▀", "█▄"):
            rows.append([letter in light_letters for letter in line.ljust(width)])
    image = np.kron(np.array(rows, np.uint8) * 255, np.ones((6, 6), np.uint8))
    return zxingcpp.read_barcode(np.pad(image, 24)).text


def announced(host, encoding="utf-8", colours=False):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    out.isatty = lambda: colours
    announce(host, 8080, TOKEN, out)
    return out.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "host, colours",
    [("192.168.178.123", True), ("2001:db8:85a3:1319:8a2e:1370:7344:4b6f", False)],
)
def test_announcement_stays_on_a_small_screen(host, colours):
    screen = pyte.Screen(80, 24)
    terminal = pyte.Stream(screen)
    terminal.feed("Serving a model of some name with FlashHead at http://0.0.0.0:8080\r\n" * 30)
    text = announced(host, colours=colours)
    assert ("\x1b[97;40m" in text) == colours
    terminal.feed(text.replace("\n", "\r\n"))
    shown = [line.rstrip() for line in screen.display]
    page = url(host, 8080, TOKEN)
    assert any(line.startswith("Open this on an iPad") for line in shown)
    assert f"  {page}" in "".join(shown)
    assert scanned(line for line in shown if line and set(line) <= set("█▀▄ ")) == page


@pytest.mark.parametrize(
    "encoding, segno, said",
    [
        ("ascii", True, "needs a terminal with UTF-8"),
        ("utf-8", False, "needs segno, which is not installed: pip install 'mlx_flashhead[qr]'.\n"),
    ],
)
def test_announcement_without_a_code(monkeypatch, encoding, segno, said):
    """The address is there all the same, and how the code is had."""
    if not segno:
        monkeypatch.setitem(sys.modules, "segno", None)
    printed = announced("10.1.2.3", encoding)
    assert f"  http://10.1.2.3:8080/?token={TOKEN}\n" in printed and said in printed
    assert "Programs use http://10.1.2.3:8080/v1 with the token" in printed


def test_token_is_random_private_and_stored(tmp_path):
    paths = [tmp_path / str(number) for number in range(50)]
    tokens = [kept_token(path) for path in paths]
    assert [kept_token(path) for path in paths] == tokens and len(set(tokens)) == 50
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in paths} == {0o600}
    assert {len(token) for token in tokens} == {24}
    letters = set("".join(tokens)) - {"-"}
    assert len(letters) == 31 and not letters & set("01ilo")
    for content in (b"short\n", b"a" * 129, b"has spaces in it, many", b"\xff\xfe" * 20):
        paths[0].write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold a token .* delete it"):
            kept_token(paths[0])


def test_only_the_usual_token_file_gets_a_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--token-file .*: there is no folder .*absent, make"):
        kept_token(tmp_path / "absent" / "token")
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept_token(DEFAULT_TOKEN_FILE) and DEFAULT_TOKEN_FILE.expanduser().exists()


def test_addresses(monkeypatch, tmp_path):
    assert url("fd00::1", 80) == "http://[fd00::1]:80/"
    assert own_address("10.1.2.3") == "10.1.2.3"
    assert socket.inet_aton(own_address("0.0.0.0"))
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.9.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "mac.local", "")))
    monkeypatch.setattr(socket, "gethostname", lambda: "Studio.fritz.box")
    rules = access_of(flags("--host", "::", "--token-file", tmp_path / "token"))
    assert rules.hosts == {"studio", "studio.fritz.box", "::"}
    without_network = Mock(side_effect=OSError)
    monkeypatch.setattr(socket.socket, "connect", without_network)
    assert own_address("0.0.0.0") == "127.0.0.1"


def test_a_signal_that_ends_the_server_as_its_models_are_loaded(monkeypatch, capsys):
    """Nothing asks the closed port for its number."""
    models = Future()

    class Ended(serve.Server):
        async def serve(self, sockets):
            self.should_exit = True
            sockets[0].close()
            models.set_result([])

    api = Namespace(router=lambda: None, end_answers=lambda _: None)
    monkeypatch.setattr(serve, "Api", lambda *_: api)
    monkeypatch.setattr(serve, "Server", Ended)
    # in a thread, as the page's tests have an event loop here; only the main one handles signals
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    with serve.listening("127.0.0.1", 0) as port:
        flags = Namespace(host="127.0.0.1")
        engine = Namespace(models=models)
        serving = serve._serve(flags, engine, Access(), port)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, serving).result()
    assert capsys.readouterr().out == ""
