"""Top-KAST in plain NumPy, written from the paper's description; imported by tests only."""

from __future__ import annotations

import math
import re

import numpy as np


def keep_count(n, density):
    return max(1, math.floor(density * n + 0.5))


def top(magnitude, count):
    """Bool mask of the `count` largest magnitudes; ties to the lower row-major index, NaN first."""
    flat = np.asarray(magnitude, np.float64).ravel()
    order = np.lexsort((np.arange(flat.size), -np.abs(flat), ~np.isnan(flat)))
    mask = np.zeros(flat.size, bool)
    mask[order[:count]] = True
    return mask.reshape(np.shape(magnitude))


def is_top(mask, magnitude):
    """Whether a mask keeps a largest subset: nothing dropped is larger than what is kept."""
    rank = np.where(np.isnan(magnitude), np.inf, np.abs(np.asarray(magnitude, np.float64)))
    return mask.all() or rank[mask].min() >= rank[~mask].max()


def block_norms(theta, rows, cols):
    *lead, r, c = theta.shape
    blocks = np.abs(theta).reshape(*lead, r // rows, rows, c // cols, cols)
    return blocks.astype(np.float64).sum(axis=(-3, -1))


def select(theta, density, block=None):
    if block is None:
        return top(theta, keep_count(theta.size, density))
    norms = block_norms(theta, *block)
    kept = top(norms, keep_count(norms.size, density))
    return np.repeat(np.repeat(kept, block[0], axis=-2), block[1], axis=-1)


class Sgd:
    def __init__(self, rate, momentum=0.0):
        self.rate, self.momentum, self.trace = np.float32(rate), np.float32(momentum), None

    def update(self, g):
        self.trace = g if self.trace is None else g + self.momentum * self.trace
        return -self.rate * self.trace

    def reset(self, left):
        self.trace = np.where(left, np.float32(0), self.trace)


class Adam:
    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = map(np.float32, (rate, b1, b2, eps))
        self.new1, self.new2 = np.float32(1 - b1), np.float32(1 - b2)
        self.mu = self.nu = np.float32(0)
        self.t = 0

    def update(self, g):
        self.t += 1
        one = np.float32(1)
        self.mu = self.new1 * g + self.b1 * self.mu
        self.nu = self.new2 * (g * g) + self.b2 * self.nu
        mu = self.mu / (one - self.b1 ** np.float32(self.t))
        nu = self.nu / (one - self.b2 ** np.float32(self.t))
        return -self.rate * (mu / (np.sqrt(nu) + self.eps))

    def reset(self, left):
        self.mu = np.where(left, np.float32(0), self.mu)
        self.nu = np.where(left, np.float32(0), self.nu)


class TopKast:
    """One leaf. `a`, `b` are the forward and backward sets, valid for the present `theta`."""

    def __init__(
        self, theta, optimizer, forward, backward, refresh=100, weight=1e-4, norm="l2",
        stop=None, reset=False, block=None, first=None, decay=lambda steps: 0.0,
    ):  # fmt: skip
        """`first`: the first sets, where ties leave a choice; else the lower indices.

        `decay`: the weight of a decoupled penalty, by the number of finished steps.
        """
        self.theta = np.array(theta, np.float32)
        self.optimizer, self.refresh, self.stop, self.reset = optimizer, refresh, stop, reset
        self.forward, self.backward, self.block = forward, backward, block
        self.weight, self.norm, self.steps, self.decay = np.float32(weight), norm, 0, decay
        self.a, b = first or [select(self.theta, d, block) for d in (forward, backward)]
        self.b = self.a if stop == 0 else b

    @property
    def alpha(self):
        return np.where(self.a, self.theta, np.float32(0))

    def step(self, g):
        pull = self.theta if self.norm == "l2" else np.sign(self.theta)
        weight = np.where(self.a, self.weight, self.weight / np.float32(self.forward))
        g = np.where(self.b, g + weight * pull, np.float32(0))
        decay = np.float32(self.decay(self.steps))
        decayed = np.where(self.a, decay, decay / np.float32(self.forward)) * self.theta
        u = np.where(self.b, self.optimizer.update(g) - decayed, np.float32(0))
        self.theta = self.theta + u
        self.steps += 1
        before = self.b
        if self.stop is not None and self.steps >= self.stop:
            self.b = self.a
        elif self.steps % self.refresh == 0:
            self.a = select(self.theta, self.forward, self.block)
            self.b = select(self.theta, self.backward, self.block)
        if self.reset:
            self.optimizer.reset(before & ~self.b)


def buffer_sizes(compiled):
    """How many entries each buffer of a compiled program has, of any type."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return {math.prod(map(int, shape.split(","))) for shape in shapes}
