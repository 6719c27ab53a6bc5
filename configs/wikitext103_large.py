"""Transformer-XL of 284 M parameters on WikiText-103, a row of the paper.

The recipe of Transformer-XL's large model: 18 layers, adaptive softmax and embeddings, 4,000,000
steps of 128 lanes of 384 words. Adam at 2.5e-4 with cosine decay after a warm-up of 16,000 steps,
gradient norm clipped at 0.25, no weight decay; masks are refreshed every 100 steps. It is not known
which layers the paper made sparse, nor its optimizer settings. Both are set in single lines below.

Expected: dense 18.3 perplexity, Transformer-XL's published result at these evaluation lengths.
There is no number for Top-KAST that could be checked.

All four projections of the softmax are tied to the embedding's: this gives the published count,
284,121,930. The reference's script leaves the first untied and has 285,170,506:
--config.model.tie_projs="(False,True,True,True)".

Data: WikiText-103, prepared once by `scripts/prepare_text wikitext103`; 267,735 words.
Hardware: 64 TPU v3 cores, or 8 GPUs of 80 GB;
docs/reproducing.md has the device-hours.

Command:
    python -m experiments.main --config=configs/wikitext103_large.py:90/80 --workdir=DIR
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
    config.model.tie_projs = (True, True, True, True)
    config.model.dropout = 0.2
    config.model.dropatt = 0.2
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.remat = True
    config.model.train.target = 384
    config.model.train.memory = 384
    config.model.evaluation.target = 128
    config.model.evaluation.memory = 1600
    config.model.evaluation.clamp = 1000
    config.model.evaluation.same_length = True
    config.data.name = "wikitext103"
    config.data.level = "word"
    config.data.eval_batch_size = 8
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 16_000
    config.optimizer.schedule.reference_steps = 4_000_000
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
