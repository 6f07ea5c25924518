"""``mlx_lm.convert``: its flags, and the parts of its conversion."""

from mlx_lm.convert import MODEL_CONVERSION_DTYPES, configure_parser, mixed_quant_predicate_builder
