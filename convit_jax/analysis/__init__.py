"""The paper's study of locality: the library behind `convit analyse`.

The functions below take and return arrays. `convit_jax.model.locality` has those that measure, and
`masking` those that mask. `measured` computes what the commands report, from the weights and the
`images` that a user names; `tables` and `pictures` show it. `report` gathers what is known of a
run, and `page` writes it as HTML, with `charts`, `markup` and `page.css`.
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
