"""Transformer-XL of 41 M parameters on enwik8.

The recipe of Transformer-XL's base model: 12 layers, 400,000 steps of 22 lanes of 512 bytes.
Adam at 2.5e-4 with cosine decay, gradient norm clipped at 0.25, no weight decay; a refresh
every 100 steps. Embeddings and the softmax are dense here; in `enwik8_large.py`, every matrix is
sparse.

Expected: dense 1.06 bpc, Transformer-XL's published result at these evaluation lengths [V], which
the paper's table 2 quotes. The paper has no sparse model of this size.

Data: enwik8, prepared once by `scripts/prepare_text enwik8`. Each of its 205 bytes is a symbol. The
preparation of the reference loses the line feeds and has 204 symbols.
Hardware: 4 GPUs of 16 GB in the original; 22 lanes divide over 1, 2, 11 or 22 devices. Not tried;
an estimated 7 chip-hours of TPU v5e (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/enwik8_base.py:90/80 --workdir=DIR
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
    config.steps = 400_000
    config.batch_size = 22
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 5_000
    config.model.n_layer = 12
    config.model.n_head = 8
    config.model.d_model = 512
    config.model.d_head = 64
    config.model.d_inner = 2048
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.train.target = 512
    config.model.train.memory = 512
    config.model.evaluation.target = 80
    config.model.evaluation.memory = 2100
    config.model.evaluation.clamp = 820
    config.model.evaluation.same_length = True
    config.data.name = "enwik8"
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
