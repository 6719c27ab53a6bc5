"""A language model outside the project: the next symbol depends on the last one alone."""

import jax
import jax.numpy as jnp

from experiments.layers import matmul


class Bigram:
    stacked = ""

    def __init__(self, width, vocabulary_size):
        self.shapes = {
            "embedding": (vocabulary_size, width),
            "kernel": (width, width),
            "head": (width, vocabulary_size),
        }

    @property
    def abstract_params(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, rng):
        keys = jax.random.split(rng, len(self.shapes))
        return {
            name: jax.random.normal(key, shape) / 8
            for key, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }

    def init_memory(self, lanes, lengths):
        return {}

    def memory_specs(self, shapes):
        return {}

    def reach(self, lengths):
        return 0

    def _log_probs(self, params, tokens):
        hidden = jnp.tanh(matmul(params["embedding"][tokens], params["kernel"]))
        return jax.nn.log_softmax(matmul(hidden, params["head"]))

    def apply(self, params, memory, tokens_BxT, targets_BxT, lengths, *, rng=None):
        log_probs = self._log_probs(params, tokens_BxT)
        return -jnp.take_along_axis(log_probs, targets_BxT[..., None], -1)[..., 0], memory

    def next_log_probs(self, params, memory, tokens_BxT, lengths):
        return self._log_probs(params, tokens_BxT[:, -1]), memory


def bigram(model, vocabulary_size):
    return Bigram(model.width, vocabulary_size)
