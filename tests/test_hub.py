"""What is said when the Hub refuses or cannot be reached. Nothing leaves this machine."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

from mlx_flashhead import hub

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"


class Refusal(BaseHTTPRequestHandler):
    """Answers everything with 401 and, as no server should, with the token it was given."""

    def do_POST(self):
        self.server.seen.append(self.headers["Authorization"])
        self.send_response(401)
        self.send_header("X-Error-Message", f"{self.headers['Authorization']} is not valid")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A local server that refuses."""
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def upload_to(monkeypatch, tmp_path):
    """A function that uploads to a port of this machine and returns what is said."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def upload(port, repo_id="me/tiny"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(ValueError, match=r"could not be uploaded") as caught:
            hub.upload(tmp_path, repo_id)
        # neither in the sentence nor in what a traceback would show with it
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        said = str(caught.value)
        assert TOKEN not in said and "\n" not in said
        assert str(tmp_path) in said and repo_id in said
        return said

    return upload


def test_no_connection(upload_to):
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        port = server.server_port
    assert "refused" in upload_to(port)


def test_refused(upload_to, server):
    said = upload_to(server.server_port)
    assert "401" in said and "hf auth login" in said
    assert server.seen == [f"Bearer {TOKEN}"]


def test_name_that_is_none(upload_to, server):
    assert "a/b/c" in upload_to(server.server_port, "a/b/c")
    assert server.seen == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"Illegal header value b'Bearer {TOKEN}'"),
        ValueError(f"{TOKEN} is not valid"),
        OSError(5, "Input/output error"),
        RuntimeError(),
    ],
)
def test_token_stays_here_whatever_the_client_says(upload_to, monkeypatch, error):
    def create_repo(*_, **__):
        raise error

    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    said = upload_to(1)
    assert "hf_" not in said
    assert "()" not in said
