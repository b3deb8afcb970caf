"""Scaled dot-product attention: one function, several ways to compute it.

    softmax(q k^T scale) v

"xla" writes out the scores of all queries and leaves fusion to the compiler. "chunked" does the
same for a few queries at a time. Its memory grows with the number of tokens instead of its square,
in the backward pass too. "cudnn" is NVIDIA's fused kernel. "fused" is this project's kernel for
TPU: it takes the result of the projections as a whole and GPSA's positional map too, so it has a
file of its own, fused.py. `choose` replaces "auto".

JAX's Pallas kernels for TPU (splash and flash attention) take keys in blocks of a multiple of 128:
the 196 or 197 tokens of an image of 224 pixels would be padded to 256 and masked. None of them is
used here. A function that pads for such a kernel can be passed as `attention`.

Scores and softmax are float32 for inputs of any dtype.

Shapes: B batch, N tokens, M keys where their number differs from N, H heads, K width of a head.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from convit_jax.model import remat
from convit_jax.model.fused import Fused

Array = jax.Array

# (query, key, value, *, scale) -> output, all (B, N, H, K): the signature of
# jax.nn.dot_product_attention, so that any of its implementations fits.
AttentionFn = Callable[..., Array]
Attention = str | AttentionFn | Fused

IMPLEMENTATIONS = ("xla", "chunked", "cudnn", "fused")

# Largest number of tokens for which "auto" means "xla": 512 x 512 pixels in patches of 16. Up to
# there, writing out the map of all queries is faster than the loop (benchmarks/README.md).
_LARGEST_MAP = 1024
_CHUNK = 256  # queries at a time

# What cuDNN's fused attention takes; a head may be twice as wide since Hopper.
_CUDNN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_CUDNN_WIDTH = 128


def choose(
    attention: Attention,
    tokens: int,
    attn_dropout: float,
    *,
    dtype: Any = jnp.float32,
    width: int = 64,
    backend: str | None = None,
) -> Attention:
    """Replaces "auto" by an implementation and returns any other value unchanged.

    It is never "fused": `attention.choose_forms` knows when that kernel is the choice.

    Dropout acts on the attention map, and only "xla" writes one out. "cudnn" is the choice where
    the kernel runs: bfloat16 or float16 on an NVIDIA GPU since Ampere. A training step of ConViT-S
    took 0.80 of XLA's time on an H200 (benchmarks/README.md).

    Args:
      attention: "auto", a name of `IMPLEMENTATIONS`, a function or a `Fused`.
      tokens: N.
      attn_dropout: dropout rate of the attention map.
      dtype: dtype of queries, keys and values.
      width: K.
      backend: "cpu", "gpu" or "tpu"; None means JAX's default backend.
    """
    if attention != "auto":
        return attention
    if attn_dropout:
        return "xla"
    if jnp.dtype(dtype) in _CUDNN_DTYPES and width <= _CUDNN_WIDTH and _runs_cudnn(backend):
        return "cudnn"
    return "chunked" if tokens > _LARGEST_MAP else "xla"


def _runs_cudnn(backend: str | None) -> bool:
    """Returns whether the devices of a backend run cuDNN's fused attention."""
    if (backend or jax.default_backend()) not in ("gpu", "cuda"):
        return False
    # "9.0" on NVIDIA; AMD's GPUs say another kind of name, and a CPU nothing.
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    major = str(capability).partition(".")[0]
    return major.isdigit() and int(major) >= 8  # Ampere


def attention_fn(attention: str | AttentionFn) -> AttentionFn:
    """Returns the attention function for a name of `IMPLEMENTATIONS` or for a callable.

    The output of the function is tagged so that rematerialisation can keep it.
    """
    if attention == "xla":
        return xla_attention  # tags its output itself
    others = {"chunked": chunked_attention, "cudnn": cudnn_attention}
    function = attention if callable(attention) else others[attention]

    def named(q: Array, k: Array, v: Array, *, scale: float) -> Array:
        return keep(function(q, k, v, scale=scale))

    return named


def check(attention: Attention) -> None:
    """Raises ValueError unless `attention` is "auto", an implementation or callable."""
    known = callable(attention) or isinstance(attention, Fused)
    if not known and attention not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"attention: expected auto, one of {IMPLEMENTATIONS} or a function, got {attention!r}"
        )


def content_map(q: Array, k: Array, scale: float) -> Array:
    """Returns softmax(q k^T scale) over the keys: two (B, N, H, K) -> (B, H, N, N), float32."""
    return jax.nn.softmax(_scores(_heads_first(q), _heads_first(k), scale), axis=-1)


def apply_map(attention: Array, v: Array) -> Array:
    """Averages values by a map: (B, H, N, N), (B, N, H, K) -> (B, N, H, K) in v's dtype."""
    out = jnp.einsum("bhnm,bhmk->bhnk", attention.astype(v.dtype), _heads_first(v))
    return jnp.moveaxis(out, 1, 2)


def keep(out: Array) -> Array:
    """Tags an attention output, (B, N, H, K), so that rematerialisation can keep it.

    The tagged array is (B, N, H K), because a TPU pads a last axis of K = 48 to 128.
    """
    flat = out.reshape(*out.shape[:2], -1)
    return remat.keep(flat).reshape(out.shape)


def xla_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """Computes plain attention, left to the compiler to optimise: (B, N, H, K) -> (B, N, H, K).

    The number of queries may be smaller than the number of keys.
    """
    sums, totals = _attend(*(_heads_first(x) for x in (q, k, v)), scale=scale)
    return _normalise(sums, totals, v.dtype)


def chunked_attention(q: Array, k: Array, v: Array, *, scale: float, chunk: int = _CHUNK) -> Array:
    """Computes attention for at most `chunk` queries at a time: (B, N, H, K) -> (B, N, H, K).

    Each chunk sees all keys, so its softmax is an ordinary softmax, not a running one. The
    backward pass computes the scores of a chunk again, so no array of scores is larger than
    (B, H, chunk, N). The idea is that of Rabe and Staats 2021 (arXiv:2112.05682), with chunks of
    queries only.
    """
    q, k, v = (_heads_first(x) for x in (q, k, v))
    batch, heads, tokens, width = q.shape
    chunks = -(-tokens // chunk)
    size = -(-tokens // chunks)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * size - tokens), (0, 0)))
    parts = jnp.moveaxis(padded.reshape(batch, heads, chunks, size, width), 2, 0)

    def attend(part: Array, k: Array, v: Array) -> Array:
        sums, totals = _attend(part, k, v, scale=scale)
        return (sums / totals).astype(v.dtype)

    attend = jax.checkpoint(attend, prevent_cse=False)
    out = jax.lax.map(lambda part: attend(part, k, v), parts)
    out = jnp.moveaxis(out, 0, 2).reshape(padded.shape)[:, :, :tokens]
    return jnp.moveaxis(out, 1, 2)


def cudnn_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """Computes attention with NVIDIA's fused kernel: (B, N, H, K) -> (B, N, H, K).

    The kernel has first derivatives in reverse mode only. `jax.export` takes it for NVIDIA GPUs and
    fixed shapes only.

    Raises:
      ValueError: if the inputs are neither bfloat16 nor float16, or the backend is not an NVIDIA
        GPU.
    """
    if q.dtype not in _CUDNN_DTYPES:
        raise ValueError(f"attention='cudnn': expected bfloat16 or float16, got {q.dtype}")
    if jax.default_backend() not in ("gpu", "cuda"):
        raise ValueError(
            f"attention='cudnn' needs an NVIDIA GPU, got {jax.default_backend()}: "
            "expected auto, xla or chunked"
        )
    # The kernel takes head widths that are multiples of 8. Padding with zeros changes no score, and
    # the padded values are cut off. JAX 0.11.2 refuses the gradient for an odd number of tokens, as
    # if there were a bias. So tokens are padded too, and no query attends to a padded key.
    batch, tokens, _, width = q.shape
    padding = ((0, 0), (0, tokens % 2), (0, 0), (0, -width % 8))
    lengths = jnp.full((batch,), tokens, jnp.int32) if tokens % 2 else None
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :tokens, :, :width]


def _heads_first(x: Array) -> Array:
    """Returns (B, H, N, K) for (B, N, H, K): matrix products are fast on adjacent axes N, K."""
    return jnp.moveaxis(x, 2, 1)


def _scores(q: Array, k: Array, scale: float) -> Array:
    """Returns scale q k^T: (B, H, N, K), (B, H, M, K) -> (B, H, N, M), float32."""
    return scale * jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)


def _attend(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """Returns numerator and denominator of attention; their quotient is softmax(scale q k^T) v.

    Dividing last takes K divisions for each query instead of M, and one pass over the map fewer,
    forward and backward.

    Args:
      q: (B, H, N, K).
      k: (B, H, M, K).
      v: (B, H, M, K).
      scale: factor of the scores.

    Returns:
      (B, H, N, K) float32, the sums of the values with weights exp(score - largest score); and
      (B, H, N, 1) float32, the sums of these weights.
    """
    scores = _scores(q, k, scale)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    sums = jnp.einsum(
        "bhnm,bhmk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return sums, weights.sum(axis=-1, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normalise(sums: Array, totals: Array, dtype: jnp.dtype) -> Array:
    """Returns sums / totals: (B, H, N, K), (B, H, N, 1) -> (B, N, H, K) in `dtype`.

    JAX's own derivative would read the sums. The derivative below reads the result instead. So if
    rematerialisation keeps the result, the backward pass does not average the values again.
    """
    return jnp.moveaxis((sums / totals).astype(dtype), 1, 2)


@_normalise.defjvp
def _normalise_jvp(
    dtype: jnp.dtype, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (sums, totals), (d_sums, d_totals) = primals, tangents
    out = keep(_normalise(sums, totals, dtype))
    tangent = (d_sums - _heads_first(out).astype(sums.dtype) * d_totals) / totals
    return out, jnp.moveaxis(tangent.astype(dtype), 1, 2)
