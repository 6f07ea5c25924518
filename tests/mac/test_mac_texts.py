"""A text on each generation of Apple GPUs is plain mlx-lm's, whatever chooses its tokens."""

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import sample_utils
from mlx_lm.models.cache import make_prompt_cache

import mlx_flashhead
from always_guessing import guess_always
from mlx_flashhead import grammar_processor, make_sampler
from mlx_flashhead.decoding import proposer
from mlx_flashhead.decoding.measuring.rehearsal import rehearse
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import Established, WideSteps, layout_of
from mlx_flashhead.wide.trial import established_costs
from pretended_gpu import CHIPS, pretended_gpu
from tiny_models import install_index, tiny_index

# The oldest environment has no compiler for the emulator.
pytestmark = pytest.mark.newest
PROMPT = "One day"
N_TOKENS = 10
# The grammar forces what comes before the string, and the model chooses that.
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}


def tokens(library, loaded, prompt=PROMPT, n_tokens=N_TOKENS, **options):
    """The tokens of a text by mlx_lm or mlx_flashhead."""
    mx.random.seed(7)
    responses = library.stream_generate(*loaded, prompt, max_tokens=n_tokens, **options)
    return [response.token for response in responses]


def chosen_by(kind, tokenizer):
    """What chooses the tokens of a text: options of `stream_generate`, made anew."""
    match kind:
        case "greedy":
            return {}
        case "sampled":
            return {"sampler": sample_utils.make_sampler(0.9, top_p=0.95)}
        case "noise":
            return {"sampler": make_sampler(temp=0.9, top_k=40, seed=4)}
        case "penalties":
            processors = sample_utils.make_logits_processors({3: 2.0}, 1.3)
            return {"logits_processors": processors}
        case "schema":
            return {"logits_processors": [grammar_processor(tokenizer, json_schema=SCHEMA)]}
    raise ValueError(kind)


@pytest.mark.parametrize(
    "gpu, kind",
    [(chip, kind) for chip in CHIPS for kind in ("greedy", "sampled", "schema")]
    + [("M4", "noise"), ("M5", "penalties")],
    indirect=["gpu"],
)
def test_a_text_is_mlx_lms(gpu, pair, kernels, kind):
    tokenizer = pair.plain[1]
    expected = tokens(mlx_lm, pair.plain, **chosen_by(kind, tokenizer))
    found = tokens(mlx_flashhead, pair.flash, **chosen_by(kind, tokenizer))
    assert found == expected
    expected_kernels = {"route", "score"}
    if kind != "sampled":
        expected_kernels.add("screen")
    assert kernels() is None or kernels() >= expected_kernels


def test_a_text_on_a_gpu_without_metal(folder):
    """As MLX has them on Linux: no kernels, and the branches that ask for a CPU are not taken."""
    with pretended_gpu(metal=False):
        expected = tokens(mlx_lm, mlx_lm.load(str(folder)))
        model, tokenizer = mlx_lm.load(str(folder))
        index = tiny_index(model, n_probes=3)
        has_metal = mx.metal.is_available()
        if not has_metal:
            with pytest.raises(ValueError, match="needs an Apple GPU and this machine has none"):
                install_index(model, index, backend="metal")
        head = install_index(model, index)
        if has_metal:
            assert head.backend == "metal"
        else:
            assert head.backend == "mlx"
            assert head.backend_reason == "MLX finds no Apple GPU on this machine."
        assert tokens(mlx_flashhead, (model, tokenizer)) == expected


@pytest.mark.parametrize("allowed", [512, 1])
def test_a_gpu_whose_pipelines_allow_fewer_threads(
    gpu, pair, folder, monkeypatch, kernels, allowed
):
    """Kernels run with smaller threadgroups; if these are too large too, MLX's operations do."""
    if gpu.emulator is None:
        pytest.skip("the threads of a real GPU's pipelines are what they are")
    expected = tokens(mlx_lm, pair.plain)
    model, tokenizer = mlx_lm.load(str(folder))
    index = tiny_index(model, n_probes=3)
    monkeypatch.setattr(gpu.emulator, "max_threads", {"flash_head_score": allowed})
    if allowed == 1:
        with pytest.raises(ValueError, match="use backend='mlx' or unset"):
            install_index(model, index, backend="metal")
        assert install_index(model, index).backend == "mlx"
    else:
        assert install_index(model, index, backend="metal").backend == "metal"
    assert tokens(mlx_flashhead, (model, tokenizer)) == expected
    assert ("score" in kernels()) == (allowed > 1)


def test_drawn_probes_are_those_of_mlxs_operations(gpu, pair, folder, kernels):
    """Clusters that are drawn have no estimates, which only the kernels' own selection needs."""
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(pair.flash[0].layers[0].input_layernorm.weight.dtype)
    install_index(model, tiny_index(model, n_probes=3), backend="mlx")

    def drawn(loaded):
        sampler = sample_utils.make_sampler(0.9)
        return tokens(mlx_flashhead, loaded, sampler=sampler, draw_temperature=0.9)

    expected = drawn((model, tokenizer))
    kernels()
    assert drawn(pair.flash) == expected
    assert kernels() is None or "score" in kernels()


def test_a_model_whose_logits_nothing_verifies_is_rehearsed(gpu, folder, monkeypatch):
    """Nobody knows what it does to its logits: its text is dense, and takes no verification."""
    model, tokenizer = mlx_lm.load(str(folder))
    head = install_index(model, tiny_index(model, n_probes=3))
    monkeypatch.setattr(proposer, "logit_map_of", lambda model: None)
    rehearse(model)
    assert head.backend == "metal"
    expected = tokens(mlx_lm, mlx_lm.load(str(folder)))
    assert tokens(mlx_flashhead, (model, tokenizer)) == expected


def guessed(lookup, pair, prompt, monkeypatch):
    """The tokens of a text with guesses, and how many tokens its steps were fed."""
    widths = []
    feed = WideSteps.feed

    def noted(self, fed, caches):
        widths.append(fed.shape[1])
        return feed(self, fed, caches)

    with monkeypatch.context() as patch:
        patch.setattr(WideSteps, "feed", noted)
        found = tokens(mlx_flashhead, pair.flash, prompt, 16, **lookup)
    return found, widths


def repeating(pair):
    """A prompt that the plain model goes on to repeat: it holds the answer already."""
    start = pair.plain[1].encode(PROMPT)
    answer = tokens(mlx_lm, pair.plain, start, 12)
    return [*start, *answer, *start, *answer[:3]]


@pytest.mark.parametrize("gpu", CHIPS, indirect=True)
def test_wide_steps_have_the_bits_of_single_ones(gpu, pair, kernels, monkeypatch, caplog):
    """By FlashHead's own kernel, beside MLX's for one state, and the text is plain mlx-lm's."""
    monkeypatch.setattr(trial, "LONG", (30, 60))
    model = pair.flash[0]
    steps = WideSteps.of(model)
    caches = make_prompt_cache(model)
    costs = established_costs(steps, caches)
    assert set(costs) == {2, 3, 4, 8}
    ran = kernels()
    assert ran is None or "row_products" in ran
    # This is said of a kernel with other bits.
    assert "it is not used" not in caplog.text
    prompt = repeating(pair)
    expected = tokens(mlx_lm, pair.plain, prompt, 16)
    found, widths = guessed({"lookup": "on"}, pair, prompt, monkeypatch)
    assert found == expected and widths
    # What is said to cost as much as a single step is taken without being asked for.
    layout = layout_of(caches)
    steps.established[layout] = Established(
        dict.fromkeys(costs, 1.0), steps.established[layout].apart
    )
    found, widths = guessed({}, pair, prompt, monkeypatch)
    assert found == expected and widths
    steps.established[layout] = Established(
        dict.fromkeys(costs, 9.0), steps.established[layout].apart
    )
    found, widths = guessed({}, pair, prompt, monkeypatch)
    assert found == expected and not widths


def test_a_draft_model(gpu, pair, monkeypatch):
    guess_always(monkeypatch)
    monkeypatch.setattr(trial, "LONG", (30, 60))
    expected = tokens(mlx_lm, pair.plain)
    drafts = {"draft_model": pair.plain[0], "num_draft_tokens": 2}
    found, widths = guessed(drafts, pair, PROMPT, monkeypatch)
    assert found[:N_TOKENS] == expected and widths
