"""The FlashHead file: what is written is read back, and damage is an error."""

import json
import math
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

import refusals
from mlx_flashhead.index import files
from mlx_flashhead.models.loading import load_dense
from model_folders import contents, write_model
from tiny_models import tiny_index

CONVERT = r"make (it again|one) with `?mlx_flashhead\.convert"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with FlashHead: 258 tokens in clusters of 8, the last one padded; and its index."""
    folder = write_model(tmp_path_factory.mktemp("checkpoint") / "model")
    model = load_dense(folder)[0]
    index = tiny_index(model, eos_token_ids=(1,))
    files.write_index(folder, index)
    return folder, index


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(original[0], tmp_path / "model")


def arrays(index):
    centroids = index.centroids
    ids = mx.array(index.token_ids)
    named = {"bias": centroids.bias, "tail": centroids.tail_offset, "ids": ids}
    return named | vars(index.sketch) | centroids.matrix.arrays()


def same(actual, expected) -> bool:
    """Whether two indexes have the same settings and arrays."""
    found = arrays(actual)
    wanted = arrays(expected)
    if actual.config != expected.config or found.keys() != wanted.keys():
        return False
    if actual.centroids.matrix.quantization != expected.centroids.matrix.quantization:
        return False
    equal = [mx.array_equal(found[name], array) for name, array in wanted.items()]
    return all(equal) and all(found[name].dtype == array.dtype for name, array in wanted.items())


@pytest.mark.parametrize("hidden_size", [40, 96])
def test_round_trip(hidden_size, tmp_path):
    """40 is not divisible by any quantization group: the centroids are floats."""
    folder = write_model(tmp_path / "model", hidden_size=hidden_size)
    index = tiny_index(load_dense(folder)[0], cluster_size=60)
    assert index.centroids.matrix.quantized == (hidden_size != 40)
    files.write_index(folder, index)
    assert same(files.read_index(folder), index)


def test_writing_again_replaces_and_keeps_the_other_keys(folder, original):
    other = replace(original[1], config=replace(original[1].config, n_probes=7))
    files.write_index(folder, other)
    assert same(files.read_index(folder), other)
    config = json.loads((folder / "config.json").read_text())
    entry = config.pop(files.CONFIG_KEY)
    assert (config["model_type"], config["vocab_size"]) == ("llama", 258)
    assert (entry["n_clusters"], entry["cluster_size"], entry["n_probes"]) == (33, 8, 7)
    assert (entry["version"], entry["eos_token_ids"], len(entry["fingerprint"])) == (2, [1], 64)
    # The FlashHead of its own comes first.
    files.write_companion(folder, original[1])
    assert same(files.read_index(folder), original[1])


def test_a_folder_of_its_own(original, tmp_path):
    assert not files.has_flash_head(tmp_path)
    files.write_companion(tmp_path, original[1])
    assert files.has_flash_head(tmp_path)
    assert contents(tmp_path).keys() == {files.FILE_NAME, files.SETTINGS_NAME}
    assert same(files.read_index(tmp_path), original[1])
    (tmp_path / files.SETTINGS_NAME).write_text("{")
    refused(tmp_path, f"{files.SETTINGS_NAME} is damaged", "fetch it again")


def refused(folder, *expected):
    """Reading raises one sentence with each of the patterns, and how to go on."""
    refusals.refused(lambda: files.read_index(folder), *expected)


def test_missing_files(folder, tmp_path):
    for empty in (write_model(tmp_path / "dense"), tmp_path):
        refused(empty, str(empty), "holds no FlashHead", CONVERT)
    assert files.has_flash_head(folder)
    (folder / files.FILE_NAME).unlink()
    assert not files.has_flash_head(folder)
    refused(folder, f"{files.FILE_NAME} is missing", "fetch the file", CONVERT)


def test_damaged_configuration(folder):
    for content in (b"", b"{", b"[1]", b"\xff\xfe\x00", b"null"):
        (folder / "config.json").write_bytes(content)
        refused(folder, r"config\.json is damaged", "fetch it again")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 0x10]),
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"checksum", b"no_verify"),
        lambda content: bytes(1000),
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        lambda content: b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ],
)
def test_damaged_file(folder, spoil):
    path = folder / files.FILE_NAME
    path.write_bytes(spoil(path.read_bytes()))
    refused(folder, f"{files.FILE_NAME} cannot be read because it is damaged", CONVERT)


def change_entry(folder, change):
    """Gives settings other values; those of None go."""
    config = json.loads((folder / "config.json").read_text())
    if change:
        changed = config[files.CONFIG_KEY] | change
        change = {name: value for name, value in changed.items() if value is not None}
    config[files.CONFIG_KEY] = change
    (folder / "config.json").write_text(json.dumps(config))


ROW = {"n_probes": 3, "greedy_differs": 0.1, "sampled_differs": 0.2}
RISK = {"greedy": [0, 1], "sampled": 1}
# By key, values that are refused. With some of the sizes an index of some megabytes would take
# gigabytes.
WRONG = {
    "n_probes": ["4", 0, 34],
    "unverified_probes": [0, 34],
    "n_clusters": [33.0, 32, -33, 10**18, 10**400],
    "cluster_size": [0, 16, 10**9],
    "vocab_size": [0, 131, 265],
    "centroid_group_size": [True],
    "eos_token_ids": [["1"], [258], 5, list(range(65))],
    "fingerprint": [1],
    "report": ["good"],
    "verification": [{"by_probes": []}, {"risk": RISK}],
}
WRONG_RISKS = [
    {"greedy": [0], "sampled": 1},
    {"greedy": [0, "1"], "sampled": 1},
    {"greedy": [0, 10**400], "sampled": 1},
    {"greedy": [0, 1], "sampled": -1},
    {"greedy": [0, 1], "sampled": math.nan},
]
WRONG_ROWS = [
    {},
    [3],
    [{}],
    [ROW] * 1001,
    [ROW | {"n_probes": 34}],
    [ROW | {"n_probes": 1e300}],
    [ROW | {"greedy_differs": 1.1}],
    [ROW | {"greedy_differs": "0"}],
]
WRONG["verification"] += [{"risk": risk, "by_probes": [ROW]} for risk in WRONG_RISKS]
WRONG["verification"] += [{"risk": RISK, "by_probes": rows} for rows in WRONG_ROWS]
CHANGES = [({key: value}, rf"is damaged \(.*{key}") for key in WRONG for value in WRONG[key]]
NEEDED = (
    "vocab_size",
    "n_clusters",
    "cluster_size",
    "n_probes",
    "unverified_probes",
    "fingerprint",
)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 1}, "version 1.*reads version 2"),
        ({"version": "2"}, "version '2'.*reads version 2"),
        ({"version": None}, "version None"),
        ([], "version None"),
        *(({name: None}, rf"is damaged \(.*missing required field {name}") for name in NEEDED),
        *CHANGES,
    ],
)
def test_settings_that_are_none(folder, change, said):
    change_entry(folder, change)
    refused(folder, rf"config\.json.*{said}", CONVERT)


def test_keys_of_a_later_package_are_ignored(folder, original):
    change_entry(folder, {"later": "yes"})
    assert same(files.read_index(folder), original[1])


def test_arrays_that_do_not_fit_the_settings(folder):
    entry = json.loads((folder / "config.json").read_text())[files.CONFIG_KEY]
    wrong = {
        "vocab_size": (257, 259),
        "n_clusters": (34,),
        "cluster_size": (9,),
        "centroid_group_size": (0, 64, -32),
        "centroid_bits": (8, 0),
    }
    said = f"{files.FILE_NAME} does not hold the arrays that its settings describe"
    for key, values in wrong.items():
        for value in values:
            change_entry(folder, entry | {key: value})
            refused(folder, said, CONVERT)


ARRAYS = [
    "token_ids",
    "centroids.weight",
    "centroids.scales",
    "centroids.biases",
    "centroid_bias",
    "tail_offset",
    "sketch.directions",
    "sketch.lengths",
]


def change_array(folder, name, change):
    """Changes an array in a folder's file, whose checksum is right all the same."""
    path = folder / files.FILE_NAME
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    arrays[name] = change(arrays[name])
    arrays = {name: array for name, array in arrays.items() if array is not None}
    mx.eval(arrays)
    metadata["checksum"] = files._checksum(arrays)
    with path.open("wb") as file:
        mx.save_safetensors(file, arrays, metadata=metadata)


NOT_AS_DESCRIBED = (files.FILE_NAME, "does not hold the arrays", CONVERT)


def test_the_arrays_of_a_file(original):
    arrays, _ = mx.load(
        str(original[0] / files.FILE_NAME), format="safetensors", return_metadata=True
    )
    assert set(arrays) == set(ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_array_that_is_not_as_described(original, folder, name):
    for spoil in (
        lambda array: None,
        lambda array: array[:-1],
        lambda array: array.reshape(1, -1),
        # The dtype is another one, too.
        lambda array: array * mx.array(mx.nan, mx.float16),
    ):
        shutil.copy(original[0] / files.FILE_NAME, folder)
        change_array(folder, name, spoil)
        refused(folder, *NOT_AS_DESCRIBED)


@pytest.mark.parametrize("wrong", [0, 258, 259, 2**32 - 1])
def test_each_token_is_there_once(folder, wrong):
    """A token twice, one missing, one that there is not."""
    wrong = mx.array(wrong, mx.uint32)
    change_array(folder, "token_ids", lambda token_ids: mx.where(token_ids == 5, wrong, token_ids))
    refused(folder, *NOT_AS_DESCRIBED)


def test_file_of_another_model(folder, tmp_path):
    """Its shapes fit, so only the fingerprint tells."""
    other = write_model(tmp_path / "other", seed=1)
    files.write_index(other, tiny_index(load_dense(other)[0], seed=1))
    shutil.copy(other / files.FILE_NAME, folder / files.FILE_NAME)
    refused(
        folder, f"{files.FILE_NAME} does not hold", "the same rows", "fetch both files", CONVERT
    )
