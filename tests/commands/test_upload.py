"""``upload``, and the options of ``convert`` that publish: what they print and refuse."""

import shutil

import pytest

from mlx_flashhead.index.files import FILE_NAME
from model_folders import VOCAB_SIZE, contents, write_model

LLAMA = "---\nlicense: llama3.2\n---\n"
TEXT = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"


@pytest.fixture(autouse=True)
def online(run, hub):
    """In this order: `run` switches the Hub off, and `hub` switches its own on."""


def convert(source, target, *further):
    return ("convert", "--model", source, "--mlx-path", target, "--calibration", "none", *further)


def test_upload(run, hub, converted, tmp_path):
    # Upload writes its card.
    folder = shutil.copytree(converted, tmp_path / "model")
    code, output, _ = run("upload", "--path", folder, "--private")
    name = "me/model-FlashHead-fp32"
    assert output == f"Uploading {folder} to {name}\nUploaded to {hub.url}/{name}\n"
    assert code == 0 and hub.repositories[name].private and FILE_NAME in hub.files(name)


@pytest.mark.parametrize(
    "flags, repo_id",
    [
        (("--upload", "--dtype", "bfloat16"), "me/model-FlashHead-bf16"),
        (("--upload", "--dtype", "float16", "--head-bits", 8), "me/model-FlashHead-8bit"),
        (("--upload", "-q", "--quant-predicate", "mixed_4_6"), "me/model-FlashHead-mixed_4_6"),
        (("--upload", "ours/x"), "ours/x"),
    ],
)
def test_convert_uploads(run, hub, dense, tmp_path, flags, repo_id):
    code, output, errors = run(*convert(dense, tmp_path / "new", *flags))
    assert code == 0, errors
    assert output.splitlines()[-1] == f"Uploaded to {hub.url}/{repo_id}"
    files = hub.files(repo_id)
    assert FILE_NAME in files and files == contents(tmp_path / "new")
    assert f"# {repo_id.partition('/')[2]}\n".encode() in files["README.md"]


def test_what_is_refused_is_refused_before_the_conversion(refused, hub, dense, tmp_path):
    source = write_model(tmp_path / "My-Tune")
    target = tmp_path / "new"
    flags = ("--upload", "--cluster-size", VOCAB_SIZE + 1)
    assert "--cluster-size is" in refused(*convert(dense, target, *flags))
    (source / "README.md").write_text(LLAMA)
    said = refused(*convert(source, target, "--upload"))
    assert "its text is missing: save https://www.llama.com" in said
    assert f"LICENSE.txt in {target}, made without --upload" in said
    (source / "LICENSE.txt").write_text(TEXT)
    said = refused(*convert(source, target, "--upload", "me/My-Tune"))
    assert "must begin with Llama, so call it me/Llama-My-Tune" in said
    assert hub.repositories == {} and not target.exists()


def test_gemma_with_its_terms_put_there_by_hand(run, refused, hub, tmp_path):
    source = write_model(tmp_path / "tuned", card=None)
    target = tmp_path / "new"
    assert run(*convert(source, target))[0] == 0
    upload = ("upload", "--path", target, "--repo", "me/tuned")
    said = refused(*upload)
    assert "is not known" in said and "--license, such as apache-2.0" in said
    said = refused(*upload, "--license", "gemma")
    assert f"save https://ai.google.dev/gemma/terms as LICENSE.txt in {target}" in said
    (target / "LICENSE.txt").write_text("Gemma Terms of Use\n")
    assert run(*upload, "--license", "gemma")[0] == 0
    assert b"Gemma is provided under" in hub.files("me/tuned")["NOTICE.txt"]
    # And it stays where the checkpoint is made anew.
    assert run(*convert(source, target, "--upload", "me/again", "--overwrite"))[0] == 0
    assert hub.files("me/again")["LICENSE.txt"] == b"Gemma Terms of Use\n"


def test_overwriting_keeps_what_a_person_wrote(run, dense, tmp_path):
    target = tmp_path / "new"
    card = tmp_path / "new" / "README.md"
    run(*convert(dense, target))
    card.write_text("Above.\n" + card.read_text() + "My notes.\n")
    assert run(*convert(dense, target, "--overwrite", "-q"))[0] == 0
    text = card.read_text()
    assert text.endswith("-->\nMy notes.\n") and "Above." not in text
    assert "# model-FlashHead-4bit" in text
