"""Transformer-XL of 285 M parameters on WikiText-103: the paper's setting (table 4, appendix A).

18 layers of width 1024 (16 heads, 4096 inside the feed-forward block; the paper's text says 16
layers, its table 18), adaptive embeddings and softmax, windows of 512 words with a memory of 768 in
training and 2,000 in evaluation. Adam at 2e-4 after a warm-up of 4,000 steps, cosine decay, norm
of the gradient clipped at 0.25, no weight decay. Embeddings, projections and the softmax with its
biases are sparse like every matrix, so that as many parameters are active as the paper prints: 57 M
at 80 %, 28.5 M at 90 %, 14.3 M at 95 %. The paper ties "the head only", which is read as the
projection of the first cluster. It does not state batch and steps (128 and 4,000,000, the
reference's), dropout within 0.05 to 0.2 (0.2), the steps between refreshes (100), the exploration
weight (1e-4) and the evaluation's clamp (1000): one line each.

Expected test perplexity (the paper's table 3 [V]):
    dense  18.3    80/0  19.8    80/60  21.3    90/80  25.1    95/90  32.2
    dense,reference  18.3 (Transformer-XL's published result, at its own lengths [V])
    the dense model of 94 M (configs/wikitext103_94m.py)  21.5
Data: WikiText-103, prepared once by `scripts/prepare_text wikitext103`; 267,735 words.
Hardware: not tried on any; an estimated 2,500 chip-hours of TPU v5e (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/wikitext103_large.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/0, 80/60, 80/80, 90/60, 90/80, 95/90 (Top-KAST;
forward/backward sparsity in percent; the default is 90/80); METHOD-F, for example rigl-90 (another
registered method); static-F (a fixed random mask); small-dense-F (dense, of the same depth,
narrower, with as many parameters as a model of F % sparsity runs on); dense-embeddings (embeddings
and softmax are dense); reference (learning rate, warm-up, windows, memories and tied projections of
Transformer-XL's large model: 284,121,930 parameters); smoke (three steps of a tiny model on
Python's own documentation).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke

FLAGS = ("smoke", "dense-embeddings", "reference")


def get_config(variant: str = "90/80") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 4_000_000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 20_000
    config.checkpoint_every = 10_000
    config.model.n_layer = 18
    config.model.n_head = 16
    config.model.d_model = 1024
    config.model.d_head = 64
    config.model.d_inner = 4096
    config.model.cutoffs = (20_000, 40_000, 200_000)
    config.model.div_val = 4
    config.model.tie_projs = (True, False, False, False)
    config.model.dropout = 0.2
    config.model.dropatt = 0.2
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.remat = True
    config.model.train.target = 512
    config.model.train.memory = 768
    config.model.evaluation.target = 128
    config.model.evaluation.memory = 2000
    config.model.evaluation.clamp = 1000
    config.model.evaluation.same_length = True
    config.data.name = "wikitext103"
    config.data.level = "word"
    config.data.eval_batch_size = 8
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 4_000
    config.optimizer.schedule.reference_steps = 4_000_000
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 100
    config.method.exploration_weight = 1e-4
    tables: tuple[tuple[str, object], ...] = ()
    if "dense-embeddings" not in variant:
        # Single entries in every run: blocks do not divide the vocabulary.
        tables = (("(embedding|softmax)/.*", {"pattern": "unstructured"}),)
    config.method.rules = (*tables, ("layers/.*/kernel", "sparse"), (".*", "dense"))
    flags = apply_variant(config, variant, FLAGS)
    if "reference" in flags:
        config.model.tie_projs = (True, True, True, True)
        config.model.train.target = 384
        config.model.train.memory = 384
        config.model.evaluation.memory = 1600
        config.optimizer.learning_rate = 2.5e-4
        config.optimizer.schedule.warmup_steps = 16_000
    if "smoke" in flags:
        shrink_to_smoke(config)
    return config
