"""Requests to a scripted server."""

import socket
from http.client import HTTPConnection

import pytest


@pytest.fixture
def ask(server):
    """A function that makes a request: (path, method, body, headers) → response, its body."""

    def ask(path, method="GET", body=None, **headers):
        connection = HTTPConnection("127.0.0.1", server[0], timeout=20)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response, content

    return ask


@pytest.fixture
def connect(server):
    """A function that opens a connection, and sends on it."""
    opened = []

    def connect(data=b""):
        opened.append(socket.create_connection(("127.0.0.1", server[0]), timeout=20))
        opened[-1].sendall(data)
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()
