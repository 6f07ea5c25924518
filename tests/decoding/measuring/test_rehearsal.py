"""Whatever a text can ask for has been compiled, and has failed, before the first text."""

import mlx.core as mx
import pytest

from flash_loops import PROMPT, flash_of
from kernel_cases import kernels, on_gpu
from mlx_flashhead import make_sampler
from mlx_flashhead.decoding import verification
from mlx_flashhead.decoding.measuring import rehearsal
from mlx_flashhead.decoding.measuring.rehearsal import rehearse, rehearsed_texts
from mlx_flashhead.decoding.proposer import Proposer
from mlx_flashhead.decoding.verification import Verification
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.metal_operations import MetalOperations
from mlx_flashhead.head.rounded_product import CLASSES
from tiny_models import tiny_model

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
emulator_only = pytest.mark.skipif(on_gpu(), reason="texts are counted on the emulator")


def make_flash(**options):
    return flash_of(tiny_model(num_hidden_layers=1, **options))


@emulator_only
def test_it_finds_every_kernel_compiled(monkeypatch):
    """Proposals, joins, tolerances, screens and doubts of all kinds, one text and several."""
    proposals = []
    of_proposal = FlashHead.propose

    def propose(head, hidden, *given, **named):
        proposals.append(len(hidden))
        return of_proposal(head, hidden, *given, **named)

    monkeypatch.setattr(FlashHead, "propose", propose)
    monkeypatch.setattr(rehearsal, "CLASSES", (1, 2, 3, 7, 8, 9))
    with kernels(check=False) as emulator:
        flash = make_flash(dtype=mx.bfloat16, bits=4)
        built = set(emulator.built)
        emulator.dispatches.clear()
        rehearse(flash.model)
        assert flash.head.backend == "metal" and emulator.built == built
        found = {dispatch.name.removeprefix("flash_head_") for dispatch in emulator.dispatches}
    operations = {"route", "select", "select_forced", "score", "sample", "adjust"}
    assert found >= operations | {"join", "tolerance", "screen", "certain"}
    assert set(proposals) == {1, *rehearsal.TOGETHER}


@emulator_only
def test_each_kind_is_verified_with_each_number_of_tokens(monkeypatch):
    """A product of another class of sizes, or of draws, may have other kernels."""
    sizes = {}

    class Counted(Verification):
        def __init__(self, proposer, texts, marks):
            super().__init__(proposer, texts, marks)
            (text,) = texts
            key = text.sampler, tuple(text.processors)
            sizes.setdefault(key, []).append(len(self._cases))

    with kernels(check=False):
        flash = make_flash(dtype=mx.bfloat16, bits=4)
        several = rehearsed_texts(flash.head.vocab_size)
        monkeypatch.setattr(rehearsal, "rehearsed_texts", lambda vocab_size: several)
        monkeypatch.setattr(verification, "Verification", Counted)
        rehearse(flash.model)
    expected = {(sampler, tuple(each)): list(CLASSES) for sampler, each in several.values()}
    assert sizes == expected


@emulator_only
@pytest.mark.parametrize("name, method", [("penalties", "adjust"), ("the likeliest", "screen")])
def test_what_fails_there_is_named_and_replaced(monkeypatch, caplog, name, method):
    """The text after it has no kernels, and is the dense model's."""

    def fails(*_, **__):
        raise RuntimeError("Unable to build metal library from source")

    with kernels(check=False):
        flash = make_flash(dtype=mx.bfloat16, bits=4)
        monkeypatch.setattr(MetalOperations, method, fails)
        rehearse(flash.model)
        assert flash.head.backend == "mlx"
        said = flash.head.backend_reason
        assert f"the steps of text with {name}" in said and "Unable to build" in said
        assert [record.getMessage() for record in caplog.records] == [said]
    flash.checked({"temp": 0.8, "top_p": 0.9, "seed": 1}, max_tokens=12)


def test_without_kernels_proposals_beside_a_mask_are_not_traced():
    """MLX joins operations that it traces, and a CPU compiles each text of them for a second."""
    flash = make_flash()
    rehearse(flash.model)
    assert flash.head.n_traced == 1
    _, both = rehearsed_texts(flash.head.vocab_size)["penalties and a grammar"]
    flash.tokens(logits_processors=both, max_tokens=8)
    assert flash.head.n_traced == 1
    flash.tokens(sampler=make_sampler(temp=0.8, top_p=0.9, seed=1), max_tokens=8)
    assert flash.head.n_traced == 2


@emulator_only
def test_a_changed_softcap_has_its_kernels_when_a_text_begins():
    with kernels(check=False) as emulator:
        flash = flash_of(tiny_model("gemma2", dtype=mx.bfloat16, bits=4, num_hidden_layers=1))
        for softcap in (30.0, 20.0):
            flash.model.final_logit_softcapping = softcap
            Proposer(flash.model)
            built = set(emulator.built)
            flash.checked({"temp": 0.8, "top_p": 0.9, "seed": 1}, max_tokens=10)
            assert emulator.built == built and flash.head.backend == "metal"


def test_it_leaves_the_random_state_and_the_text_alone():
    flash = make_flash()
    expected = flash.tokens(prompt=PROMPT)
    mx.random.seed(3)
    before = mx.random.state[0].tolist()
    rehearse(flash.model)
    assert mx.random.state[0].tolist() == before
    assert flash.tokens(prompt=PROMPT) == expected
