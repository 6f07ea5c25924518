"""Small configurations of mlx-vlm's architectures, beside those of mlx-lm's."""

from architecture_configs import OVERRIDES, VOCAB_SIZE, named

VISION = named(
    (32, "hidden_size embed_dim width"),
    (64, "intermediate_size out_hidden_size projection_dim"),
    (2, "num_hidden_layers layers depth num_attention_heads num_heads heads num_key_value_heads"),
    (28, "image_size"),
    (14, "patch_size"),
    (3, "num_channels"),
    (16, "head_dim"),
    (2.0, "mlp_ratio"),
    (VOCAB_SIZE, "vocab_size"),
)
IMAGE_TOKEN = VOCAB_SIZE - 1
IMAGE_TOKENS = dict.fromkeys(("image_token_id", "image_token_index"), IMAGE_TOKEN)

SIGLIP = {"vision": {"model_type": "siglip_vision_model"}}
LLAVA = {"vision": {"model_type": "clip_vision_model"}, "text_config": {"model_type": "llama"}}
MROPE = {"type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
GLM4V = {"eos_token_id": [1], "rope_scaling": MROPE, "rope_parameters": MROPE}
PROJECTOR = {"projector_type": "mlp_gelu", "depth": 1}
FLORENCE = named(
    *(([1], "depths"), ([32], "dim_embed"), ([2], "num_heads num_groups"), ([7], "patch_size")),
    *(([4], "patch_stride"), ([3], "patch_padding"), ([False], "patch_prenorm")),
)
LLAMA4 = named(
    *(("llama4", "model_type"), (0.02, "initializer_range"), (1e-5, "norm_eps")),
    *((0.5, "pixel_shuffle_ratio"), (0.0, "projector_dropout"), (10000.0, "rope_theta")),
    *((-1, "vision_feature_layer"), ("default", "vision_feature_select_strategy")),
    (64, "projector_input_dim projector_output_dim vision_output_dim"),
)
CLEF_HEAD = named(
    (64, "hidden_size feedforward"), (32, "width"), (1, "routing_layers layers"), (2, "heads")
)
QWEN3_5 = {
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": MROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
}

# For each: "text" of the language model, wherever its configuration stands; "text_config" of the
# nested one alone; "vision", "audio", and the "whole"; "exact" if unknown keys are errors.
VLM_OVERRIDES: dict[str, dict] = named(
    (SIGLIP, "aya_vision colidefics3 idefics3"),
    ({"vision": {"model_type": "vision"}}, "deepseek_vl_v2 deepseekocr unlimited_ocr"),
    (LLAVA, "llava llava_next"),
    ({"text": QWEN3_5}, "decider2 indic_ocr prism_hadamard_qwen35 qwen3_5 qwen3_5_text"),
    ({"text": QWEN3_5}, "qwen3_5_moe qwen3_5_moe_text"),
) | {
    "clef": {"text": QWEN3_5, "whole": {"head_config": CLEF_HEAD}},
    "deepseekocr_2": {"vision": {"model_type": "vision", "width": {}}},
    "ernie4_5_moe_vl": {"text": {"mrope_section": [6, 6, 4]}},
    "florence2": {"vision": FLORENCE},
    "gemma3": SIGLIP | {"text": {"mm_tokens_per_image": 4}},
    "gemma3n": {"text": {"intermediate_size": [128, 128]}},
    "glm4v": {"vision": {"model_type": "glm4v"}, "text": GLM4V},
    "glm4v_moe": {"vision": {"model_type": "glm4v_moe"}, "text": GLM4V},
    "glm5_next": {"text": {"qk_rope_head_dim": 0, "mla_use_nope": True}},
    "glm_ocr": {"exact": True, "text": {"eos_token_id": [1], "rope_parameters": MROPE}},
    "granite4_vision": {"vision": {"hidden_size": 64}},
    "hunyuan_vl": {
        "text": {"rope_scaling": {"type": "xdrope", "alpha": 1.0, "xdrope_section": [4, 4, 4, 4]}}
    },
    "idefics2": {
        "vision": {"model_type": "idefics2"},
        "whole": {"perceiver_config": {"model_type": "idefics2"}},
    },
    "internvl": {"vision": {"model_type": "internvl_vision"}},
    "internvl_chat": {"vision": {"model_type": "intern_vit_6b"}},
    "limite": {"text": {"rope_n_pairs": 8, "attn_gate_channels": 32}},
    "llama4": {"vision": LLAMA4},
    "llava_bunny": SIGLIP | {"whole": {"auto_map": {}, "mm_hidden_size": 32}},
    "llmjpvl": SIGLIP | {"text_config": {"model_type": "llama"}},
    "mage_vl": {"vision": {"hidden_size": 64}},
    "mimo_v2": {"text": OVERRIDES["mimo_v2_flash"]},
    "minimax_m3": {"text": OVERRIDES["minimax_m3_vl"]},
    "molmo_point": {"whole": {"adapter_config": {"vit_layers": [-1]}}},
    "multi_modality": {
        "vision": {"model_type": "vision", "params": {}},
        "text_config": {"model_type": "llama"},
        "whole": {"projector_config": {"cls": "", "model_type": "", "params": PROJECTOR}},
    },
    "muse_spark": {"audio": {"patch_sizes": [2, 2], "hidden_sizes": [32, 32], "depths": [1, 1]}},
    "nemotron_h_nano_omni": {"text": OVERRIDES["nemotron_h"]},
    "nemotron_nas": {"text": OVERRIDES["nemotron-nas"]},
    "paddleocr_vl": {"text": {"rope_parameters": MROPE}},
    "phi4_siglip": {"exact": True},
    "paligemma": SIGLIP | {"text_config": {"model_type": "gemma", "hidden_act": "gelu"}},
    "plamo2vl": SIGLIP | {"text_config": {"model_type": "plamo2"}},
    "qwen3_omni_moe": {"whole": {"enable_audio_output": False}},
    "qwen4_exp": {"text": QWEN3_5 | {"hc_count": 2, "indexer_head_dim": 32, "indexer_heads": 2}},
}

# Architectures with a picture in the tests: how they take it, and its number of tokens.
PICTURES: dict[str, tuple[str, int]] = named(
    (("packed", 1), "d1 lfm2_vl youtu_vl"),
    (("patches", 1), "mage_vl"),
    (("patches", 4), "hunyuan_vl"),
    (("pixels", 1), "aya_vision internvl internvl_chat llmjpvl multi_modality muse_spark pixtral"),
    (("pixels", 1), "step3p7"),
    (("pixels", 4), "llava"),
    (("sized", 1), "mistral3 mistral_large3"),
    (("sized", 5), "llava_onevision"),
    (("squares", 1), "kimi_k25 kimi_vl"),
    (("tiles", 1), "granite_vision idefics3 llava_next smolvlm"),
    (("two frames", 1), "clef cohere_compass glm4v glm4v_moe glm5_next glm_ocr indic_ocr mimo_v2"),
    (("two frames", 1), "minimax_m3_vl qwen2_5_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe"),
    (("two frames", 1), "qwen4_exp zaya1_vl"),
)
