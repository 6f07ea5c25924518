"""A tiny vision model in a real folder, with a processor that reads pictures."""

import json
from copy import deepcopy
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.models import qwen2_vl
from mlx_vlm.utils import update_module_configs
from PIL import Image
from transformers import AutoTokenizer

from model_folders import write_tokenizer
from vlm_models import vlm_config

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# It takes a message's content as parts, as templates of vision models do.
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_vision_model(folder: Path, *, tied: bool = False) -> Path:
    """Writes a random model of the architecture qwen2_vl, whose logits differ from each other."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.save_pretrained(folder)
    names = [f"{name}_token_id" for name in ("vision_start", "vision_end", "image", "video")]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    text = rope | {"vocab_size": len(tokenizer)}
    config = vlm_config("qwen2_vl", tied) | text | ids | {"eos_token_id": tokenizer.eos_token_id}
    config["text_config"] |= text
    width = config["hidden_size"]
    config["vision_config"] |= {"hidden_size": width, "in_channels": 3, "mlp_ratio": 2}
    made = qwen2_vl.ModelConfig.from_dict(deepcopy(config))
    made = update_module_configs(made, qwen2_vl, deepcopy(config), ["text", "vision"])
    mx.random.seed(0)
    weights = {}
    for name, array in tree_flatten(qwen2_vl.Model(made).parameters()):
        if array.ndim == 2 and "embed_tokens" not in name:
            array = array * 4
        weights[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    pictures = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | sizes))
    return folder


def write_picture(path: Path, colour: str = "red") -> Path:
    """Writes a picture of 56 × 28 pixels."""
    picture = Image.new("RGB", (56, 28), colour)
    picture.paste("white", (0, 0, 20, 20))
    picture.save(path)
    return path
