"""Transformer-XL of 277 M parameters on enwik8: the paper's setting (its table 4 and appendix A).

24 layers of width 1024 (8 heads, 3072 inside the feed-forward block), windows of 768 bytes with a
memory of 2,304 in training and 5,000 in evaluation. Adam at 2e-4 after a warm-up of 4,000 steps,
cosine decay, gradient norm clipped at 0.25, no weight decay. Every matrix is sparse, the tied
embedding and softmax included, so that as many parameters are active as the paper prints: 55 M at
80 %, 27.7 M at 90 % (a fifth and a tenth of 277 M; vectors, which are dense, add 0.2 M). The paper
does not state batch and steps (64 and 400,000, the reference's), dropout within 0.05 to 0.2 (0.15),
the steps between refreshes (100), the exploration weight (1e-4) and the evaluation's clamp (1000):
one line each. Its table 4 prints a d_embed of 512 next to 69 M parameters, which is the small
model's; here embeddings have the width of the model.

Expected test bits per character, read off the paper's figure 3c [F]; that of dense is from its
table 2 [V], which rounds those of 80/0, 80/80 and 90/60:
    dense  0.99
    80/0   1.004    80/60  1.016    80/80  1.025
    90/0   1.021    90/60  1.033    90/80  1.046    90/90  1.083
    95/0   1.073    95/60  1.081    95/80  1.097
    dense,reference  0.99 (Transformer-XL's published result, at its own lengths [V])
Data: enwik8, prepared once by `scripts/prepare_text enwik8`. Each of its 205 bytes is a symbol. The
preparation of the reference loses the line feeds and has 204 symbols.
Hardware: not tried on any; an estimated 300 chip-hours of TPU v5e (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/enwik8_large.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/0, 80/60, 80/80, 90/60, 90/80, 95/90 (Top-KAST;
forward/backward sparsity in percent; the default is 90/80); METHOD-F, for example rigl-90 (another
registered method); static-F (a fixed random mask); small-dense-F (dense, of the same depth,
narrower, with as many parameters as a model of F % sparsity runs on); dense-embeddings (embedding
and softmax are dense); reference (learning rate, windows and memories of Transformer-XL's large
model); smoke (three steps of a tiny model on Python's own documentation).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke

FLAGS = ("smoke", "dense-embeddings", "reference")


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
    flags = apply_variant(config, variant, FLAGS)
    if "reference" in flags:
        config.optimizer.learning_rate = 2.5e-4
        config.model.train.memory = 768
        config.model.evaluation.memory = 3800
    if "smoke" in flags:
        shrink_to_smoke(config)
    return config
