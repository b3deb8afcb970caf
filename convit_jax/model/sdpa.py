"""Scaled dot-product attention: one function, several ways to compute it.

    softmax(q k^T scale) v

"xla" writes the scores of all queries out and leaves the rest to the compiler. "chunked" does the
same for a few queries at a time, so that memory grows with the number of tokens and not with its
square, in the backward pass too. "cudnn" is NVIDIA's fused kernel. `choose` picks for a backend.

JAX's Pallas kernels for TPU (splash and flash attention) take keys in blocks of a multiple of 128:
196 or 197 tokens would be padded to 256 and masked. None is used here; one that is wrapped to pad
can be given as a function.

Scores and softmax are float32 whatever the inputs are.

Shapes: B batch, N tokens, H heads, K width of a head.
"""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

Array = jax.Array

# (query, key, value, *, scale) -> output, all (B, N, H, K): the signature of
# jax.nn.dot_product_attention, so that any of its implementations fits.
AttentionFn = Callable[..., Array]

IMPLEMENTATIONS = ("xla", "chunked", "cudnn")

# By this name a rematerialisation policy can keep what attention gives (see `convit_jax.model`).
ATTENTION_OUTPUT = "attention_output"

# Tokens beyond which "auto" is "chunked": above 512 x 512 pixels in patches of 16. Up to there a
# map of all queries costs less than the loop saves (benchmarks/README.md).
_LARGEST_MAP = 1024
_CHUNK = 256  # queries at a time


def choose(attention: str | AttentionFn, tokens: int, attn_dropout: float) -> str | AttentionFn:
    """What "auto" stands for; anything else as it is. Dropout acts on a map: only "xla" has one."""
    if attention != "auto":
        return attention
    return "chunked" if tokens > _LARGEST_MAP and not attn_dropout else "xla"


def attention_fn(attention: str | AttentionFn) -> AttentionFn:
    """The function of a name of `IMPLEMENTATIONS`, or a function; what it gives has a name."""
    if attention == "xla":
        return xla_attention  # names it where its derivative reads it
    others = {"chunked": chunked_attention, "cudnn": cudnn_attention}
    function = attention if callable(attention) else others[attention]

    def named(q: Array, k: Array, v: Array, *, scale: float) -> Array:
        return keep(function(q, k, v, scale=scale))

    return named


def check(attention: str | AttentionFn) -> None:
    """Raises ValueError if there is no such implementation."""
    if not callable(attention) and attention not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"attention: expected auto, one of {IMPLEMENTATIONS} or a function, got {attention!r}"
        )


def content_map(q: Array, k: Array, scale: float) -> Array:
    """softmax(q k^T scale) over the keys: two (B, N, H, K) -> (B, H, N, N), float32."""
    return jax.nn.softmax(_scores(_heads_first(q), _heads_first(k), scale), axis=-1)


def apply_map(attention: Array, v: Array) -> Array:
    """Averages the values: (B, H, N, N), (B, N, H, K) -> (B, N, H, K) in v's dtype."""
    out = jnp.einsum("bhnm,bhmk->bhnk", attention.astype(v.dtype), _heads_first(v))
    return jnp.moveaxis(out, 1, 2)


def keep(out: Array) -> Array:
    """Gives what attention gives, (B, N, H, K), the name by which it can be kept.

    With the heads side by side: on a TPU an axis of K = 48 is stored as one of 128.
    """
    flat = out.reshape(*out.shape[:2], -1)
    return checkpoint_name(flat, ATTENTION_OUTPUT).reshape(out.shape)


def xla_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """Plain attention, for the compiler to optimise; (B, N, H, K) -> (B, N, H, K).

    It takes fewer queries than keys as well.
    """
    sums, totals = _attend(*(_heads_first(x) for x in (q, k, v)), scale=scale)
    return _normalise(sums, totals, v.dtype)


def chunked_attention(q: Array, k: Array, v: Array, *, scale: float, chunk: int = _CHUNK) -> Array:
    """Attention of at most `chunk` queries at a time; (B, N, H, K) -> (B, N, H, K).

    Each chunk sees all keys, so its softmax is the plain one, not a running one. The backward pass
    computes a chunk's scores again: no array is larger than (B, H, chunk, N) (the idea of Rabe and
    Staats 2021, arXiv:2112.05682, with chunks of queries only).
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
    """NVIDIA's fused attention, in bfloat16 or float16; (B, N, H, K) -> (B, N, H, K).

    Raises:
      ValueError: on another backend, or if the inputs are float32, which the kernel does not take.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention='cudnn': expected bfloat16 or float16, got {q.dtype}")
    if jax.default_backend() not in ("gpu", "cuda"):
        raise ValueError(
            f"attention='cudnn' needs an NVIDIA GPU, got {jax.default_backend()}: "
            "expected auto, xla or chunked"
        )
    # The kernel takes heads of a multiple of 8. Zeros change no score, and no value that is kept.
    width = q.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, -width % 8))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    return out[..., :width]


def _heads_first(x: Array) -> Array:
    """(B, N, H, K) -> (B, H, N, K): products over (N, K) that lie together are the fast ones."""
    return jnp.moveaxis(x, 2, 1)


def _scores(q: Array, k: Array, scale: float) -> Array:
    """(B, H, N, K), (B, H, M, K) -> (B, H, N, M), float32."""
    return scale * jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)


def _attend(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """(B, H, N, K), keys and values (B, H, M, K) -> weighted sums (B, H, N, K), and of the weights.

    Dividing the one by the other, (B, H, N, 1), is left for last: K divisions a query instead of M,
    and a pass over the map less, forward and backward.
    """
    scores = _scores(q, k, scale)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    sums = jnp.einsum(
        "bhnm,bhmk->bhnk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return sums, weights.sum(axis=-1, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normalise(sums: Array, totals: Array, dtype: jnp.dtype) -> Array:
    """sums / totals, (B, H, N, K) -> (B, N, H, K) in `dtype`.

    Its derivative is written in the result, where JAX's reads the sums: with the result kept, the
    backward pass need not average the values again.
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
