"""Transformer-XL of 151 M parameters on WikiText-103.

The recipe of Transformer-XL's base model: 16 layers, adaptive softmax, 200,000 steps of 60 lanes
of 150 words.
Adam at 2.5e-4 with cosine decay, gradient norm clipped at 0.25, no weight decay; a refresh
every 100 steps. The paper has no model of this size. Embeddings and the softmax are dense here; in
`wikitext103_large.py`, every matrix is sparse.

Expected: dense 24.0 perplexity, Transformer-XL's published result at these evaluation lengths [V].
The paper reports no number for it.

Data: WikiText-103, prepared once by `scripts/prepare_text wikitext103`; 267,735 words.
Hardware: 4 GPUs of 16 GB in the original; 60 lanes divide over any divisor of 60 devices. Not
tried; an estimated 7 chip-hours of TPU v5e (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/wikitext103_base.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/0, 80/60, 80/80, 90/60, 90/80, 95/90 (Top-KAST;
forward/backward sparsity in percent; the default is 90/80); METHOD-F, for example rigl-90 (another
registered method); static-F (a fixed random mask); small-dense-F (dense, of the same depth,
narrower, with as many parameters as a model of F % sparsity runs on); smoke (three steps of a tiny
model on Python's own documentation).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke


def get_config(variant: str = "90/80") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 200_000
    config.batch_size = 60
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 5_000
    config.model.n_layer = 16
    config.model.n_head = 10
    config.model.d_model = 410
    config.model.d_head = 41
    config.model.d_inner = 2100
    config.model.cutoffs = (20_000, 40_000, 200_000)
    config.model.tie_projs = (False, True, True, True)
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.train.target = 150
    config.model.train.memory = 150
    config.model.evaluation.target = 64
    config.model.evaluation.memory = 640
    config.model.evaluation.clamp = 400
    config.model.evaluation.same_length = True
    config.data.name = "wikitext103"
    config.data.level = "word"
    config.data.eval_batch_size = 16
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 100
    config.method.exploration_weight = 1e-4
    # Attention and feed-forward blocks are sparse; embeddings and the tied softmax are dense.
    config.method.rules = (("layers/.*/kernel", "sparse"), (".*", "dense"))
    if "smoke" in apply_variant(config, variant):
        shrink_to_smoke(config)
    return config
