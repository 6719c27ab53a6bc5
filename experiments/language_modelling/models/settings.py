"""What a Transformer-XL is (its settings) and how far it looks (its lengths)."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from experiments.errors import UserError

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How far the model looks: may differ between training and evaluation, parameters the same.

    Attributes:
      target: tokens of one segment.
      memory: hidden states kept from the segments before it; 0 for none.
      clamp: largest distance with a position embedding of its own, those farther share it; 0 or
        less for no limit.
      same_length: every token attends to exactly `memory` places, itself included, in place of
        everything that memory and segment hold.
    """

    target: int
    memory: int
    clamp: int = -1
    same_length: bool = False

    def __post_init__(self) -> None:
        _at_least("lengths.target", self.target, 1)
        _at_least("lengths.memory", self.memory, 0)
        if type(self.clamp) is not int:
            raise UserError(f"lengths.clamp={self.clamp!r}: must be a whole number")
        if self.same_length and self.memory == 0:
            raise UserError("lengths.same_length=True with lengths.memory=0: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Sizes and options of a Transformer-XL; names as in the reference.

    Attributes:
      n_token: size of the vocabulary.
      n_layer: number of layers.
      n_head: attention heads.
      d_model: width.
      d_head: width of one head.
      d_inner: width inside the feed-forward block.
      d_embed: width of the first embedding table; None for d_model.
      cutoffs: where the vocabulary is cut into clusters, ascending; empty for one softmax.
      div_val: cluster i embeds in d_embed // div_val**i entries; with 1 all share one table.
      tie_weight: one table for input and output embeddings.
      tie_projs: for each cluster, whether input and output share the projection; may be shorter
        than the clusters, the rest is then not tied.
      untie_r: attention biases of each layer's own, in place of one pair for all.
      pre_lnorm: layer norm before each block, in place of after the residual sum.
      dropout: on embeddings, positions, inside the feed-forward block, on every block's output.
      dropatt: on attention probabilities.
      dtype: type that is computed in; parameters are float32.
      remat: keep only the layers' inputs for the backward pass and compute the rest again.
      scan: the layers' parameters stacked on a leading axis, the layer compiled once.
    """

    n_token: int
    n_layer: int
    n_head: int
    d_model: int
    d_head: int
    d_inner: int
    d_embed: int | None = None
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tie_weight: bool = True
    tie_projs: tuple[bool, ...] = ()
    untie_r: bool = False
    pre_lnorm: bool = False
    dropout: float = 0.0
    dropatt: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        for name in ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "div_val"):
            _at_least(name, getattr(self, name), 1)
        if self.d_embed is not None:
            _at_least("d_embed", self.d_embed, 1)
        if self.d_model % 2:
            raise UserError(f"d_model={self.d_model}: must be even (half sines, half cosines)")
        for name in ("dropout", "dropatt"):
            rate = getattr(self, name)
            if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
                raise UserError(f"{name}={rate!r}: must be in [0, 1)")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        self._check_clusters()

    def _check_clusters(self) -> None:
        ends = (0, *self.cutoffs, self.n_token)
        whole = all(type(end) is int for end in ends)
        if not whole or any(low >= high for low, high in pairwise(ends)):
            raise UserError(
                f"cutoffs={list(self.cutoffs)}: must be ascending, above 0 and below "
                f"n_token={self.n_token}{'' if whole else ', whole numbers'}"
            )
        if not all(isinstance(tied, bool) for tied in self.tie_projs):
            raise UserError(f"tie_projs={list(self.tie_projs)}: must be True or False for each")
        if min(self.cluster_widths) < 1:
            raise UserError(
                f"div_val={self.div_val}: leaves nothing of d_embed={self.embed_width} for the "
                f"last of {self.n_cluster} clusters"
            )
        if len(self.tie_projs) > self.n_cluster:
            raise UserError(
                f"tie_projs has {len(self.tie_projs)} entries: there are {self.n_cluster} clusters"
            )

    @property
    def embed_width(self) -> int:
        """Width of the first embedding table."""
        return self.d_model if self.d_embed is None else self.d_embed

    @property
    def n_cluster(self) -> int:
        """Clusters of the vocabulary, the first (the shortlist) included."""
        return len(self.cutoffs) + 1

    @property
    def cluster_ranges(self) -> tuple[tuple[int, int], ...]:
        """First token, and the one after the last, of each cluster."""
        return tuple(pairwise((0, *self.cutoffs, self.n_token)))

    @property
    def cluster_widths(self) -> tuple[int, ...]:
        """Width of each cluster's embeddings."""
        return tuple(self.embed_width // self.div_val**i for i in range(self.n_cluster))

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, width) of each embedding table: one for all clusters if `div_val` is 1."""
        if self.div_val == 1:
            return ((self.n_token, self.embed_width),)
        sizes = [high - low for low, high in self.cluster_ranges]
        return tuple(zip(sizes, self.cluster_widths, strict=True))

    @property
    def projected(self) -> bool:
        """Whether embeddings are projected to and from the width of the model."""
        return self.div_val != 1 or self.embed_width != self.d_model

    def tied_projection(self, cluster: int) -> bool:
        """Whether the softmax uses the embedding's projection for this cluster."""
        return cluster < len(self.tie_projs) and self.tie_projs[cluster]


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: must be a whole number of at least {least}")
