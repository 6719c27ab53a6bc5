"""Dense Transformer-XL of 94 M parameters on WikiText-103, to compare with the sparse ones.

The paper's table 3 has a dense model of 94 M parameters and does not say its sizes: here they are
those of `configs/wikitext103_large.py` in proportion (18 layers of width 560, 8 heads of 70, 2240
inside the feed-forward block, embeddings of 560). All else is as there.

Expected test perplexity: 21.5 (the paper's table 3 [V]).
Data: WikiText-103, prepared once by `scripts/prepare_text wikitext103`; 267,735 words.
Hardware: not tried on any; an estimated 920 chip-hours of TPU v5e (docs/reproducing.md).

Command:
    python -m experiments.main --config=configs/wikitext103_94m.py --workdir=DIR
Variants: dense (the default) and those of `configs/wikitext103_large.py` but for `reference`.
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke

FLAGS = ("smoke", "dense-embeddings")


def get_config(variant: str = "dense") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 4_000_000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 20_000
    config.checkpoint_every = 10_000
    config.model.n_layer = 18
    config.model.n_head = 8
    config.model.d_model = 560
    config.model.d_head = 70
    config.model.d_inner = 2240
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
    if "smoke" in apply_variant(config, variant, FLAGS):
        shrink_to_smoke(config)
    return config
