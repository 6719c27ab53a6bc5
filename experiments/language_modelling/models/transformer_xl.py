"""Transformer-XL (Dai et al. 2019) in Flax NNX, and its functional interface.

Its values are those of the authors' PyTorch model, as `check_parity` shows. There is one structural
difference: the memory has a fixed shape and a count of its valid part, instead of growing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.language_modelling.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from experiments.language_modelling.models.attention import (
    AttentionBias,
    RelativeAttention,
    attention_mask,
)
from experiments.language_modelling.models.layers import (
    LayerNorm,
    Linear,
    dropout,
    sinusoids,
    split,
)
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.training.partition import BATCH

Params = Mapping[str, Any]
# What goes into heads or into the feed-forward block is split by columns and what comes out of them
# by rows, so that each block sums once over the devices; tables by their vocabulary.
TENSOR_AXES = (
    (r"layers/.*attention/(query|key|value|position)/kernel", -1),
    (r"layers/.*feed_forward/up/(kernel|bias)", -1),
    (r"layers/.*(attention/output|feed_forward/down)/kernel", -2),
    (r"(layers/.*attention/bias|attention_bias)/(content|position)", -1),
    (r"(embedding|softmax)/table/\d+", -2),
    (r"softmax/bias/\d+", -1),
    (r".*", None),
)


class Memory(NamedTuple):
    """The most recent inputs of each layer.

    Attributes:
      states: [layers, lanes, memory, d_model]; the newest are last.
      valid: how many of the newest are valid, an int32 scalar; the others are padding.
    """

    states: jax.Array
    valid: jax.Array


class FeedForward(nnx.Module):
    """A ReLU network with one hidden layer."""

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.up = Linear(config.d_model, config.d_inner, rngs, bias=True)
        self.down = Linear(config.d_inner, config.d_model, rngs, bias=True)

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """[..., d_model] → [..., d_model]."""
        return self.down(dropout(jax.nn.relu(self.up(x)), self.dropout, rng))


class Layer(nnx.Module):
    """Attention and a feed-forward block, each with a residual sum and layer norm."""

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.pre_lnorm, self.dropout = config.pre_lnorm, config.dropout
        self.attention = RelativeAttention(config, rngs)
        self.attention_norm = LayerNorm(config.d_model, rngs)
        self.feed_forward = FeedForward(config, rngs)
        self.feed_forward_norm = LayerNorm(config.d_model, rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        memory_BxMxD: jax.Array,
        position_KxD: jax.Array,
        mask_TxK: jax.Array,
        bias: AttentionBias | None,
        rng: jax.Array | None,
    ) -> jax.Array:
        """Computes the input of the next layer, [B, T, D]; arguments as for `RelativeAttention`."""
        rngs = split(rng, 4)
        context_BxKxD = jnp.concatenate([memory_BxMxD, x_BxTxD], axis=1)
        if self.pre_lnorm:
            context_BxKxD = self.attention_norm(context_BxKxD)
        segment_BxTxD = context_BxKxD[:, memory_BxMxD.shape[1] :]
        y = self.attention(segment_BxTxD, context_BxKxD, position_KxD, mask_TxK, bias, rngs[0])
        x_BxTxD = x_BxTxD + dropout(y, self.dropout, rngs[1])
        if not self.pre_lnorm:
            x_BxTxD = self.attention_norm(x_BxTxD)
        y = self.feed_forward_norm(x_BxTxD) if self.pre_lnorm else x_BxTxD
        x_BxTxD = x_BxTxD + dropout(self.feed_forward(y, rngs[2]), self.dropout, rngs[3])
        return x_BxTxD if self.pre_lnorm else self.feed_forward_norm(x_BxTxD)


class TransformerXL(nnx.Module):
    """The network, from tokens and memory to hidden states."""

    def __init__(self, config: TransformerXLConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = AdaptiveEmbedding(config, rngs)
        self.layers: Any = _layers(config, rngs)
        width = config.n_head * config.d_head
        self.attention_bias = None if config.untie_r else AttentionBias(width, rngs)
        self.softmax = AdaptiveSoftmax(config, rngs)

    def __call__(
        self, tokens_BxT: jax.Array, memory: Memory, lengths: Lengths, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one segment.

        Args:
          tokens_BxT: the segment, of any length.
          memory: the memory of the segments before it.
          lengths: only `clamp` and `same_length` are used; the memory has its own length.
          rng: the key for dropout; None in evaluation.

        Returns:
          The output of the last layer [B, T, D], and the input of each layer [L, B, T, D].
        """
        dtype = jnp.dtype(self.config.dtype)
        t, m = tokens_BxT.shape[1], memory.states.shape[2]
        rng_in, rng_position, rng_layers, rng_out = split(rng, 4)
        x_BxTxD = dropout(self.embedding(tokens_BxT), self.config.dropout, rng_in)
        position_KxD = sinusoids(m + t, self.config.d_model, lengths.clamp, dtype)
        position_KxD = dropout(position_KxD, self.config.dropout, rng_position)
        mask_TxK = attention_mask(t, m + t, memory.valid, lengths.same_length)
        states = jax.lax.stop_gradient(memory.states).astype(dtype)
        x_BxTxD, inputs_LxBxTxD = self._run(x_BxTxD, states, position_KxD, mask_TxK, rng_layers)
        return dropout(x_BxTxD, self.config.dropout, rng_out), inputs_LxBxTxD

    def _run(
        self,
        x_BxTxD: jax.Array,
        states_LxBxMxD: jax.Array,
        position_KxD: jax.Array,
        mask_TxK: jax.Array,
        rng: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        layers = [self.layers] if self.config.scan else list(self.layers.values())
        graphdef = nnx.graphdef(layers[0])
        bias_graphdef, bias = nnx.split(self.attention_bias)

        def body(x: jax.Array, of_layer: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
            state, memory, key = of_layer
            layer, shared = nnx.merge(graphdef, state), nnx.merge(bias_graphdef, bias)
            return layer(x, memory, position_KxD, mask_TxK, shared, key), x

        if self.config.remat:
            body = jax.checkpoint(body)
        keys = None if rng is None else jax.random.split(rng, self.config.n_layer)
        if self.config.scan:
            return jax.lax.scan(body, x_BxTxD, (nnx.state(self.layers), states_LxBxMxD, keys))
        inputs = []
        for i, layer in enumerate(layers):
            key = None if keys is None else keys[i]
            x_BxTxD, x_in = body(x_BxTxD, (nnx.state(layer), states_LxBxMxD[i], key))
            inputs.append(x_in)
        return x_BxTxD, jnp.stack(inputs)


def _layers(config: TransformerXLConfig, rngs: nnx.Rngs) -> Layer | nnx.Dict:
    """One layer whose parameters have a leading axis, or separate layers with the same values.

    Both are initialised together, so that 24 layers compile as fast as one.
    """
    graphdefs = []  # One: `vmap` traces a single layer, and all have its structure.

    def one(key: jax.Array) -> Any:
        graphdef, state = nnx.split(Layer(config, nnx.Rngs(key)))
        graphdefs.append(graphdef)
        return state

    stacked = jax.vmap(one)(jax.random.split(rngs.params(), config.n_layer))
    graphdef = graphdefs[0]
    if config.scan:
        return nnx.merge(graphdef, stacked)
    states = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.n_layer)]
    return nnx.Dict({str(i): nnx.merge(graphdef, state) for i, state in enumerate(states)})


@functools.lru_cache
def _abstract(config: TransformerXLConfig) -> tuple[nnx.GraphDef[TransformerXL], nnx.State]:
    """The structure of the network, and the shapes and types of its parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TransformerXL(config, nnx.Rngs(0))))
    return graphdef, state


class LanguageModel:
    """Pure functions of plain nested parameters, for a loop that does not depend on Flax.

    Attributes:
      config: the settings of the network.
      stacked: see `experiments.language_modelling.models.Model`.
    """

    tensor_axes = TENSOR_AXES
    linear = r"layers/.*/kernel"

    def __init__(self, config: TransformerXLConfig):
        self.config = config
        self.stacked = "layers/" if config.scan else ""

    @property
    def abstract_params(self) -> Params:
        """The shapes and types of the parameters, as `init` would return them."""
        return nnx.to_pure_dict(_abstract(self.config)[1])

    def init(self, rng: jax.Array) -> Params:
        """Initial parameters, float32, with the same values whether they are stacked or not."""
        return nnx.to_pure_dict(nnx.state(TransformerXL(self.config, nnx.Rngs(rng))))

    def init_memory(self, lanes: int, lengths: Lengths) -> Memory:
        """An empty memory."""
        shape = (self.config.n_layer, lanes, lengths.memory, self.config.d_model)
        return Memory(jnp.zeros(shape, self.config.dtype), jnp.zeros((), jnp.int32))

    def memory_specs(self, shapes: Memory) -> Memory:
        """The memory is sharded like its lanes."""
        specs: dict[str, Any] = {"states": PartitionSpec(None, *BATCH), "valid": PartitionSpec()}
        return shapes._replace(**specs)

    def reach(self, lengths: Lengths) -> int:
        """How many segments back a prediction can look, through the memories of all layers."""
        return self.config.n_layer * math.ceil(lengths.memory / lengths.target)

    def apply(
        self,
        params: Params,
        memory: Memory,
        tokens_BxT: jax.Array,
        targets_BxT: jax.Array,
        lengths: Lengths,
        *,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Runs one segment of every lane.

        Args:
          params: parameters as from `init`.
          memory: the memory from `init_memory` or the segment before; it gets no gradient.
          tokens_BxT: the tokens, integers.
          targets_BxT: the token that follows each of them, integers.
          lengths: the lengths of training or evaluation.
          rng: the key for dropout; None in evaluation.

        Returns:
          The negative log-likelihood in nats, float32 [B, T], and the next memory.
        """
        hidden_BxTxD, memory = self.hidden(params, memory, tokens_BxT, lengths, rng=rng)
        return self.nll(params, hidden_BxTxD, targets_BxT), memory

    def hidden(
        self,
        params: Params,
        memory: Memory,
        tokens_BxT: jax.Array,
        lengths: Lengths,
        *,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Like `apply`, but returns the hidden states [B, T, d_model] instead of the likelihood."""
        model = self._model(params)
        hidden_BxTxD, inputs_LxBxTxD = model(tokens_BxT, memory, lengths, rng)
        return hidden_BxTxD, _remember(memory, inputs_LxBxTxD)

    def nll(self, params: Params, hidden_BxTxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
        """The second half of `apply`: the negative log-likelihood of the targets, float32."""
        model = self._model(params)
        return model.softmax.nll(hidden_BxTxD, targets_BxT, model.embedding)

    def log_probs(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The log-probability of every token to be the next: [..., d_model] → [..., n_token]."""
        model = self._model(params)
        return model.softmax.log_probs(hidden, model.embedding)

    def next_log_probs(
        self, params: Params, memory: Memory, tokens_BxT: jax.Array, lengths: Lengths
    ) -> tuple[jax.Array, Memory]:
        """Log-probabilities of the token after each segment, [B, n_token], and the next memory."""
        hidden_BxTxD, memory = self.hidden(params, memory, tokens_BxT, lengths)
        return self.log_probs(params, hidden_BxTxD[:, -1]), memory

    def _model(self, params: Params) -> TransformerXL:
        return nnx.merge(_abstract(self.config)[0], params)


def _remember(memory: Memory, inputs_LxBxTxD: jax.Array) -> Memory:
    t, m = inputs_LxBxTxD.shape[2], memory.states.shape[2]
    states = jax.lax.stop_gradient(inputs_LxBxTxD).astype(memory.states.dtype)
    states = jnp.concatenate([memory.states, states], axis=2)[:, :, t:]
    return Memory(states, jnp.minimum(memory.valid + t, m).astype(jnp.int32))
