"""The names of mlx-lm that this project leans on: there, as they are called, and in one module.

The names are those of the newest mlx-lm: what the oldest lacks stands in one file of compat.
"""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_flashhead.models.compat import warn_of_later

CHECKOUT = Path(__file__).parents[2]
COMPAT = sorted(
    file
    for file in (CHECKOUT / "mlx_flashhead" / "models" / "compat").glob("*.py")
    if file.name != "mlx_lm_0_31.py"
)
SOURCES = sorted([*CHECKOUT.glob("mlx_flashhead/**/*.py"), *CHECKOUT.glob("scripts/**/*.py")])

# How each function is called here: the parameters that are filled in order, then those by name.
CALLS = {
    "mlx_lm.chat.setup_arg_parser": ((), ()),
    "mlx_lm.convert.configure_parser": ((), ()),
    "mlx_lm.convert.mixed_quant_predicate_builder": (("recipe", "model", "group_size"), ()),
    "mlx_lm.evaluate.MLXLM": (
        ("path_or_hf_repo",),
        ("max_tokens", "batch_size", "use_chat_template", "sampler"),
    ),
    "mlx_lm.evaluate.MLXLM._score_fn": (("self", "inputs"), ("cache", "step_size")),
    "mlx_lm.evaluate.MLXLM.generate_until": (("self", "requests"), ()),
    "mlx_lm.evaluate.MLXLM.loglikelihood": (("self", "requests"), ()),
    "mlx_lm.evaluate.MLXLM.loglikelihood_rolling": (("self", "requests"), ()),
    "mlx_lm.evaluate.chat_template_fn": ((), ()),
    "mlx_lm.generate.BatchGenerator": (
        ("model",),
        (
            *("stop_tokens", "sampler", "completion_batch_size"),
            *("prefill_batch_size", "stream"),
        ),
    ),
    "mlx_lm.generate.BatchGenerator.close": (("self",), ()),
    "mlx_lm.generate.BatchGenerator.insert": (
        ("self", "prompts", "max_tokens"),
        ("caches", "all_tokens", "samplers", "logits_processors"),
    ),
    "mlx_lm.generate.BatchGenerator.next": (("self",), ()),
    "mlx_lm.generate.BatchGenerator.next_generated": (("self",), ()),
    "mlx_lm.generate.BatchGenerator.remove": (("self", "uids"), ("return_prompt_caches",)),
    "mlx_lm.generate.TextStateMachine": (("transitions",), ()),
    "mlx_lm.generate.TextStateMachine.flush": (("state",), ()),
    "mlx_lm.generate.TextStateMachine.make_state": (("self", "initial"), ()),
    "mlx_lm.generate.TextStateMachine.split": (("state", "text"), ()),
    "mlx_lm.generate.StopSequences": (("stop_sequences",), ()),
    "mlx_lm.generate.StopSequences.matcher": (("self",), ()),
    "mlx_lm.generate.batch_generate": (
        ("model", "tokenizer", "prompts"),
        ("max_tokens", "return_token_ids"),
    ),
    "mlx_lm.generate.generate": (("model", "tokenizer", "prompt"), ()),
    "mlx_lm.generate.stream_generate": (("model", "tokenizer", "prompt"), ("max_tokens",)),
    "mlx_lm.generate.generate_step": (
        ("prompt", "model", "stream"),
        (
            *("max_tokens", "sampler", "logits_processors", "prompt_cache"),
            *("kv_bits", "kv_group_size", "quantized_kv_start"),
        ),
    ),
    "mlx_lm.generate.main": ((), ()),
    "mlx_lm.generate.setup_arg_parser": ((), ()),
    "mlx_lm.generate.make_text_state_machine": (("tokenizer",), ()),
    "mlx_lm.generate.maybe_quantize_kv_cache": (
        ("prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"),
        (),
    ),
    "mlx_lm.generate.speculative_generate_step": (
        ("prompt", "model", "draft_model", "stream"),
        (
            *("num_draft_tokens", "max_tokens", "sampler", "logits_processors", "prompt_cache"),
            *("kv_bits", "kv_group_size", "quantized_kv_start"),
        ),
    ),
    "mlx_lm.models.cache.can_trim_prompt_cache": (("cache",), ()),
    "mlx_lm.models.cache.load_prompt_cache": (("file_name",), ("return_metadata",)),
    "mlx_lm.models.cache.make_prompt_cache": (("model", "max_kv_size"), ()),
    "mlx_lm.models.cache.trim_prompt_cache": (("cache", "num_tokens"), ()),
    "mlx_lm.models.cache.LRUPromptCache": (("max_size",), ()),
    "mlx_lm.models.cache.LRUPromptCache.fetch_nearest_cache": (("self", "model", "tokens"), ()),
    "mlx_lm.models.cache.LRUPromptCache.insert_cache": (
        ("self", "model", "tokens", "prompt_cache"),
        ("cache_type",),
    ),
    "mlx_lm.models.cache.LRUPromptCache.trim_to": (("self",), ("n_bytes",)),
    "mlx_lm.sample_utils.greedy_sampler": (("logprobs",), ()),
    "mlx_lm.sample_utils.make_sampler": (
        ("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k"),
        ("xtc_probability", "xtc_threshold", "xtc_special_tokens"),
    ),
    "mlx_lm.sample_utils.make_logits_processors": (
        (
            *("logit_bias", "repetition_penalty", "repetition_context_size"),
            *("presence_penalty", "presence_context_size"),
            *("frequency_penalty", "frequency_context_size"),
        ),
        (),
    ),
    "mlx_lm.utils._download": (("path_or_hf_repo",), ("revision", "allow_patterns")),
    "mlx_lm.utils.dequantize_model": (("model",), ()),
    "mlx_lm.utils.load": (
        ("path_or_hf_repo",),
        ("tokenizer_config", "model_config", "lazy", "return_config", "trust_remote_code"),
    ),
    "mlx_lm.utils.load_tokenizer": (("model_path",), ("eos_token_ids",)),
    "mlx_lm.utils.load_adapters": (("model", "adapter_path"), ()),
    "mlx_lm.utils.maybe_set_recommended_wired_limit": ((), ()),
    "mlx_lm.utils.quantize_model": (
        ("model", "config", "group_size", "bits"),
        ("mode", "quant_predicate"),
    ),
    "mlx_lm.utils.save": (
        ("dst_path", "src_path_or_repo", "model", "tokenizer", "config"),
        ("donate_model",),
    ),
    "mlx_lm.utils.sharded_load": (
        ("repo", "pipeline_group", "tensor_group"),
        ("return_config", "tokenizer_config", "trust_remote_code"),
    ),
}
# What only has to be there, and what it has to be.
VALUES = {
    "mlx_lm.convert.MODEL_CONVERSION_DTYPES": list,
    "mlx_lm.generate.BatchResponse": type,
    "mlx_lm.generate.GenerationBatch": type,
    "mlx_lm.generate.GenerationResponse": type,
    "mlx_lm.models.cache.KVCache": type,
    "mlx_lm.generate.generation_stream": mx.ThreadLocalStream,
    "mlx_lm.utils.DEFAULT_ALLOW_PATTERNS": list,
}
# Globals that mlx-lm's code looks up, and that a command puts others under.
REPLACED = {
    "mlx_lm.generate.main": ("load", "make_sampler", "setup_arg_parser"),
}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_from_mlx_lm(tree):
    """Dotted name in mlx-lm → the name it has in the file."""
    return {
        f"{node.module}.{alias.name}": alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
        if (node.module or "").split(".")[0] == "mlx_lm"
        for alias in node.names
    }


def through_compat():
    """The same for all files of compat."""
    return {
        name: own for file in COMPAT for name, own in imported_from_mlx_lm(parsed(file)).items()
    }


def users_of(dotted):
    """Files of the project that use the name, for the message."""
    name = through_compat().get(dotted, dotted.rsplit(".", 1)[-1])
    using = [
        str(path.relative_to(CHECKOUT))
        for path in SOURCES
        if path not in COMPAT
        for node in ast.walk(parsed(path))
        if getattr(node, "id", getattr(node, "attr", None)) == name
    ]
    return ", ".join(dict.fromkeys(using)) or "the tests"


def found(dotted):
    """What mlx-lm has under a dotted name, or a failure that says who needs it."""
    module, *path = dotted.removeprefix("mlx_lm.").split(".")
    value = importlib.import_module(f"mlx_lm.{module}")
    for name in path:
        if not hasattr(value, name):
            pytest.fail(
                f"mlx-lm {version('mlx-lm')} has no {dotted} any more, which {users_of(dotted)} "
                "uses: find what took its place, and change mlx_flashhead/models/compat/.",
                pytrace=False,
            )
        value = getattr(value, name)
    return value


@pytest.mark.newest
@pytest.mark.parametrize("dotted", CALLS)
def test_functions_take_what_they_are_given(dotted):
    in_order, by_name = CALLS[dotted]
    parameters = inspect.signature(found(dotted)).parameters
    positional = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if (
        positional[: len(in_order)] != list(in_order)
        or not parameters.keys() >= set(by_name)
        or not needed <= {*in_order, *by_name}
    ):
        pytest.fail(
            f"mlx-lm {version('mlx-lm')} has changed {dotted} to ({', '.join(parameters)}); "
            f"{users_of(dotted)} calls it with ({', '.join([*in_order, *by_name])}).",
            pytrace=False,
        )


@pytest.mark.newest
@pytest.mark.parametrize("dotted", VALUES)
def test_values_are_what_they_were(dotted):
    assert isinstance(found(dotted), VALUES[dotted]), f"{dotted} is used by {users_of(dotted)}"


@pytest.mark.newest
@pytest.mark.parametrize("dotted", REPLACED)
def test_mlx_lm_looks_up_what_is_replaced(dotted):
    looked_up = found(dotted).__code__.co_names
    for name in REPLACED[dotted]:
        assert name in looked_up, (
            f"{dotted} does not look {name!r} up any more, under which mlx_flashhead puts another."
        )


@pytest.mark.newest
def test_adapter_to_lm_eval_looks_up_what_is_replaced():
    adapter = found("mlx_lm.evaluate.MLXLM")
    assert "load" in adapter.__init__.__code__.co_names, (
        "see Adapter in mlx_flashhead/models/compat/evaluate.py"
    )
    names = adapter.loglikelihood.__code__.co_names
    assert "_max_tokens" in names, "see TaskModel in mlx_flashhead/evaluation/tasks.py"


def test_every_name_of_compat_is_checked_here():
    assert through_compat()
    assert through_compat().keys() <= {*CALLS, *VALUES}, "give new names a line in CALLS or VALUES"


@pytest.mark.parametrize("package", ["mlx", "mlx-lm"])
def test_a_later_version_warns_and_is_not_forbidden(package):
    with pytest.warns(UserWarning, match=f"{package} up to 0.32, and 0.33.1 is installed"):
        warn_of_later(package, "0.33.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_later(package, "0.32.9")
        warn_of_later(package, version(package))


@pytest.mark.newest
def test_a_program_that_loads_imports_no_other_program():
    code = "import mlx_flashhead, sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    modules = set(output.stdout.split())
    assert "mlx_lm" in modules
    assert not modules & {"mlx_lm.chat", "mlx_lm.server", "mlx_lm.evaluate", "rich"}
