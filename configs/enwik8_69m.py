"""Transformer-XL of 69 M parameters on enwik8: the small model of the paper's table 5.

24 layers of width 512 (8 heads, 1536 inside the feed-forward block); all else is as in
`configs/enwik8_large.py`, and so is what the paper does not state. It is the smallest language
model of the paper. Every matrix is sparse: 14 M parameters are active at 80 %, 7 M at 90 %.

Expected test bits per character (the paper's table 5 [V]), magnitude pruning and Top-KAST:
    dense  1.00
    pruning-80  1.02    pruning-90  1.06    pruning-95  1.13
    80/0   1.03    80/60  1.05
    90/0   1.08    90/80  1.10
    95/0   1.14    95/90  1.17
Data: enwik8, prepared once by `scripts/prepare_text enwik8`. Each of its 205 bytes is a symbol.
Hardware: not tried on any; an estimated 102 chip-hours of TPU v5e, or 20 hours of one H100, so that
it is the language model of the paper that a single GPU can train (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/enwik8_69m.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/0, 80/60, 90/80, 95/90 (Top-KAST; forward/backward sparsity in
percent; the default is 90/80); METHOD-F, for example pruning-90; static-F (a fixed random mask);
small-dense-F (dense, of the same depth, narrower, with as many parameters as a model of F %
sparsity runs on); dense-embeddings (embedding and softmax are dense); smoke (three steps of a tiny
model on Python's own documentation).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke

FLAGS = ("smoke", "dense-embeddings")


def get_config(variant: str = "90/80") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 400_000
    config.batch_size = 64
    config.log_every = 100
    config.eval_every = 10_000
    config.checkpoint_every = 5_000
    config.model.n_layer = 24
    config.model.n_head = 8
    config.model.d_model = 512
    config.model.d_head = 64
    config.model.d_inner = 1536
    config.model.dropout = 0.15
    config.model.dropatt = 0.15
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.remat = True
    config.model.train.target = 768
    config.model.train.memory = 2304
    config.model.evaluation.target = 128
    config.model.evaluation.memory = 5000
    config.model.evaluation.clamp = 1000
    config.model.evaluation.same_length = True
    config.data.name = "enwik8"
    config.data.eval_batch_size = 8
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 4_000
    config.optimizer.schedule.reference_steps = 400_000
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 100
    config.method.exploration_weight = 1e-4
    tables: tuple[tuple[str, object], ...] = ()
    if "dense-embeddings" not in variant:
        # Single entries in every run: blocks do not divide the vocabulary.
        tables = (("(embedding|softmax)/.*(table|projection).*", {"pattern": "unstructured"}),)
    config.method.rules = (*tables, ("layers/.*/kernel", "sparse"), (".*", "dense"))
    if "smoke" in apply_variant(config, variant, FLAGS):
        shrink_to_smoke(config)
    return config
