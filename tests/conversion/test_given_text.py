"""Given text: what the package and Python's standard library hold."""

import pytest

from mlx_flashhead.conversion import given_text
from mlx_flashhead.conversion.given_text import dialogues, given_documents
from mlx_flashhead.evaluation.answers import usual_requests


@pytest.fixture(scope="module")
def documents():
    return given_documents()


def test_every_kind_has_several_documents(documents):
    assert len(documents) >= 6
    for found in documents.values():
        assert len(found) >= 6
        assert all(len(document) > 50 for document in found)
        assert len(set(found)) == len(found)


def test_python_and_help_topics_come_from_the_standard_library(documents):
    assert len(documents[given_text.PYTHON]) > 0.8 * len(given_text.MODULES)
    assert "def " in "".join(documents[given_text.PYTHON])
    own = (len(given_text._documents("documentation.txt"))) + 0.8 * len(given_text.TOPICS)
    assert len(documents[given_text.DOCUMENTATION]) > own


def test_what_an_installation_lacks_is_left_out(monkeypatch, documents):
    monkeypatch.setattr(given_text, "MODULES", ("no_such_module", "textwrap", "_thread"))
    monkeypatch.setattr(given_text, "TOPICS", ("no-such-topic", "with"))
    found = given_documents()
    assert len(found[given_text.PYTHON]) == 1
    assert len(found[given_text.DOCUMENTATION]) == 1 + len(
        given_text._documents("documentation.txt")
    )
    assert found[given_text.PROSE] == documents[given_text.PROSE]


def test_dialogues_alternate():
    found = dialogues()
    assert len(found) > 10
    for messages in found:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] == message["content"].strip() for message in messages)
        assert not any("User:" in message["content"] for message in messages)


def test_no_request_of_the_evaluation_is_calibrated_on():
    asked = {message["content"] for messages in dialogues() for message in messages}
    assert not asked & set(usual_requests())
