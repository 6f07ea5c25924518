"""What a step of a model reads: its layers, the experts that a token takes, and its head."""

import pytest
from mlx.utils import tree_flatten

from architecture_models import tiny_architecture
from mlx_flashhead.models.step_bytes import step_bytes_of


def nbytes(model, *, of_experts):
    """The bytes of its arrays that are of experts, or are not."""
    arrays = [array for _, array in tree_flatten(model.parameters())]
    return sum(array.nbytes for array in arrays if (array.ndim == 3) == of_experts)


# The latter keeps no arguments.
@pytest.mark.parametrize("name", ["llama", "youtu_llm"])
def test_a_dense_model_reads_all_but_its_embeddings(name):
    model = tiny_architecture(name, tied=False)
    read = step_bytes_of(model)
    rows = model.lm_head.weight.nbytes
    assert read.head == rows
    assert read.all() == nbytes(model, of_experts=False) - model.model.embed_tokens.weight.nbytes
    assert read.all(head_share=0.5) == read.all() - rows / 2


def test_a_mixture_reads_the_experts_that_a_token_takes():
    model = tiny_architecture("mixtral", tied=False)
    share = model.args.num_experts_per_tok / model.args.num_local_experts
    assert share < 1
    embeddings = model.model.embed_tokens.weight.nbytes
    shared = nbytes(model, of_experts=False) - embeddings
    read = step_bytes_of(model)
    assert read.all() == pytest.approx(shared + share * nbytes(model, of_experts=True))
