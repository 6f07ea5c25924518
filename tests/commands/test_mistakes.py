"""Mistakes end with one sentence, before any work, and no file is written or changed."""

import shlex

import pytest

from model_folders import snapshot

FILES = {
    "empty.txt": b"",
    "utf-16.txt": b"\xff\xfe",
    "old.json": b"old",
    "schema.json": b'{"items": {"type": "x"}}',
    "grammar": b"start: foo",
}
HEAD = "benchmark head --shape 320,64 --n-probes 3 --rounds 1"
TEXT = "evaluate text --model model --text text.txt"
NEW = "convert --model dense --mlx-path new"
OUTPUT = "evaluate text --model ./absent --text text.txt"
ANY_SITE = "server --model ./absent --allowed-origins"
# A command line, in a folder with the converted `model`, the `dense` one and text.txt.
MISTAKES = [
    ("benchmark head", "arguments --shape --model is required"),
    ("benchmark head --shape 320,64 --n-probes 21", "choose 1 to 20"),
    (f"{HEAD} --plot a.xyz", "must end in .png"),
    (f"{HEAD} --json absent/a.json", "cannot be written"),
    ("evaluate", "required: text, as in mlx_flashhead.evaluate text --model mlx_model --text"),
    ("evaluate text --modle x --text y", "required: --model, as in mlx_flashhead.evaluate text"),
    ("generate --promt hi", "there is no --promt: did you mean --prompt?"),
    ("generate --model x --temperature 1", "there is no --temperature: did you mean --temp?"),
    ("generate --model x 'Why is the sky blue?'", "did you mean --prompt 'Why is the sky blue?'?"),
    ("generate --model x --verbose maybe", "--verbose is maybe: give T or F"),
    ("server owner/name", "owner/name has no flag before it: did you mean --model owner/name?"),
    ("chat --model ./absent", "There is no folder ./absent"),
    ("chat --model https://huggingface.co/owner/name/tree/main", "give OWNER/NAME, owner/name."),
    ("chat --model dense --dense --n-probes 3", "has no FlashHead"),
    ("chat --model model --n-probes 18", "1 to 17"),
    # --mlx-path is mlx_model by default.
    ("convert --model dense", "exists already"),
    (f"convert --model dense --mlx-path {'long' * 100}", "File name too long"),
    (f"{NEW} --target-agreement 2", "--target-agreement is 2: give a number above 0, at most 1"),
    (f"{NEW} -q -d", "either --quantize or --dequantize, not both"),
    (f"{OUTPUT} --json old.json", "no folder ./absent"),
    (f"{TEXT} --probes 2,18", "1 to 17"),
    ("evaluate text --model model --text empty.txt", "is empty"),
    ("evaluate text --model model --text utf-16.txt", "not UTF-8"),
    ("export --model model --output head.bin", "must end in .safetensors"),
    ("export --model model --output absent/head.safetensors", "there is no folder absent"),
    ("export --model model --output new.safetensors --n-probes 18", "1 to 17"),
    # Programs that load every file there would refuse the model.
    ("export --model model --output model/new.safetensors", "lies in a model's folder"),
    ("generate --model x --draft-probes 2", "add --draft-model"),
    ("generate --model x --draw-probes", "--temp above 0"),
    ("generate --model x --dense --n-probes 4", "leave --n-probes out"),
    ("generate --model model --json-schema schema.json", "schema is wrong: Invalid type"),
    (
        "generate --model model --json-schema text.txt",
        "text.txt is not JSON (Expecting value at li",
    ),
    (
        """generate --model model --json-schema '{"type": "x"}'""",
        "--json-schema: The JSON schema is wrong: Invalid type: x",
    ),
    (
        "generate --model model --json-schema '{type'",
        "--json-schema is not JSON (Expecting property",
    ),
    (
        "generate --model model --json-schema nowhere.json",
        "there is no file nowhere.json: give one that exists, or the schema itself",
    ),
    ("generate --model model --grammar grammar", "grammar is wrong at line 1, column 8"),
    ("generate --model model --regex [", "expression '[' is wrong at column 1: unclosed character"),
    ("generate --model model --regex ab(", "'ab(' is wrong at column 3: unclosed group"),
    ("generate --model model --regex a --grammar b", "not allowed with"),
    ("generate --model model --regex a --draw-probes --temp 1", "leave it out"),
    ("server --model ./absent", "There is no folder ./absent"),
    ("server --model x --draft-probes 2", "add --draft-model"),
    ("server --model x --draft-model y --no-verify", "--no-verify verifies no guesses"),
    ("server --model model --lan --token-file absent/token", "there is no folder absent"),
    ("server --model x --log-level loud", "--log-level: invalid choice: 'LOUD'"),
    ("server --model x --lan --host 127.0.0.1", "127.0.0.1 is this machine alone: leave it out"),
    (f"{ANY_SITE} *", "--allowed-origins *: name each site"),
    (f"{ANY_SITE} https://a.example/b", "--allowed-origins https://a.example/b"),
    ("server --model model --port 0 --n-probes 18", "1 to 17"),
    ("server --model dense --port 0 --flash-head mlx_model", "mlx_model holds no FlashHead"),
    ("server --model model --port 0 --host no.such.host.invalid", "host.invalid cannot be used"),
    (
        "server --model model --port 0 --kv-bits 4 --kv-group-size 128 --quantized-kv-start 0",
        "groups of 128 (",
    ),
    ("server --model nested --port 0", "cannot load the model in nested (maximum recursion"),
    ("chat --model nested", "cannot load the model in nested (maximum recursion"),
    ("upload --path dense", "holds no FlashHead: make one"),
    (f"{NEW} --upload me/a --upload-repo me/b", "two repositories"),
    (f"{NEW} --base-model name", "'name' is not a name of a repository: give OWNER/NAME"),
    pytest.param("generate --model x --prefill-step-size 0", "size is 0", marks=pytest.mark.newest),
]


@pytest.mark.parametrize("line, said", MISTAKES)
def test_mistakes(refused, dense, converted, text, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "mlx_model").mkdir()
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text("[" * 50_000 + "]" * 50_000)
    for name, folder in (("model", converted), ("dense", dense)):
        (tmp_path / name).symlink_to(folder)
    before = snapshot(tmp_path), snapshot(converted)
    assert said in refused(*shlex.split(line))
    assert (snapshot(tmp_path), snapshot(converted)) == before
