"""A quantized model gets the finer head of its original, or keeps its own with a sentence."""

import re
import shutil
import warnings
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from huggingface_hub import constants

import mlx_flashhead
from mlx_flashhead import attach, detach, get_flash_head
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.loading.head_options import DENSE, HeadOptions
from mlx_flashhead.loading.load import load, load_with_head
from mlx_flashhead.models import finer_head, tensor_files
from mlx_flashhead.models.finer_head import check_same, distances, give_fine_head
from mlx_flashhead.models.locate import find_head
from model_folders import contents, write_model
from tiny_models import install_index, parameters, tiny_index, tiny_model

TOKENS = mx.array([[3, 1, 200, 7]])
both = pytest.mark.parametrize("original", [True, False], indirect=True, ids=["tied", "untied"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Whether its rows are tied → a model's folder, beside which the same lies in 4 bits."""
    folders = {}
    for tied in (True, False):
        place = tmp_path_factory.mktemp("pair")
        folders[tied] = write_model(place / "Original", tied=tied, dtype=mx.bfloat16)
        mlx_lm.convert(str(folders[tied]), str(place / "Coarse"), quantize=True)
        name_base(place / "Coarse", "maker/Original")
    return folders


@pytest.fixture
def original(pairs, request):
    """A model's folder, with tied rows unless a test has both."""
    return pairs[getattr(request, "param", True)]


@pytest.fixture
def coarse(original):
    """The same model in 4 bits, whose card names its base."""
    return original.with_name("Coarse")


def name_base(folder, base):
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: mlx\n---\n")


@pytest.fixture
def copied(original, tmp_path):
    """A function: writes other weights into a copy of the original."""

    def write(weights):
        folder = shutil.copytree(original, tmp_path / "Other", dirs_exist_ok=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        return folder

    return write


@pytest.fixture
def on_hub(hub, original):
    hub.put("maker/Original", contents(original))
    return hub


def fine(folder, source, **options):
    """The place of a finer head on the model, and what was said."""
    said = []
    location = find_head(mlx_lm.load(str(folder))[0])
    give_fine_head(location, folder, source, say=said.append, progress=False, **options)
    return location, said


def refusal(folder, source=True, **options):
    """The one sentence that rejects a finer head; the model and the home are as they were."""
    model, _ = mlx_lm.load(str(folder))
    before = parameters(model)
    options |= {"say": lambda _: None, "progress": False}
    with pytest.raises(ValueError, match=r"\A.*\.\Z") as caught:
        give_fine_head(find_head(model), folder, source, **options)
    assert parameters(model) == before
    assert not [*finer_head.home().rglob("*.safetensors")]
    return str(caught.value)


def weights_of(original):
    """The original's arrays, the name of its head's, and that."""
    weights = mx.load(str(original / "model.safetensors"))
    leaf = "embed_tokens"
    if "lm_head.weight" in weights:
        leaf = "lm_head"
    name = next(name for name in weights if name.endswith(f"{leaf}.weight"))
    return weights, name, weights[name]


@both
@pytest.mark.parametrize("bits", [6, 8, 16])
def test_the_rows_are_the_originals_rounded(original, coarse, bits):
    rows = fine(coarse, original, bits=bits)[0].rows()
    expected = Matrix(weights_of(original)[2])
    if bits < 16:
        expected = expected.quantize(bits=bits, group_size=64)
    for name, array in expected.arrays().items():
        assert mx.array_equal(rows.arrays()[name], array)
    assert (rows.bits, rows.quantized) == (bits % 16, bits < 16)


@both
def test_one_tensor_is_fetched_once(on_hub, original, coarse):
    location, (said, used) = fine(coarse, True)
    _, name, rows = weights_of(original)
    assert f"Fetching {name} of maker/Original (" in said
    assert rows.nbytes < on_hub.ranged_bytes < rows.nbytes + 20_000
    on_hub.requests.clear()
    again, said = fine(coarse, True)
    assert on_hub.requests == []
    assert said == [used]
    assert used == "With the finer head of maker/Original, in 8 bits."
    assert mx.array_equal(again.rows().weight, location.rows().weight)


@both
def test_dense_means_the_finer_head(original, coarse):
    """The whole model with the original's head in 8 bits, in every way."""
    expected, tokenizer = mlx_lm.load(str(coarse))
    rows = Matrix(weights_of(original)[2]).quantize(bits=8, group_size=64)
    module = find_head(expected).module
    module.weight = rows.weight
    module.scales = rows.scales
    module.biases = rows.biases
    module.bits = 8
    text = mlx_lm.generate(expected, tokenizer, "One", max_tokens=12)
    options = HeadOptions(missing=DENSE, fine_head=original, progress=False)
    model, tokenizer, _ = load_with_head(coarse, options)
    assert mx.array_equal(model(TOKENS), expected(TOKENS))
    install_index(model, tiny_index(model))
    for generate in (mlx_flashhead.generate, mlx_lm.generate):
        assert generate(model, tokenizer, "One", max_tokens=12) == text
    names = [name for name, *_ in parameters(model)]
    assert names == [name for name, *_ in parameters(expected)]


@both
@pytest.mark.parametrize("bits, with_flash_head", [(8, True), (16, True), (16, False)])
def test_detach_gives_the_old_rows_back(original, coarse, bits, with_flash_head):
    model, _ = mlx_lm.load(str(coarse))
    before = parameters(model)
    logits = model(TOKENS)
    give_fine_head(find_head(model), coarse, original, bits=bits, progress=False)
    assert parameters(model) != before
    if with_flash_head:
        install_index(model, tiny_index(model))
    detach(model)
    assert parameters(model) == before
    assert mx.array_equal(model(TOKENS), logits)
    with pytest.raises(ValueError, match="no FlashHead on this model to detach"):
        detach(model)


def test_sources_of_many_forms(original, coarse, copied):
    weights, *_ = weights_of(original)
    for source in (
        lambda: original / "model.safetensors",
        lambda: copied({name: array.astype(mx.float16) for name, array in weights.items()}),
        # As a vision model's text has it.
        lambda: copied({f"language_model.{name}": array for name, array in weights.items()}),
    ):
        location, _ = fine(coarse, source())
        assert (location.rows().bits, location.hidden_dtype) == (8, mx.bfloat16)
        shutil.rmtree(finer_head.home())


def test_shards_on_the_hub_and_one_that_is_missing(hub, original, coarse, tmp_path):
    weights, head, _ = weights_of(original)
    shards = [{}, {}, {}]
    for number, (name, array) in enumerate(weights.items()):
        shards[number % 3][name] = array
    for number, shard in enumerate(shards):
        mx.save_safetensors(str(tmp_path / f"model-{number}.safetensors"), shard)
    files = contents(tmp_path)
    hub.put("maker/Shards", files)
    fine(coarse, "maker/Shards")
    (missing,) = (number for number, shard in enumerate(shards) if head in shard)
    del files[f"model-{missing}.safetensors"]
    hub.put("maker/Lacks", files)
    shutil.rmtree(finer_head.home())
    assert "maker/Lacks has no embed_tokens.weight of 258 rows" in refusal(coarse, "maker/Lacks")


@both
def test_other_rows_are_refused(original, coarse, copied):
    weights, head, rows = weights_of(original)
    rows = rows.astype(mx.float32)

    def refused_with(changed):
        return refusal(coarse, copied(weights | {head: changed.astype(mx.bfloat16)}))

    length = mx.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(rows.shape[1])
    for noise in (0.03, 0.1):
        trained = rows + noise * length * mx.random.normal(rows.shape, key=mx.random.key(0))
        said = refused_with(trained)
        assert "Other is not the original of Coarse, or was trained further: beyond" in said
        assert float(re.search(r"are ([\d.]+) % of", said)[1]) == pytest.approx(100 * noise, 0.3)
    # This token was trained.
    one = mx.concatenate([rows[:5], rows[6:7], rows[6:]])
    assert "row 5 the most" in refused_with(one)
    # These rows are of another scale.
    assert re.search(r"are (9\d|100)\.\d % of", refused_with(2 * rows))
    # Of another number: none, or in an untied model those of its embedding.
    said = refused_with(rows[1:])
    assert f"of {len(rows)} rows of width 64 as floats" in said or "is not the original of" in said
    assert "100.0 %" in refused_with(rows[::-1])


def test_rows_of_padding_and_a_bias():
    model = tiny_model("phi", tied=False, dtype=mx.float16)
    location = find_head(model)
    weight = mx.concatenate([location.module.weight[:-8], mx.zeros((8, 64), mx.float16)])
    location.module.weight = weight
    for mode in ("mxfp4", "affine"):
        rows = Matrix(weight).quantize(group_size=32, bits=4, mode=mode)
        found = distances(rows, weight.astype(mx.float32))
        check_same([found], "x", finer_head.MAX_DRIFT)
    nn.quantize(model, group_size=32, bits=4)
    location = find_head(model)
    bias = location.module.bias
    finer_head.replace_rows(location.module, Matrix(weight))
    assert type(location.module) is nn.Linear
    assert mx.array_equal(location.module.bias, bias)
    assert model(TOKENS).shape == (1, 4, 203)


def test_heads_that_need_none_and_a_full_disk(original, coarse, monkeypatch, flash_head_home):
    assert "floats already" in refusal(original, original)
    assert "has 4 bits already" in refusal(coarse, original, bits=4)
    assert f"{coarse} has no embed_tokens.weight of" in refusal(coarse, coarse)

    def full(*_, **__):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    kept = f"cannot be kept in {flash_head_home / 'fine_heads'} (No space left on device)"
    assert kept in refusal(coarse, original)


def test_originals_that_cannot_be_had(hub, original, coarse, tmp_path):
    folder = shutil.copytree(coarse, tmp_path / "Coarse")
    weights = (original / "model.safetensors").read_bytes()
    hub.put("maker/Coarse", contents(folder))
    for base, there, said in (
        ("[]", None, "The card of Coarse names no original (as its base_model), or"),
        ("maker/Coarse", None, "maker/Coarse has no embed_tokens.weight of 258 rows of width 64"),
        ("maker/Gone", None, "no such repository on the Hugging Face Hub"),
        ("maker/Damaged", b"\xff" * 100, "is damaged or no safetensors"),
        ("maker/Cut", weights[:2000], "maker/Cut"),
        ("maker/Gated", weights, "maker/Gated is gated: ask for access on "),
    ):
        if there:
            hub.put(base, {"model.safetensors": there})
        if base == "maker/Gated":
            hub.gated = {"model.safetensors"}
        else:
            hub.gated = set()
        name_base(folder, base)
        assert said in refusal(folder), base


def of_rows(spoil):
    """What `LoopbackHub.spoil` does, to ranges of the tensor's size alone."""

    def spoil_rows(piece, header):
        if len(piece) > 20_000:
            return spoil(piece, header)
        return piece, header

    return spoil_rows


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda piece, range_: (bytes(len(piece)), range_), "is not the original of"),
        (lambda piece, range_: (piece[::-1], range_), "is not the original of"),
        (
            lambda piece, range_: (piece + piece, range_),
            "model.safetensors of maker/Original came with",
        ),
        (lambda piece, range_: (piece, "bytes 0-99/100"), "sends bytes 0-99/100 of model.safet"),
        (lambda piece, range_: (piece, ""), "sends all of model.safetensors"),
    ],
    ids=["zeros", "other rows", "too long", "another range", "no range"],
)
def test_a_bad_answer_is_not_kept(on_hub, original, coarse, spoil, said):
    on_hub.spoil = of_rows(spoil)
    assert said in refusal(coarse)
    on_hub.spoil = None
    location, _ = fine(coarse, True)
    expected = Matrix(weights_of(original)[2]).quantize(bits=8, group_size=64)
    assert mx.array_equal(location.rows().weight, expected.weight)


def test_a_lost_connection_leaves_nothing(on_hub, coarse, monkeypatch):
    monkeypatch.setattr(finer_head, "SKETCH_ROWS", 1)
    on_hub.cut_at = 20_000
    assert "the Hugging Face Hub does not give it" in refusal(coarse)
    assert not any(finer_head.home().rglob("*.*"))


def test_headers_have_a_limit(on_hub, coarse, monkeypatch):
    monkeypatch.setattr(tensor_files, "LARGEST_HEADER", 100)
    assert "headers have up to 100 bytes" in refusal(coarse)
    # The length of the header was read, and nothing of it.
    assert on_hub.ranged_bytes == 8


def test_what_cannot_be_read_in_the_cache_is_fetched_again(original, coarse):
    fine(coarse, original)
    (place,) = finer_head.home().rglob("*.safetensors")
    content = place.read_bytes()
    for damaged in (b"", b"{}" * 99):
        place.write_bytes(damaged)
        location, said = fine(coarse, original)
        assert len(said) == 2
        assert location.rows().bits == 8
        assert place.read_bytes() == content


def test_a_flash_head_is_built_for_the_finer_rows_or_the_models_own(original, coarse, quick, capfd):
    load_it = partial(load, str(coarse))
    assert get_flash_head(load_it(fine_head=True)[0]).clustered.rows.bits == 4
    missing = "Without a finer head: There is no folder 'maker/Original' here"
    assert missing in capfd.readouterr().err
    with pytest.warns(UserWarning, match="Without a finer head"):
        load_it(fine_head=True, progress=False)
    with pytest.raises(ValueError, match="There is no folder 'nowhere/at-all' here"):
        load_it(fine_head="nowhere/at-all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Nothing is given unless it is requested.
        load_it(progress=False)
        assert get_flash_head(load_it(fine_head=original)[0]).clustered.rows.bits == 8
    model, tokenizer = mlx_lm.load(str(coarse))
    assert attach(model, tokenizer, fine_head=original, progress=False).clustered.rows.bits == 8


def test_flags(run, original, coarse):
    command = ("generate", "--model", coarse, "--prompt", "One", "--max-tokens", 4)
    code, _, errors = run(*command, "--dense", "--head-bits", 16, "--fine-head", original)
    assert code == 0
    assert "Fetching" in errors
    code, _, errors = run(*command, "--head-bits", 16)
    assert code == 2
    assert "add --fine-head" in errors


def test_a_named_source_is_used_or_refused_whatever_is_cached(run, original, coarse, copied):
    fine(coarse, original)
    weights, head, rows = weights_of(original)
    other = copied(weights | {head: rows[::-1]})
    said = []
    for source, refusal in (
        ("nowhere/at-all", "There is no folder 'nowhere/at-all' here"),
        (coarse.with_name("Absent"), "There is no folder"),
        (other, "is not the original of Coarse, or was trained further"),
    ):
        command = ("generate", "--model", coarse, "--prompt", "One", "--dense")
        code, output, errors = run(*command, "--max-tokens", 2, "--fine-head", source)
        assert (code, output) == (2, "")
        assert refusal in errors
        assert errors.count("\n") == 1
    _, said = fine(coarse, original)
    assert said == [f"With the finer head of {original}, in 8 bits."]
    # The same rows come from another source, which was named.
    _, said = fine(coarse, copied(weights))
    assert said[-1] == f"With the finer head of {other}, in 8 bits."


def test_without_a_network_it_says_so(coarse, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "it was not downloaded before: check the name, or unset HF_HUB_OFFLINE" in refusal(
        coarse
    )
