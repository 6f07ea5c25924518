"""Whether an index serves the rows of a model."""

from ..common.quantities import percent
from ..head.matrix import Matrix
from .files import FlashHeadIndex


def check_fit(index: FlashHeadIndex, rows: Matrix, source: str) -> str | None:
    """Compares an index with the rows of a model, in token order: a sentence for near rows, a
    ValueError for other ones."""
    config = index.config
    shape, own_shape = (rows.n_rows, rows.hidden_size), (config.vocab_size, index.hidden_size)
    if shape != own_shape:
        raise ValueError(
            f"The FlashHead in {source} is for {own_shape[0]} tokens of width {own_shape[1]}, but "
            f"the model has {shape[0]} of width {shape[1]}: {_REMEDY}."
        )
    if rows.fingerprint == config.fingerprint:
        return None
    likeness = index.sketch.likeness(rows)
    apart = percent(likeness.length_change, 1)
    figures = f"mean cosine {likeness.cosine:.3f}, lengths {apart} apart"
    if not likeness.near:
        raise ValueError(
            f"The FlashHead in {source} belongs to other rows than this model's ({figures}): "
            f"{_REMEDY}."
        )
    return (
        f"The FlashHead in {source} was made from another form of these rows ({figures}): used as "
        "it is."
    )


_REMEDY = "give the one made for this model, or leave it out and one is found or built"
