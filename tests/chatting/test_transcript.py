"""Conversations as files."""

import json

import pytest

from mlx_flashhead.chatting.transcript import read_conversation, write_conversation

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Grüße\n"zitiert"'},
    {"role": "assistant", "content": "[bold]\x1b �"},
]


@pytest.mark.parametrize("messages", [TALK, TALK[1:], TALK[:1], []])
def test_what_is_written_is_read(tmp_path, messages):
    file = tmp_path / "chat.json"
    write_conversation(file, messages, "a model")
    assert read_conversation(file) == messages
    assert json.loads(file.read_text())["model"] == "a model"
    assert "Grüße" in file.read_text() or TALK[1] not in messages
    file.write_text(json.dumps([message | {"name": "x"} for message in messages]))
    assert read_conversation(file) == messages  # a list alone, without other keys


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ("3", "a list of messages under the key 'messages'"),
        ('{"talk": []}', "a list of messages under the key 'messages'"),
        ('["hello"]', "message 1 must have a role and a content"),
        ('[{"role": "user"}]', "message 1 must have a role and a content"),
        ('[{"role": "user", "content": [1]}]', "message 1 must have a role and a content"),
        ('[{"role": "user", "content": "a"}]', "not questions of a user and answers of"),
        ('[{"role": "assistant", "content": "a"}]', "not questions"),
        (json.dumps([*TALK[1:], *TALK]), "not questions"),
        (json.dumps([TALK[1], TALK[1]]), "not questions"),
        (b"\xff\xfe\x00", "it is not JSON"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, content, said):
    file = tmp_path / "chat.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_conversation(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversation_is_replaced_and_nothing_else(tmp_path):
    file = tmp_path / "chat.json"
    write_conversation(file, TALK, "a model")
    write_conversation(file, TALK[1:], "a model")
    assert read_conversation(file) == TALK[1:]
    file.write_text("shopping list")
    with pytest.raises(ValueError, match="exists already and is not a conversation"):
        write_conversation(file, TALK, "a model")
    assert file.read_text() == "shopping list"
