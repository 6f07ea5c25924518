"""From Hub to Hub as users do it: one makes a FlashHead and uploads it, another one uses it."""

import huggingface_hub
import mlx_lm

import mlx_flashhead
from loopback_hub import TOKEN
from mlx_flashhead.index.files import FILE_NAME, SETTINGS_NAME
from mlx_flashhead.loading.cached import entries
from mlx_flashhead.publishing.publish import publish
from model_folders import contents


def test_a_flash_head_of_its_own_travels(run, hub, dense, tmp_path, monkeypatch):
    """It serves the same model at 4 bits, later without a network."""
    mlx_lm.convert(str(dense), str(tmp_path / "quantized"), quantize=True)
    text = b"LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"
    further = {"README.md": b"---\nlicense: llama3.2\n---\n", "LICENSE.txt": text}
    hub.put("maker/Llama-Tiny", contents(dense) | further)
    hub.put("other/Llama-Tiny-4bit", contents(tmp_path / "quantized"))
    head = tmp_path / "head"
    repo_id = "me/Llama-Tiny-FlashHead"
    options = ("--index-only", "--upload", "--calibration-positions", 200, "--mlx-path", head)
    code, output, errors = run("convert", "--model", "maker/Llama-Tiny", *options)
    assert code == 0, errors
    assert output.splitlines()[-1] == f"Uploaded to {hub.url}/{repo_id}"
    assert TOKEN not in output + errors
    files = hub.files(repo_id)
    assert files == contents(head)
    assert {*files} == {FILE_NAME, SETTINGS_NAME, "README.md", "LICENSE.txt", "NOTICE.txt"}
    assert "Derived: flash_head.index was computed" in files["NOTICE.txt"].decode()
    card = files["README.md"].decode()
    expected = {"base_model": "maker/Llama-Tiny", "base_model_relation": "adapter"}
    assert expected.items() <= huggingface_hub.ModelCard(card).data.to_dict().items()
    command = f"mlx_flashhead.generate --model maker/Llama-Tiny --flash-head {repo_id} --prompt"
    for said in ("**Built with Llama**", command, "| probes | agreement |"):
        assert said in card
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        asked = len(hub.requests)
        options = ("--flash-head", repo_id, "--prompt", "One", "--max-tokens", 3, "--no-build")
        code, output, errors = run("generate", "--model", "other/Llama-Tiny-4bit", *options)
        assert code == 0
        assert "Generation: 3 tokens" in output
        assert "was made from another form of these rows" in errors
        assert (len(hub.requests) == asked) == offline
    # Uploaded again from its folder, beside weights that stay.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.put(repo_id, {"model.safetensors": b"kept"})
    assert run("upload", "--path", head, "--repo", repo_id)[0] == 0
    assert hub.files(repo_id)["model.safetensors"] == b"kept"


def test_load_asks_the_network_for_what_is_named_alone(hub, dense, quick):
    """What was built at the first use is shared, and nobody gets it without naming it."""
    # This builds a FlashHead.
    mlx_flashhead.load(str(dense), progress=False)
    assert hub.requests == []
    (kept,) = entries()
    head = "me/model-FlashHead"
    assert publish(kept.path, license="mit") == f"{hub.url}/{head}"
    assert {FILE_NAME, SETTINGS_NAME, "README.md"} == {*hub.files(head)}
    hub.put("me/Tiny", contents(dense))
    hub.requests.clear()
    # This uses the cached one.
    mlx_flashhead.load("me/Tiny", progress=False)
    asked = " ".join(path for _, path in hub.requests)
    assert asked
    assert "FlashHead" not in asked
    assert "README" not in asked
    hub.requests.clear()
    model, _ = mlx_flashhead.load(str(dense), flash_head=head, progress=False)
    assert mlx_flashhead.get_flash_head(model).n_clusters == 17
    assert hub.requests
    assert all(head in path for _, path in hub.requests)
