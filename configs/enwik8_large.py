"""Transformer-XL of 277 M parameters on enwik8, a row of the paper.

The recipe of Transformer-XL's large model: 24 layers, 400,000 steps of 64 lanes of 768 bytes. Adam
at 2.5e-4 with cosine decay after a warm-up of 4,000 steps, gradient norm clipped at 0.25, no weight
decay; masks are refreshed every 100 steps. It is not known which layers the paper made sparse, nor
its optimizer settings. Both are set in single lines below.

Expected: dense 0.99 bpc, Transformer-XL's published result at these evaluation lengths. There
is no number for Top-KAST that could be checked.

Data: enwik8, prepared once by `scripts/prepare_text enwik8`. Each of its 205 bytes is a symbol. The
preparation of the reference loses the line feeds and has 204 symbols.
Hardware: 64 TPU v3 cores, or 8 GPUs of 80 GB;
docs/reproducing.md has the device-hours.

Command:
    python -m experiments.main --config=configs/enwik8_large.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/0, 80/60, 80/80, 90/60, 90/80, 95/90 (Top-KAST;
forward/backward sparsity in percent; the default is 90/80); static-F (a fixed random mask);
small-dense-F (dense, of the same depth, narrower, with as many parameters as a model of F %
sparsity runs on); smoke (three steps of a tiny model on Python's own documentation).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke


def get_config(variant: str = "90/80") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 400_000
    config.batch_size = 64
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 5_000
    config.model.n_layer = 24
    config.model.n_head = 8
    config.model.d_model = 1024
    config.model.d_head = 128
    config.model.d_inner = 3072
    config.model.dropout = 0.15
    config.model.dropatt = 0.15
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.remat = True
    config.model.train.target = 768
    config.model.train.memory = 768
    config.model.evaluation.target = 128
    config.model.evaluation.memory = 3800
    config.model.evaluation.clamp = 1000
    config.model.evaluation.same_length = True
    config.data.name = "enwik8"
    config.data.eval_batch_size = 8
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 4_000
    config.optimizer.schedule.reference_steps = 400_000
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
