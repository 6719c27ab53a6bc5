"""Attention with relative positions, over the memory and the segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.language_modelling.models.layers import Linear, dropout, normal
from experiments.language_modelling.models.settings import TransformerXLConfig
from experiments.layers import along_last


def shift_to_keys(scores: jax.Array) -> jax.Array:
    """Turns scores by distance into scores by key, with padding and reshaping only.

    Args:
      scores: [..., T, K]; the last axis numbers the distances K-1, …, 0.

    Returns:
      [..., T, K]; the last axis numbers the keys, of which query t is number K-T+t. Entries after
      the query have no meaning and must be masked.
    """
    *batch, t, k = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (len(batch) + 1) + [(1, 0)])
    return padded.reshape(*batch, t * (k + 1))[..., t:].reshape(*batch, t, k)


def attention_mask(t: int, k: int, valid: jax.Array, same_length: bool) -> jax.Array:
    """The keys that each query may see.

    Args:
      t: the length of the segment.
      k: the length of the memory and the segment.
      valid: how many of the k-t memories are valid, a scalar; these are the last ones.
      same_length: whether only distances below the length k-t of the memory are seen.

    Returns:
      bool [T, K].
    """
    memory = k - t
    query_Tx1 = memory + jnp.arange(t)[:, None]
    key_1xK = jnp.arange(k)[None, :]
    mask_TxK = (key_1xK <= query_Tx1) & (key_1xK >= memory - valid)
    return mask_TxK & (query_Tx1 - key_1xK < memory) if same_length else mask_TxK


class AttentionBias(nnx.Module):
    """Biases of queries, [W]: r_w_bias (content) and r_r_bias (position) of the reference."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.content = nnx.Param(normal(rngs, (width,)))
        self.position = nnx.Param(normal(rngs, (width,)))


class RelativeAttention(nnx.Module):
    """Multi-head attention whose scores depend on distances (Transformer-XL, section 3.3).

    Query, key and value have separate kernels. Queries are needed only for the segment, keys and
    values also for the memory, and a compact kernel cannot be divided into three.
    """

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.n_head, self.d_head, self.dropatt = config.n_head, config.d_head, config.dropatt
        width = config.n_head * config.d_head
        self.query = Linear(config.d_model, width, rngs)
        self.key = Linear(config.d_model, width, rngs)
        self.value = Linear(config.d_model, width, rngs)
        self.position = Linear(config.d_model, width, rngs)
        self.output = Linear(width, config.d_model, rngs)
        self.bias = AttentionBias(width, rngs) if config.untie_r else None

    def __call__(
        self,
        x_BxTxD: jax.Array,
        context_BxKxD: jax.Array,
        position_KxD: jax.Array,
        mask_TxK: jax.Array,
        bias: AttentionBias | None,
        rng: jax.Array | None,
    ) -> jax.Array:
        """Attends from the segment to the context, whose last T positions are the segment.

        Args:
          x_BxTxD: the segment.
          context_BxKxD: the memory and the segment.
          position_KxD: the embeddings of the distances K-1, …, 0.
          mask_TxK: the positions that each query may see.
          bias: the biases that all layers share; None if each layer has its own.
          rng: the key for dropout of attention probabilities; None for no dropout.

        Returns:
          [B, T, D].
        """
        q_BxTxW = self.query(x_BxTxD)
        own = self.bias if bias is None else bias
        assert own is not None, "untie_r decides which of the two there is"
        content_HxBxTxC = self._heads(q_BxTxW + along_last(own.content.get_value(), q_BxTxW))
        position_HxBxTxC = self._heads(q_BxTxW + along_last(own.position.get_value(), q_BxTxW))
        k_HxBxKxC = self._heads(self.key(context_BxKxD))
        v_HxBxKxC = self._heads(self.value(context_BxKxD))
        r_HxKxC = self._heads(self.position(position_KxD)[None])[:, 0]

        scores = _dot_float32("hbtc,hbkc->hbtk", content_HxBxTxC, k_HxBxKxC)
        by_distance = _dot_float32("hbtc,hkc->hbtk", position_HxBxTxC, r_HxKxC)
        scores = (scores + shift_to_keys(by_distance)) * self.d_head**-0.5
        scores = jnp.where(mask_TxK[None, None], scores, jnp.finfo(jnp.float32).min)
        p_HxBxTxK = jax.nn.softmax(scores, axis=-1).astype(q_BxTxW.dtype)
        p_HxBxTxK = dropout(p_HxBxTxK, self.dropatt, rng)
        y_HxBxTxC = jnp.einsum("hbtk,hbkc->hbtc", p_HxBxTxK, v_HxBxKxC)
        return self.output(y_HxBxTxC.transpose(1, 2, 0, 3).reshape(q_BxTxW.shape))

    def _heads(self, x_BxTxW: jax.Array) -> jax.Array:
        b, t, _ = x_BxTxW.shape
        return x_BxTxW.reshape(b, t, self.n_head, self.d_head).transpose(2, 0, 1, 3)


def _dot_float32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
