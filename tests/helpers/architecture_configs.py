"""Small configurations of mlx-lm's architectures.

Almost every name has the same sense in most architectures, so there is one dictionary for all, by
value, and a few lines where one wants something else. mlx-lm drops what an architecture does
not know. The scales of logits are not 1, so that each is seen to be applied.
"""

from typing import Any

# The number is odd, so the last cluster is padded.
VOCAB_SIZE = 301
HIDDEN_SIZE = 64

_LAYERS = {"sliding_attention": {}, "full_attention": {}}
_ROPE = {"type": "default", "rope_type": "default", "rope_theta": 10000.0}
_ROPE_OF_LAYERS = _ROPE | dict.fromkeys(_LAYERS, _ROPE) | {"factor": 1.0}
_ROPE_OF_LAYERS |= {"original_max_position_embeddings": 512, "llama_4_scaling_beta": 0.1}
_LINEAR_ATTENTION = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 2, "head_dim": 32}
_LINEAR_ATTENTION |= {"short_conv_kernel_size": 4}


def named(*groups: tuple[Any, str]) -> dict[str, Any]:
    """A configuration of values, each with the names that it has."""
    return {name: value for value, names in groups for name in names.split()}


COMMON = named(
    (VOCAB_SIZE, "vocab_size num_vocab vocab_size_per_layer_input embedding_size"),
    (512, "max_position_embeddings model_max_length n_positions n_ctx block_size"),
    (HIDDEN_SIZE, "hidden_size hidden_dim d_model model_dim n_embd block_dim"),
    (2, "num_hidden_layers num_layers n_layers n_layer num_transformer_layers num_attention_heads"),
    (2, "num_heads n_heads n_head num_attention_groups num_key_value_heads num_kv_heads"),
    (2, "n_kv_heads full_attention_interval sliding_window_pattern index_n_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k layer_group_size"),
    (2, "linear_num_value_heads linear_num_key_heads mamba_n_heads mamba_num_heads mamba_expand"),
    (2, "swa_num_attention_heads swa_num_key_value_heads o_groups hc_mult cla_share_factor"),
    (2, "attn_layer_period expert_layer_period dense_attention_every_n_layers conv_window"),
    (2, "altup_num_inputs ngram_vocab_size_ratio emb_split_num"),
    (32, "head_dim hidden_size_per_head kv_channels block_multiple_of kv_lora_rank q_lora_rank"),
    (32, "qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim"),
    (32, "linear_value_head_dim mamba_d_head mamba_head_dim a_low_rank_dim v_low_rank_dim"),
    (32, "gate_low_rank_dim decay_low_rank_dim hidden_size_per_layer_input global_head_dim"),
    (32, "laurel_rank ffn_dim_divisor o_lora_rank swa_head_dim swa_v_head_dim dim_model_base"),
    (128, "intermediate_size intermediate_size_mlp dense_intermediate_size n_inner"),
    (128, "ffn_hidden_size ff_intermediate_size mlp_hidden_size block_ff_dim"),
    (64, "shared_intermediate_size attention_chunk_size index_topk moe_intermediate_size"),
    (64, "shared_expert_intermediate_size expert_ffn_hidden_size"),
    (64, "moe_shared_expert_intermediate_size share_expert_dim mamba_d_ssm moe_hidden_size"),
    (1, "n_shared_head n_shared_experts num_shared_experts num_shared_expert"),
    (1, "moe_num_shared_experts n_group topk_group first_k_dense_replace num_dense_layers"),
    (1, "moe_layer_freq interleave_moe_layer_step decoder_sparse_step zero_expert_num"),
    (1, "mamba_n_groups n_groups group_norm_size num_kv_reuse_layers attn_layer_offset"),
    (1, "expert_layer_offset"),
    (1.0, "block_ffn_dim_multiplier routed_scaling_factor"),
    (True, "block_auto_adjust_ff_dim qk_norm use_qk_norm mla_scale_q_lora mla_scale_kv_lora"),
    (True, "norm_topk_prob use_expert_bias mamba_conv_bias use_conv_bias altup_correct_scale"),
    (True, "use_mixed_mlp_moe add_swa_attention_sink_bias"),
    ("silu", "hidden_act"),
    (1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon"),
    (1e-5, "post_norm_eps"),
    (False, "attention_bias mlp_bias use_bias use_qkv_bias conv_bias bias post_norm"),
    (False, "linear_allow_neg_eigval mamba_proj_bias use_cla add_full_attention_sink_bias"),
    (list(_LAYERS), "layer_types"),
    (8, "sliding_window sliding_window_size attention_window_size window_size"),
    ([1, 1], "no_rope_layers"),
    (0, "num_kv_shared_layers altup_active_idx"),
    (10000.0, "rope_theta rope_local_base_freq rotary_emb_base swa_rope_theta"),
    (None, "rope_scaling"),
    (_ROPE_OF_LAYERS, "rope_parameters"),
    (0.5, "partial_rotary_factor rotary_pct residual_multiplier output_multiplier"),
    (0.5, "lm_head_multiplier"),
    (16, "rotary_dim mamba_d_state state_size ssm_state_size"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts linear_conv_kernel_dim"),
    (4, "mamba_d_conv conv_kernel conv1d_width time_step_rank"),
    ([], "mlp_only_layers"),
    ("noaux_tc", "topk_method"),
    ("sigmoid", "scoring_func"),
    ("identity", "zero_expert_type"),
    (_LINEAR_ATTENTION, "linear_attn_config"),
    (3, "conv_L_cache emb_neighbor_num"),
    ((0.001, 100.0), "time_step_limit"),
    (["recurrent", "attention"], "block_types"),
    ([0.5, 0.0], "activation_sparsity_pattern"),
    ([2, 2], "num_query_heads"),
    ([1.0, 1.0], "ffn_multipliers"),
    ([1, 0], "hybrid_layer_pattern"),
    ([0], "sliding_window_layers"),
    ([False, True], "is_moe_layer"),
    ([10000.0, 0], "layer_rope_theta"),
    (20.0, "gegelu_limit"),
    (120.0, "altup_coef_clip"),
    (2.0, "mup_width_multiplier logits_scaling embedding_multiplier"),
    (0.2, "attention_multiplier"),
    (1.4, "scale_depth"),
    (12.0, "scale_emb"),
    (5.0, "logits_soft_cap final_logit_softcapping"),
)

OVERRIDES = {
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "deepseek_v41": {"scoring_func": "sqrtsoftplus"},
    "exaone4": {"sliding_window_pattern": "LG"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}},
    "kimi_k3": {"hidden_act": "situ"},
    "llama4": {"num_hidden_layers": 4, "num_experts_per_tok": 1},
    "longcat_flash": {"attention_method": "MLA"},
    "mimo_v2_flash": {"moe_layer_freq": [0, 1]},
    "minicpm3": {"rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16}},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1]},
    "muse_spark": {"num_shared_experts": 0},
    "nemotron-nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 2.0}}] * 2
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "E"]},
    "openelm": {"num_kv_heads": [2, 2]},
    "prism_hadamard_qwen35": lambda tied: {
        # Its packed layers are rotated in blocks of 512.
        "hidden_size": 512,
        "schema_version": 2,
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": embedding, "block": 512, "dtype": "float16"}
            for path, embedding in (("model.embed_tokens", True), ("lm_head", False))
            if embedding or not tied
        ],
    },
    "spark2_5": {"hidden_act": "gelu"},
}
