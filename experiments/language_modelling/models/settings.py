"""The settings of a Transformer-XL, and the lengths of segments and memory."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from experiments.errors import UserError

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How far the model looks back. It may differ between training and evaluation.

    Attributes:
      target: the number of tokens in a segment.
      memory: the number of hidden states that are kept from the segments before; 0 for none.
      clamp: the largest distance with a position embedding of its own, which larger distances
        share; 0 or less for no limit.
      same_length: whether every token attends to exactly `memory` positions, including itself,
        instead of the whole memory and segment.
    """

    target: int
    memory: int
    clamp: int = -1
    same_length: bool = False

    def __post_init__(self) -> None:
        _at_least("lengths.target", self.target, 1)
        _at_least("lengths.memory", self.memory, 0)
        _at_least("lengths.clamp", self.clamp, 1 - 2**31)
        if self.same_length and self.memory == 0:
            raise UserError("lengths.same_length=True with lengths.memory=0: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLConfig:
    """Sizes and options of a Transformer-XL, with the names of the reference.

    Attributes:
      n_token: the size of the vocabulary.
      n_layer: the number of layers.
      n_head: the number of attention heads.
      d_model: the width of the model.
      d_head: the width of one head.
      d_inner: the width inside the feed-forward block.
      d_embed: the width of the first embedding table; None for d_model.
      cutoffs: the tokens at which clusters of the vocabulary begin, ascending; empty for one
        softmax.
      div_val: cluster i has embeddings of width d_embed // div_val**i; with 1, all clusters share
        one table.
      tie_weight: whether input and output embeddings share one table.
      tie_projs: whether input and output share the projection, for each cluster; clusters that are
        missing at the end are not tied.
      untie_r: whether each layer has attention biases of its own.
      pre_lnorm: whether layer norm comes before each block, instead of after the residual sum.
      dropout: the rate on embeddings, positions, inside the feed-forward block, and on the output
        of every block.
      dropatt: the rate on attention probabilities.
      dtype: the dtype of computations; parameters are float32.
      remat: whether the backward pass keeps only the inputs of layers and recomputes the rest.
      scan: whether the parameters of layers are stacked on a leading axis, and the layer is
        compiled once.
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
        """The width of the first embedding table."""
        return self.d_model if self.d_embed is None else self.d_embed

    @property
    def n_cluster(self) -> int:
        """The number of clusters of the vocabulary, including the first (the shortlist)."""
        return len(self.cutoffs) + 1

    @property
    def cluster_ranges(self) -> tuple[tuple[int, int], ...]:
        """The first token of each cluster, and the token after its last one."""
        return tuple(pairwise((0, *self.cutoffs, self.n_token)))

    @property
    def cluster_widths(self) -> tuple[int, ...]:
        """The width of the embeddings of each cluster."""
        return tuple(self.embed_width // self.div_val**i for i in range(self.n_cluster))

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, width) of each embedding table; one for all clusters if `div_val` is 1."""
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
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise UserError(
            f"{name}={value!r}: must be a whole number of at least {least} and below 2**31"
        )
