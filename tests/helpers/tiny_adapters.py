"""Random LoRA and DoRA adapters, as mlx-lm stores them."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers


def write_adapters(folder, dense, *, kind="lora", keys=("self_attn.q_proj", "mlp.down_proj")):
    """Random adapters for a dense model's folder."""
    parameters = {"rank": 4, "scale": 8.0, "dropout": 0.0, "keys": list(keys)}
    model, _ = mlx_lm.load(str(dense))
    linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.normal(scale=0.3, size=array.shape).astype(np.float32))
        for name, array in tree_flatten(model.parameters())
        if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
