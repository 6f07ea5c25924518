"""The session: what it says of a FlashHead's speed, and of one that was built meanwhile."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from mlx_flashhead.chatting.conversation import Conversation
from mlx_flashhead.chatting.session import ChatSession
from mlx_flashhead.conversion.forecast import Forecast
from mlx_flashhead.decoding.policy import Tuning, policy_of
from mlx_flashhead.loading.load import load
from mlx_flashhead.models.install import detach
from tiny_models import install_index, tiny_index


@pytest.fixture
def loaded(converted):
    return load(str(converted))


@pytest.fixture
def session(loaded):
    said = []
    terminal = SimpleNamespace(interactive=False, said=said, say=said.append)
    terminal.show = lambda piece: None
    terminal.end = lambda: None
    args = Namespace(resume=False, dense=False, model="tiny", max_tokens=2)
    return ChatSession(Conversation(*loaded), terminal, args, {"max_tokens": 2})


@pytest.mark.parametrize(
    "known, said",
    [
        (None, "not known yet"),
        (Tuning(1.5, 1.5, 0.1), "1.50 x"),
        (Tuning(0.9, 0.9, 0.1, busy=True), "not known yet (dense, since the machine was busy)"),
    ],
)
def test_the_figures_say_how_far_a_speed_can_be_trusted(session, known, said):
    policy_of(session.head).tuning = known
    assert f"speed with FlashHead on this machine: {said}\n" in session._stats()


@pytest.mark.parametrize(
    "is_building, stays_dense, said",
    [
        (True, False, "[FlashHead is ready. Its speed is still being measured.]"),
        (False, False, "[FlashHead is ready: verified, "),
        # The measurement has said it.
        (False, True, None),
    ],
)
def test_a_head_that_was_built_meanwhile(loaded, session, is_building, stays_dense, said):
    model, _ = loaded
    detach(model)
    session.head = None
    session.build = SimpleNamespace(take_over=lambda model: None, under_way=is_building)
    policy_of(install_index(model, tiny_index(model))).dense = stays_dense
    session.terminal.read = lambda: "Hello"
    session._take_turn()
    ready = [line for line in session.terminal.said if "FlashHead is ready" in line]
    if said is None:
        assert ready == []
    else:
        (line,) = ready
        assert line.startswith(said)


@pytest.mark.parametrize(
    "is_building, said, status",
    [
        (
            True,
            "FlashHead is being built while you type",
            "tiny, dense, FlashHead is being built\n",
        ),
        (False, "This model has no FlashHead: start without", "tiny, dense, without FlashHead\n"),
    ],
)
def test_while_there_is_no_head_commands_say_whether_one_is_built(
    loaded, session, is_building, said, status
):
    detach(loaded[0])
    session.head = None
    session.build = SimpleNamespace(take_over=lambda model: None, under_way=is_building)
    for command in ("/dense", "/probes", "/probes 3"):
        session.terminal.read = lambda command=command: command
        session._take_turn()
        assert session.terminal.said.pop().startswith(said)
    assert session._stats().startswith(status)


def test_commands_after_a_build_use_its_head(loaded, session):
    model, _ = loaded
    detach(model)
    session.head = None
    session.build = SimpleNamespace(take_over=lambda model: None, under_way=False)
    install_index(model, tiny_index(model))
    session.terminal.read = lambda: "/probes 2"
    session._take_turn()
    assert session.terminal.said[-1] == "Now verified, 2 of 33 clusters scored per token."


@pytest.mark.parametrize("argument", ["abc", "0", "-3", "1.5"])
def test_a_wrong_number_is_said_to_be_one_while_a_head_is_built(loaded, session, argument):
    detach(loaded[0])
    session.head = None
    session.build = SimpleNamespace(take_over=lambda model: None, under_way=True)
    session.terminal.read = lambda: f"/probes {argument}"
    session._take_turn()
    assert session.terminal.said[-1] == "/probes needs a number of 1 or more."


def test_a_build_is_seen_and_its_lines_stand_before_a_text(loaded, session):
    build = SimpleNamespace(take_over=lambda model: None, under_way=True, has_ended=False)
    build.stored = None
    build.forecast = Forecast(0.5, 42.0)
    session.build = build
    assert session._status().endswith("██████████░░░░░░░░░░ 50%, about 40 s left")
    build.forecast = None
    assert session._status() == "FlashHead is being built."
    session.lines.append("It was measured.")
    session.terminal.read = lambda: "/exit"
    session.run()
    assert session.terminal.said[0] == "It was measured."
    assert session.terminal.said[-1] == "FlashHead is not built yet. Its build goes on next time."
