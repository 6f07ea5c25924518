"""Drafters that were trained with a model: what is loaded, and what is refused before."""

import importlib
import json
import sys
from unittest.mock import Mock

import mlx.core as mx
import mlx_lm
import pytest
from huggingface_hub import constants
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm")

from mlx_flashhead import load_draft
from mlx_flashhead.loading.cached import entries
from mlx_flashhead.loading.drafts import DraftOptions, check_draft
from mlx_flashhead.loading.head_options import HeadOptions
from mlx_flashhead.models import own_drafter
from mlx_flashhead.models.own_drafter import load_own_drafter
from mlx_flashhead.models.trained_drafter import TrainedDrafter
from model_folders import VOCAB_SIZE, contents, write_tokenizer
from refusals import refused
from trained_drafters import FAMILIES, drafter_config, tiny_module, tiny_target, write_drafter

KINDS = sorted({kind for *_, kind in FAMILIES.values()})


def write_target(folder, family="qwen3_5", *, mtp=False, bits=None, card=None, config=None):
    """A folder of a tiny model, as mlx-lm loads it, with its MTP layer or without."""
    model = tiny_target(family, vocab_size=VOCAB_SIZE)
    about = {"text_config": model.args.text_config, "model_type": family, "eos_token_id": 1}
    if bits is not None:
        model, about = mlx_lm.utils.quantize_model(model, about, 64, bits)
    weights = dict(tree_flatten(model.parameters()))
    if mtp:
        own = dict(tree_flatten(tiny_module(family).parameters()))
        weights |= {f"mtp.{name}": array.astype(mx.bfloat16) for name, array in own.items()}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    if config is not None:
        about = about | config
    (folder / "config.json").write_text(json.dumps(about))
    write_tokenizer(folder)
    if card is not None:
        (folder / "README.md").write_text(f"---\nbase_model: {card}\n---\n")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_is_loaded_for_its_model(tmp_path, family):
    folder = write_drafter(tmp_path / "drafter", family)
    drafter, tokenizer = load_draft(str(folder))
    assert isinstance(drafter, TrainedDrafter) and tokenizer is None
    drafter.check_target(tiny_target(family))
    own = dict(tree_flatten(drafter.module.parameters()))
    expected = dict(tree_flatten(tiny_module(family).parameters()))
    assert own.keys() == expected.keys()
    assert all(mx.array_equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize(
    "drafter, target",
    [
        ({}, {"hidden_size": 128}),
        ({}, {"vocab_size": 300}),
        ({"text_config": {"model_type": "nemotron_h"}}, {}),
    ],
)
def test_another_models_drafter_is_refused_at_once(tmp_path, monkeypatch, drafter, target):
    config = drafter_config("qwen3_5")
    config["text_config"] |= drafter.get("text_config", {}) | {"vocab_size": VOCAB_SIZE}
    folder = tmp_path / "drafter"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = write_target(tmp_path / "target")
    about = json.loads((model / "config.json").read_bytes())
    about["text_config"] |= target
    (model / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("loaded"))
    if drafter or target:
        with pytest.raises(ValueError, match=r"\A.* drafts for .*trained with it\.\Z"):
            check_draft(str(folder), str(model))
    about["text_config"] |= {"hidden_size": 64, "vocab_size": VOCAB_SIZE}
    (model / "config.json").write_text(json.dumps(about))
    if not drafter:
        check_draft(str(folder), str(model))


def test_a_loaded_model_is_compared_too(tmp_path):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5")
    options = DraftOptions(str(folder))
    target = tiny_target("qwen3_5", vocab_size=256)
    with pytest.raises(ValueError, match="256 tokens"):
        options.load(target, folder, HeadOptions(), trust_remote_code=False)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "deepseek_v4_mtp"},
        {"model_type": "qwen3", "architectures": ["DFlashDraftModel"]},
        {"model_type": "eagle3"},
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\A.*\.\Z") as caught:
        load_draft(str(tmp_path))
    said = str(caught.value)
    assert f"of the kind {config['model_type']!r}" in said
    assert all(kind in said for kind in KINDS)


def test_code_of_a_drafter_is_not_run(tmp_path):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5", model_file="code.py")
    (folder / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="brings Python code of its own"):
        load_draft(str(folder))


def test_damaged_weights_are_one_sentence(tmp_path):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"\Amlx-vlm cannot load the drafter .*again\.\Z"):
        load_draft(str(folder))


@pytest.mark.parametrize("content", ["{}", "[1]", "{nope", '{"model_type": 5}', None])
def test_a_folder_that_is_no_drafter_is_one_sentence(tmp_path, content):
    target = write_target(tmp_path / "target")
    folder = tmp_path / "other"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    refused(lambda: check_draft(str(folder), str(target)), ".*neither a model nor a drafter")


@pytest.mark.parametrize("broken", ["draft", "target"])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, broken):
    folders = [write_target(tmp_path / name) for name in ("draft", "target")]
    (tmp_path / broken / "tokenizer.json").write_text("nothing")
    refused(lambda: check_draft(*map(str, folders)), f"The tokenizer of .*{broken} cannot be load")


def test_a_drafter_without_weights_is_one_sentence(tmp_path):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5")
    (folder / "model.safetensors").unlink()
    refused(lambda: load_draft(str(folder)), "The drafter .* has no weights")


def test_a_drafter_with_damaged_settings_is_one_sentence(tmp_path):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5", text_config=5)
    refused(lambda: load_draft(str(folder)), "mlx-vlm cannot load the drafter")
    target = write_target(tmp_path / "target")
    # What it was trained with is not known.
    check_draft(str(folder), str(target))


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    folder = write_drafter(tmp_path / "drafter", "qwen3_5")
    model = write_target(tmp_path / "model", mtp=True)
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    for call in (lambda: load_draft(str(folder)), lambda: own(model, model)):
        with pytest.raises(ValueError, match=r"pip install 'mlx_flashhead\[drafters\]'\.\Z"):
            call()


def own(folder, source=True):
    """A model's own drafter, and what was said of it."""
    said = []
    model, _ = mlx_lm.load(str(folder))
    drafter = load_own_drafter(model, folder, source, say=said.append, progress=False)
    return drafter, said


def bits_of(drafter):
    return {getattr(layer, "bits", None) for layer in drafter.module.modules()} - {None}


def test_the_layer_in_the_models_folder(tmp_path):
    folder = write_target(tmp_path / "model", mtp=True, bits=4)
    drafter, said = own(folder)
    assert said == [f"With the MTP layer in {folder}."]
    assert bits_of(drafter) == {8}
    assert not entries()


@pytest.fixture
def original(tmp_path):
    """A model with its MTP layer, and beside it "coarse", in 4 bits, which names it as its base."""
    write_target(tmp_path / "coarse", bits=4, card="maker/Original")
    return write_target(tmp_path / "original", mtp=True)


@pytest.fixture
def on_hub(hub, original):
    hub.put("maker/Original", contents(original))
    return hub


def test_the_layer_is_fetched_from_the_original_once(on_hub, original):
    tensors = tree_flatten(tiny_module("qwen3_5").parameters())
    layer = sum(array.size for _, array in tensors) * 2
    drafter, said = own(original.with_name("coarse"))
    assert said[0].startswith("Fetching the MTP layer of maker/Original (")
    assert said[1] == "With the MTP layer of maker/Original, in 8 bits."
    assert bits_of(drafter) == {8}
    # The headers are read, too, and a few rows.
    assert layer < on_hub.ranged_bytes < layer + 40_000
    n_ranges = len([path for command, path in on_hub.requests if path.endswith("safetensors")])
    # Some tensors lie side by side.
    assert n_ranges < 12 + len(tensors)
    on_hub.requests.clear()
    again, said = own(original.with_name("coarse"))
    assert on_hub.requests == [] and len(said) == 1
    both = [dict(tree_flatten(each.module.parameters())) for each in (drafter, again)]
    assert all(mx.array_equal(both[0][name], both[1][name]) for name in both[0])


def test_the_layer_is_that_of_the_original(on_hub, original):
    """Within the rounding to 8 bits, norms too."""
    drafter, _ = own(original.with_name("coarse"))
    expected = dict(tree_flatten(tiny_module("qwen3_5").parameters()))
    for name, module in drafter.module.named_modules():
        if not isinstance(module.get("weight"), mx.array):
            continue
        weight = module["weight"]
        if "scales" in module:
            scales = module["scales"]
            biases = module["biases"]
            weight = mx.dequantize(weight, scales, biases, module.group_size, module.bits)
        assert mx.allclose(weight, expected[f"{name}.weight"], atol=0.02), name


def refusal(folder, source=True):
    """The one sentence that rejects a drafter of its own; none is kept."""
    with pytest.raises(ValueError, match=r"\A.*\.\Z") as caught:
        own(folder, source)
    assert not [*own_drafter.home().rglob("*.safetensors")]
    return str(caught.value)


def test_without_a_network_nobody_waits(original, monkeypatch):
    """For a single file the Hub's client would try again for 23 seconds."""
    # Nothing listens there.
    address = "http://127.0.0.1:9"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(constants, name, value)
    slept = Mock()
    monkeypatch.setattr("time.sleep", slept)
    assert "the Hugging Face Hub cannot be reached" in refusal(original.with_name("coarse"))
    assert not slept.called


def test_mistakes_are_one_sentence_each(hub, original, tmp_path, monkeypatch):
    coarse = original.with_name("coarse")
    assert "no such repository" in refusal(coarse)
    hub.put("maker/Original", contents(write_target(tmp_path / "none")))
    assert refusal(coarse) == "maker/Original has no MTP layer: leave `mtp` out."
    other = write_target(tmp_path / "other", mtp=True)
    weights = mx.load(str(other / "model.safetensors"))
    weights["language_model.lm_head.weight"] += 1
    mx.save_safetensors(str(other / "model.safetensors"), weights, {"format": "mlx"})
    assert "is not the original of coarse" in refusal(coarse, other)
    drafter = write_drafter(tmp_path / "drafter", "qwen3_5")
    assert "drafter is a drafter itself: give it as" in refusal(coarse, drafter)
    hub.put("maker/Original", contents(original))
    hub.cut_at = 3000
    assert refusal(coarse)
    hub.cut_at = None
    hub.down = True
    assert "cannot be reached" in refusal(coarse) or "does not give it" in refusal(coarse)
    hub.down = False
    (coarse / "README.md").unlink()
    assert "name one with `mtp`" in refusal(coarse)
    llama = write_target(tmp_path / "plain", config={"model_type": "llama", "text_config": None})
    with pytest.raises(ValueError, match="'llama' model, whose MTP layer the installed mlx-vlm"):
        load_own_drafter(tiny_target("qwen3_5"), llama)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own_drafter, "copy_tensors", full)
    assert "free some space" in refusal(coarse, original)


def test_a_cached_layer_is_listed_and_removed(on_hub, original):
    own(original.with_name("coarse"))
    (entry,) = entries()
    assert entry.model == "coarse" and entry.nbytes > 1000
    cache = importlib.import_module("mlx_flashhead.cache")
    assert "MTP layer" in cache._row(entry)[1]
    assert entry.remove()
    assert not entries()
