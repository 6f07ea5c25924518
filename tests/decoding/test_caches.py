"""Whoever has a mark, its caches go back to any of the tokens that were fed since."""

import copy

import mlx.core as mx
import pytest

from mlx_flashhead.decoding.caches import BatchCaches, OwnCaches
from mlx_flashhead.wide.step import WideSteps
from mlx_flashhead.wide.trial import established_costs
from test_callers_cache import KINDS

# It is as long as the windows.
PROMPT = [5, 9, 200, 7, 3, 17, 99, 4, 61, 12, 13, 14]
FED = [31, 8, 150]
PROBE = mx.array([[77]])


class Text:
    """A row: what was fed of a text."""

    def __init__(self):
        self.fed = []

    @property
    def n_cached(self):
        return len(self.fed)


def feed(model):
    return lambda tokens, layers: model(tokens, cache=layers)


def alone(model, layers):
    text = Text()
    caches = OwnCaches(layers, feed(model))
    (mark,) = caches.marks([text])
    for token in FED:
        caches.feed(mx.array([[token]]), layers)
        text.fed.append(token)
    return mark


def of_a_batch(model, layers):
    """The first row of two, and the second one once that is gone."""
    text = Text()
    first = Text()
    caches = BatchCaches(feed(model))
    other = [copy.deepcopy(layer) for layer in layers]
    caches.join([first, text], caches.merged([other, layers]))
    _, mark = caches.marks([first, text])
    for token in FED:
        caches.feed(mx.array([[token + 1], [token]]), caches.layers)
        text.fed.append(token)
    caches.keep([text])
    return mark


def wide(model, layers):
    steps = WideSteps.of(model)
    established_costs(steps, layers)
    return steps.feed(mx.array([FED]), layers)


@pytest.fixture(
    scope="module", params=[kind for kind in KINDS if kind not in ("rotating", "joined")]
)
def kind(request):
    make, make_cache = KINDS[request.param]
    model = make()
    mx.eval(model.parameters())
    return model, make_cache


# Without `mx.compile`, as in the tests, MLX 0.32.1 computes several steps of a state-space layer
# otherwise each time, if they are evaluated at once.
@pytest.mark.newest
@pytest.mark.parametrize("marked", [alone, of_a_batch, wide])
@pytest.mark.parametrize("n", range(len(FED) + 1))
def test_a_mark_goes_back_to_any_token(kind, marked, n):
    model, make_cache = kind
    read = make_cache(model)
    model(mx.array([PROMPT]), cache=read)
    layers = copy.deepcopy(read)
    found = marked(model, layers).back_to(n)
    for token in FED[:n]:
        model(mx.array([[token]]), cache=read)
    expected = model(PROBE, cache=read)
    logits = model(PROBE, cache=found)
    if marked is of_a_batch:
        assert mx.allclose(logits, expected, atol=1e-5)
    else:
        assert mx.array_equal(logits, expected)
        assert all(one is other for one, other in zip(found, layers, strict=True))
