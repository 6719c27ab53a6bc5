"""Adaptive embeddings and adaptive softmax: frequent tokens are wide, rare ones narrow."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.language_modelling.models.layers import PROJECTION_STD, normal
from experiments.language_modelling.models.settings import TransformerXLConfig
from experiments.layers import Kernel, lookup, matmul, matmul_transposed, rows, vector

# With clusters, logits are computed for this number of tokens at a time.
CHUNK_TOKENS = 1024


class AdaptiveEmbedding(nnx.Module):
    """A table for each cluster (one for all if div_val is 1), and projections to d_model.

    `table/i` is [tokens, width]. `projection/i`, if there is one, is [width, d_model].
    """

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.config = config
        self.table = nnx.Dict(_tables(config, rngs))
        widths = [width for _, width in config.table_shapes] if config.projected else []
        self.projection = nnx.Dict(
            {str(i): _projection(config, width, rngs) for i, width in enumerate(widths)}
        )

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Returns [B, T, d_model], scaled by √d_model."""
        starts = [low for low, _ in self.config.cluster_ranges][: len(self.table)]
        x_BxTxD = sum(self._part(i, tokens_BxT - start) for i, start in enumerate(starts))
        return x_BxTxD * self.config.d_model**0.5

    def _part(self, i: int, row_BxT: jax.Array) -> jax.Array:
        """The embeddings of tokens that are rows of table i; those of other tokens are zero."""
        table = self.table[str(i)].get_value()
        inside_BxT = (row_BxT >= 0) & (row_BxT < self.config.table_shapes[i][0])
        if len(self.table) > 1:
            row_BxT = jnp.where(inside_BxT, row_BxT, 0)
        x_BxTxE = lookup(table, row_BxT, jnp.dtype(self.config.dtype))
        if self.projection:
            x_BxTxE = matmul(x_BxTxE, self.projection[str(i)].get_value())
        if len(self.table) == 1:
            return x_BxTxE
        return jnp.where(inside_BxT[..., None], x_BxTxE, jnp.zeros_like(x_BxTxE))


class Cluster(NamedTuple):
    """The parameters of one cluster's logits: table [tokens, width], bias, [width, d_model]."""

    table: Kernel
    bias: jax.Array
    projection: Kernel | None


class AdaptiveSoftmax(nnx.Module):
    """A first softmax over the shortlist and the clusters, and one softmax for each cluster.

    Its parameters are those that it does not share with the embedding: `bias/i`, `cluster/table`,
    `cluster/bias` and, if they are not tied, `table/i` and `projection/i` in the shapes of the
    embedding's. As in the reference, cluster i has column -i of the first softmax, so that clusters
    are in reverse order.
    """

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.config = config
        self.table = nnx.Dict({} if config.tie_weight else _tables(config, rngs))
        self.bias = nnx.Dict(
            {str(i): nnx.Param(jnp.zeros((n,))) for i, (n, _) in enumerate(config.table_shapes)}
        )
        own = [
            (i, width)
            for i, width in enumerate(config.cluster_widths)
            if config.projected and not config.tied_projection(i)
        ]
        self.projection = nnx.Dict({str(i): _projection(config, w, rngs) for i, w in own})
        self.cluster = ClusterTable(config, rngs) if config.cutoffs else None

    def nll(
        self, hidden_BxTxD: jax.Array, target_BxT: jax.Array, embedding: AdaptiveEmbedding
    ) -> jax.Array:
        """The negative log-likelihood of the targets in nats, float32 [B, T]."""
        clusters, extra = self._clusters(embedding)
        if extra is None:
            return _nll(_logits(hidden_BxTxD, clusters[0]), target_BxT)
        return _nll_in_chunks(hidden_BxTxD, target_BxT, clusters, extra)

    def log_probs(self, hidden: jax.Array, embedding: AdaptiveEmbedding) -> jax.Array:
        """The log-probability of every token: [..., d_model] → float32 [..., n_token]."""
        clusters, extra = self._clusters(embedding)
        head = jax.nn.log_softmax(_head_logits(hidden, clusters[0], extra), axis=-1)
        parts = [head[..., : clusters[0].bias.shape[0]]]
        for i, cluster in enumerate(clusters[1:], start=1):
            tail = jax.nn.log_softmax(_logits(hidden, cluster), axis=-1)
            parts.append(head[..., -i, None] + tail)
        return jnp.concatenate(parts, axis=-1)

    def _clusters(self, embedding: AdaptiveEmbedding) -> tuple[list[Cluster], Cluster | None]:
        """The clusters, and the columns of the first softmax for all clusters but the first."""
        clusters = [self._cluster(i, embedding) for i in range(self.config.n_cluster)]
        if self.cluster is None:
            return clusters, None
        table, bias = self.cluster.table.get_value(), self.cluster.bias.get_value()
        return clusters, Cluster(table, vector(bias), clusters[0].projection)

    def _cluster(self, i: int, embedding: AdaptiveEmbedding) -> Cluster:
        tables = embedding.table if self.config.tie_weight else self.table
        projection = None
        if self.config.projected:
            tied = embedding.projection[str(min(i, len(embedding.projection) - 1))]
            projection = self.projection.get(str(i), tied).get_value()
        if len(tables) > 1:
            bias = vector(self.bias[str(i)].get_value())
            return Cluster(tables[str(i)].get_value(), bias, projection)
        low, high = self.config.cluster_ranges[i]
        table, bias = tables["0"].get_value(), vector(self.bias["0"].get_value())
        return Cluster(rows(table, low, high), bias[low:high], projection)


class ClusterTable(nnx.Module):
    """The rows of the first softmax for clusters: table [clusters - 1, width], bias."""

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.table = nnx.Param(normal(rngs, (len(config.cutoffs), config.embed_width)))
        self.bias = nnx.Param(jnp.zeros((len(config.cutoffs),)))


def _tables(config: TransformerXLConfig, rngs: nnx.Rngs) -> dict[str, nnx.Param]:
    return {str(i): nnx.Param(normal(rngs, s)) for i, s in enumerate(config.table_shapes)}


def _projection(config: TransformerXLConfig, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(normal(rngs, (width, config.d_model), PROJECTION_STD))


def _logits(hidden: jax.Array, cluster: Cluster) -> jax.Array:
    """[..., d_model] → float32 [..., tokens of the cluster]."""
    if cluster.projection is not None:
        hidden = matmul_transposed(hidden, cluster.projection).astype(hidden.dtype)
    logits = matmul_transposed(hidden, cluster.table)
    return logits + cluster.bias.reshape((1,) * (logits.ndim - 1) + (-1,))


def _head_logits(hidden: jax.Array, first: Cluster, extra: Cluster | None) -> jax.Array:
    logits = _logits(hidden, first)
    if extra is None:
        return logits
    return jnp.concatenate([logits, _logits(hidden, extra)], axis=-1)


def _nll(logits: jax.Array, target: jax.Array) -> jax.Array:
    """float32 [..., V], int [...] → [...]."""
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _nll_in_chunks(
    hidden_BxTxD: jax.Array, target_BxT: jax.Array, clusters: list[Cluster], extra: Cluster
) -> jax.Array:
    """Sorts the tokens of each lane by cluster, and takes a few positions of all lanes at a time.

    Most chunks then contain few clusters, and the logits of a cluster are computed only for chunks
    with a token of the cluster. Lanes are never mixed, so that they may be on different devices.
    """
    b, t = target_BxT.shape
    size = min(t, max(1, CHUNK_TOKENS // b))
    n = -(-t // size)
    member_BxT = _membership(target_BxT, clusters)
    order_BxT = jnp.argsort(member_BxT, axis=1)

    def chunks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, n * size - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(b, n, size, *x.shape[2:]), 1, 0)

    hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, order_BxT[..., None], axis=1)
    target_BxT = jnp.take_along_axis(target_BxT, order_BxT, axis=1)
    chunk_nll = jax.checkpoint(lambda h, y: _chunk_nll(h, y, clusters, extra))
    _, nll_NxBxC = jax.lax.scan(
        lambda _, x: (None, chunk_nll(*x)), None, (chunks(hidden_BxTxD), chunks(target_BxT))
    )
    nll_BxT = jnp.moveaxis(nll_NxBxC, 0, 1).reshape(b, n * size)[:, :t]
    return jnp.take_along_axis(nll_BxT, jnp.argsort(order_BxT, axis=1), axis=1)


def _chunk_nll(
    hidden_BxCxD: jax.Array, target_BxC: jax.Array, clusters: list[Cluster], extra: Cluster
) -> jax.Array:
    head = _head_logits(hidden_BxCxD, clusters[0], extra)
    starts = _starts(clusters)
    member_BxC = _membership(target_BxC, clusters)
    column_BxC = jnp.where(member_BxC == 0, target_BxC, head.shape[-1] - member_BxC)
    nll_BxC = _nll(head, column_BxC)
    for i, cluster in enumerate(clusters[1:], start=1):
        inside_BxC = member_BxC == i
        row_BxC = jnp.where(inside_BxC, target_BxC - starts[i], 0)
        tail_BxC = jax.lax.cond(
            inside_BxC.any(),
            lambda h, row, c: _nll(_logits(h, c), row),
            lambda h, row, c: jnp.zeros(row.shape, jnp.float32),
            hidden_BxCxD, row_BxC, cluster,
        )  # fmt: skip
        nll_BxC = nll_BxC + jnp.where(inside_BxC, tail_BxC, 0.0)
    return nll_BxC


def _membership(target: jax.Array, clusters: list[Cluster]) -> jax.Array:
    """The number of the cluster of each target."""
    starts = jnp.array(_starts(clusters)[1:], target.dtype)
    return jnp.searchsorted(starts, target, side="right").astype(jnp.int32)


def _starts(clusters: list[Cluster]) -> list[int]:
    """The first token of each cluster."""
    starts = [0]
    for cluster in clusters[:-1]:
        starts.append(starts[-1] + cluster.bias.shape[0])
    return starts
