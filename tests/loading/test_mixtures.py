"""Models that people run, as tiny ones: loaded, built, verified, and with a finer head."""

import importlib
import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import mlx_flashhead
from architecture_configs import COMMON, OVERRIDES
from mlx_flashhead import get_flash_head
from mlx_flashhead.decoding.policy import decoding_mode, policy_of
from mlx_flashhead.head.matrix import Matrix
from mlx_flashhead.models.locate import find_head
from model_folders import VOCAB_SIZE, write_tokenizer

# The architectures of mlx-lm change from one release to the next.
pytestmark = pytest.mark.newest

N_TOKENS = 9
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
# Each model has its architecture in mlx-lm, whether its rows are tied, and more.
FAMILIES = {
    "Qwen3.6-35B-A3B": ("qwen3_5_moe", False, EXPERTS | {"num_hidden_layers": 4}),
    "Gemma-4-26B-A4B": (
        "gemma4",
        True,
        EXPERTS
        | {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gpt-oss-20b": ("gpt_oss", False, {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "Ling-mini-2.0": (
        "bailing_moe",
        False,
        {"num_experts": 16, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 1},
    ),
    "LFM2-8B-A1B": (
        "lfm2_moe",
        True,
        EXPERTS | {"num_dense_layers": 1, "full_attn_idxs": [1], "layer_types": None},
    ),
    "LFM2.5-2.6B": ("lfm2", True, {"full_attn_idxs": [1], "layer_types": None}),
    "Gemma-3-4B": ("gemma3", True, {}),
    "MiniCPM5-1B": ("llama", False, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """A model as its maker has it, and the same in 4 bits, which names it."""
    architecture, tied, more = FAMILIES[request.param]
    place = tmp_path_factory.mktemp("family")
    original = place / request.param
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    config = COMMON | OVERRIDES.get(architecture, {}) | more
    config |= {"model_type": architecture, "vocab_size": VOCAB_SIZE, "tie_word_embeddings": tied}
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    if config["layer_types"]:
        config["layer_types"] = config["layer_types"] * (config["num_hidden_layers"] // 2)
    mx.random.seed(3)
    if "text_config" in module.ModelArgs.__dataclass_fields__:
        config = {"text_config": config} | config
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        # Matrices are larger than a fresh layer's, so that the logits differ from token to token.
        if array.ndim == 2:
            array = array * 4
        weights[name] = array.astype(mx.bfloat16)
    original.mkdir()
    mx.save_safetensors(str(original / "model.safetensors"), weights, metadata={"format": "mlx"})
    (original / "config.json").write_text(json.dumps(config))
    write_tokenizer(original)
    coarse = place / f"{request.param}-4bit"
    mlx_lm.convert(str(original), str(coarse), quantize=True, q_bits=4)
    return original, coarse


def proposed(model, tokenizer, prompt):
    """The greedy text with FlashHead, verified, whatever it gains here."""
    policy_of(get_flash_head(model)).dense = False
    assert decoding_mode(model).is_verified
    return mlx_flashhead.generate(model, tokenizer, prompt, max_tokens=N_TOKENS)


@pytest.mark.usefixtures("quick")
def test_the_text_is_mlx_lms_with_the_head_as_it_is_and_finer(folders):
    original, coarse = folders
    model, tokenizer = mlx_flashhead.load(str(coarse), progress=False)
    plain, _ = mlx_lm.load(str(coarse))
    expected = mlx_lm.generate(plain, tokenizer, "Where is Osaka?", max_tokens=N_TOKENS)
    assert proposed(model, tokenizer, "Where is Osaka?") == expected

    model, _ = mlx_flashhead.load(str(coarse), fine_head=original, progress=False)
    own = find_head(mlx_lm.load(str(original))[0]).module
    module = find_head(plain).module
    rows = Matrix(own.weight).quantize(bits=8, group_size=64)
    module.weight = rows.weight
    module.scales = rows.scales
    module.biases = rows.biases
    module.bits = 8
    expected = mlx_lm.generate(plain, tokenizer, "Where is Osaka?", max_tokens=N_TOKENS)
    assert proposed(model, tokenizer, "Where is Osaka?") == expected
    assert get_flash_head(model).clustered.rows.bits == 8
