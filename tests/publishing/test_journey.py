"""From Hub to Hub as a user does it: the commands, each a process of its own."""

import os
import subprocess
import sys

import huggingface_hub
import mlx_lm

import mlx_flashhead
from loopback_hub import TOKEN
from mlx_flashhead.index.files import FILE_NAME, SETTINGS_NAME
from mlx_flashhead.loading.sources import entries
from mlx_flashhead.publishing.publish import publish
from model_folders import contents, write_model


def put_model(hub, repo_id, folder, **further):
    """A model's repository, as if it had been uploaded."""
    files = contents(folder) | {name: text.encode() for name, text in further.items()}
    hub.put(repo_id, files)


def program(hub, cache, arguments, **environment):
    """Runs a module, as a user's own process, against the Hub."""
    kept = {k: os.environ[k] for k in ("PATH", "PYTHONPATH", "LD_PRELOAD") if k in os.environ}
    kept |= dict.fromkeys(("HOME", "HF_HOME"), str(cache))
    kept |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment = kept | {"NO_PROXY": "127.0.0.1"} | environment
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result


def test_a_flash_head_of_its_own_travels(hub, tmp_path):
    """One user makes and uploads it, another one uses it with the same model at 4 bits."""
    dense = write_model(tmp_path / "dense", tied=False)
    mlx_lm.convert(str(dense), str(tmp_path / "quantized"), quantize=True)
    card = "---\nlicense: llama3.2\n---\n"
    text = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"
    put_model(hub, "maker/Llama-Tiny", dense, **{"README.md": card, "LICENSE.txt": text})
    put_model(hub, "other/Llama-Tiny-4bit", tmp_path / "quantized")
    made = program(
        hub, tmp_path / "maker",
        ["mlx_flashhead.convert", "--model", "maker/Llama-Tiny", "--index-only", "--upload",
         "--calibration-positions", "200", "--mlx-path", str(tmp_path / "head")],
    )  # fmt: skip
    repo_id = "me/Llama-Tiny-FlashHead"
    assert made.stdout.splitlines()[-1] == f"Uploaded to {hub.url}/{repo_id}"
    assert TOKEN not in made.stdout + made.stderr
    files = hub.files(repo_id)
    assert files == contents(tmp_path / "head")
    assert {*files} == {FILE_NAME, SETTINGS_NAME, "README.md", "LICENSE.txt", "NOTICE.txt"}
    card = files["README.md"].decode()
    expected = {"base_model": "maker/Llama-Tiny", "base_model_relation": "adapter"}
    assert expected.items() <= huggingface_hub.ModelCard(card).data.to_dict().items()
    assert "**Built with Llama**" in card
    command = f"mlx_flashhead.generate --model maker/Llama-Tiny --flash-head {repo_id} --prompt"
    assert command in card and "| probes | agreement |" in card
    assert "Derived: flash_head.index was computed" in files["NOTICE.txt"].decode()
    generate = [
        "mlx_flashhead.generate", "--model", "other/Llama-Tiny-4bit", "--flash-head", repo_id,
        "--prompt", "One", "--max-tokens", "3", "--no-build",
    ]  # fmt: skip
    used = program(hub, tmp_path / "user", generate)
    assert "was made from another form of these rows" in used.stderr
    assert "Generation: 3 tokens" in used.stdout
    asked = len(hub.requests)
    assert "3 tokens" in program(hub, tmp_path / "user", generate, HF_HUB_OFFLINE="1").stdout
    assert len(hub.requests) == asked
    # uploaded again from its folder, beside weights that stay
    hub.put(repo_id, {"model.safetensors": b"kept"})
    upload = ["mlx_flashhead.upload", "--path", str(tmp_path / "head"), "--repo", repo_id]
    again = program(hub, tmp_path / "maker", upload)
    assert again.stdout.splitlines()[-1] == f"Uploaded to {hub.url}/{repo_id}"
    assert hub.files(repo_id)["model.safetensors"] == b"kept"


def test_load_asks_the_network_for_what_is_named_alone(hub, tmp_path):
    """What was built at the first use is shared, and nobody gets it without naming it."""
    dense = write_model(tmp_path / "Tiny", tied=False)
    mlx_flashhead.load(str(dense), progress=False)  # builds
    assert hub.requests == []
    (kept,) = entries()
    address = publish(kept.path, license="mit")
    assert address == f"{hub.url}/me/Tiny-FlashHead"
    assert {FILE_NAME, SETTINGS_NAME, "README.md"} == {*hub.files("me/Tiny-FlashHead")}
    put_model(hub, "me/Tiny", dense)
    hub.requests.clear()
    mlx_flashhead.load("me/Tiny", progress=False)  # with the one that is kept here
    assert hub.requests and not any("FlashHead" in path for _, path in hub.requests)
    hub.requests.clear()
    model, _ = mlx_flashhead.load(str(dense), flash_head="me/Tiny-FlashHead", progress=False)
    assert mlx_flashhead.get_flash_head(model).n_clusters == 17
    assert hub.requests and all("me/Tiny-FlashHead" in path for _, path in hub.requests)
