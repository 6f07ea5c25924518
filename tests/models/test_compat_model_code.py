"""mlx-lm's functions and tokenizers are what `models/compat` takes them for."""

import mlx.core as mx
from mlx_lm.models import base, internlm3, llama, mamba, qwen3
from mlx_lm.models.llama import Attention
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from mlx_flashhead.models.compat.model_code import (
    files_of,
    global_names,
    is_attention,
    is_rotation,
    library_functions,
    takes_cache,
    with_globals,
)
from mlx_flashhead.models.compat.tokenizers import has_function_for_template, inner_tokenizer
from model_folders import write_tokenizer


def test_an_attention_hands_keys_and_values_to_its_cache():
    for module in (llama, qwen3):
        assert is_attention(module.Attention)
        assert not is_attention(module.TransformerBlock)
        assert not is_attention(module.MLP)
    assert not is_attention(mamba.MambaBlock)


def test_a_layer_gets_its_cache_in_an_argument():
    for cls in (llama.Attention, llama.TransformerBlock, qwen3.Attention, mamba.MambaBlock):
        assert takes_cache(cls)
    assert not takes_cache(llama.MLP)


def test_a_rotation_of_mlx_lms_asks_for_the_number_of_positions():
    assert is_rotation(internlm3.DynamicNTKScalingRoPE)
    assert not is_rotation(llama.Attention)


def test_a_copied_function_has_other_globals_and_the_same_defaults():
    functions = {name: function for _, name, function in library_functions(Attention)}
    function = functions["__call__"]
    assert "scaled_dot_product_attention" in global_names(function)
    assert function.__globals__["scaled_dot_product_attention"] is base.scaled_dot_product_attention
    copied = with_globals(function, "other", {"scaled_dot_product_attention": None})
    assert copied.__name__ == "other"
    assert copied.__defaults__ == function.__defaults__
    assert copied.__globals__["scaled_dot_product_attention"] is None
    assert function.__globals__["scaled_dot_product_attention"] is not None


def test_a_function_of_python_has_a_file():
    assert files_of(Attention.__call__, mx.exp, None) == [llama.__file__]


def test_the_tokenizer_in_mlx_lms_and_its_function_for_a_template(tmp_path):
    write_tokenizer(tmp_path)
    inner = AutoTokenizer.from_pretrained(tmp_path)
    wrapped = TokenizerWrapper(inner)
    assert inner_tokenizer(wrapped) is inner
    assert inner_tokenizer(inner) is inner
    assert not has_function_for_template(wrapped)
    assert not has_function_for_template(inner)
    assert has_function_for_template(TokenizerWrapper(inner, chat_template=print))
