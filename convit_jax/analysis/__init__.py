"""The paper's study of locality: the library behind `convit analyse`.

The functions below take and return arrays. `locality` of `convit_jax.model` has those that measure,
and `masking` those that mask. `measured` and `masking` compute what the commands report, `tables`
and `pictures` show it.
"""

from convit_jax.analysis.masking import (
    without_content,
    without_position,
    without_position_embedding,
)
from convit_jax.model.locality import (
    gates,
    image_nonlocality,
    nonlocality,
    query_attention,
    reach,
)

__all__ = [
    "gates",
    "image_nonlocality",
    "nonlocality",
    "query_attention",
    "reach",
    "without_content",
    "without_position",
    "without_position_embedding",
]
