"""A Transformer-XL of 2.9 M parameters on enwik8, for two CPU cores or one GPU.

It reproduces no row of the paper. At a small size, it asks the question that the paper asks with
its enwik8 model of 277 M parameters: whether Top-KAST at 90 % sparsity is better, after the same
number of steps, than a fixed random mask and than a dense model with as few parameters. The model
has four layers of width 256, and segments of 64 bytes with as much memory. Every byte is a symbol,
the text is split by bytes (90/5/5), and bits per character are those of the whole last 5 MB.

Sparse networks have a larger learning rate than dense ones: if a neuron has a tenth of its inputs,
a step of the same size changes its output by that much less. The widest network, `dense`, has the
smallest learning rate. The sets are refreshed every 200 of the 2,000 steps, because with so little
text more frequent refreshes follow noise. docs/results.md ("Settings that were tried on
enwik8") has the runs behind this.

Data: enwik8, prepared once by `scripts/prepare_text enwik8`, or any file of raw text, for example
the same one: --config.data.name=text_file --config.data.file=enwik8.
Hardware: two CPU cores, 10 minutes for 2,000 steps of the dense model (0.28 s each, 2026-11-30), or
one GPU with more steps: the schedule follows `steps`.

Measured, 2,000 steps, test bpc: dense 2.445, static-90 2.492, Top-KAST 90/80 2.541 and 80/60 2.543,
small-dense-90 2.576 (two CPU cores, 2026-11-24).

Command:
    python -m experiments.main --config=configs/enwik8_small.py:90/80 --workdir=DIR
Variants: dense; F/B, for example 80/60, 90/80 (Top-KAST; forward/backward sparsity in percent; the
default is 90/80); METHOD-F, for example rigl-90 (another registered method); static-F (a fixed
random mask); small-dense-F (dense, of the same depth, narrower, with as many parameters as a model
of F % sparsity runs on); study (width 128 and 8,000 steps, as in `configs/sweeps/study_texts.py`);
smoke.
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config
from experiments.language_modelling.config import shrink_to_smoke

FLAGS = ("smoke", "study")


def get_config(variant: str = "90/80") -> ConfigDict:
    config = base_config("language_modelling")
    config.steps = 2_000
    config.batch_size = 16
    config.log_every = 50
    config.checkpoint_every = 500
    config.model.n_layer = 4
    config.model.n_head = 4
    config.model.d_model = 256
    config.model.d_head = 64
    config.model.d_inner = 768
    config.model.scan = True  # Compiles in a quarter of the time.
    config.model.train.target = 64
    config.model.train.memory = 64
    config.model.evaluation.target = 128
    config.model.evaluation.memory = 128  # All distances occur in training.
    config.model.evaluation.same_length = True
    config.data.name = "enwik8"
    config.data.eval_batch_size = 32
    config.data.eval_split = "test"  # No choice depends on it.
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.clip_global_norm = 0.25
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 100
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 200
    config.method.exploration_weight = 1e-4
    # Attention and feed-forward blocks are sparse; embeddings and the tied softmax are dense.
    config.method.rules = (("layers/.*/kernel", "sparse"), (".*", "dense"))
    flags = apply_variant(config, variant, FLAGS)
    if config.method.name == "dense":
        narrow = config.model.small_dense.forward_density < 1
        config.optimizer.learning_rate = 3e-3 if narrow else 1e-3
    if "study" in flags:
        _make_study(config)
    if "smoke" in flags:
        shrink_to_smoke(config)
    return config


def _make_study(config: ConfigDict) -> None:
    """A model that is small enough to see 8 M bytes in 25 minutes on an idle core."""
    config.steps = 8_000
    config.checkpoint_every = 2_000
    config.model.d_model = 128
    config.model.d_head = 32
    config.model.d_inner = 384
    # Which rates were tried, and with which results, is in docs/results.md.
    wide = config.method.name == "dense" and config.model.small_dense.forward_density == 1
    config.optimizer.learning_rate = 2e-3 if wide else 4e-3
    if config.method.name != "dnw":  # which refreshes in every step
        config.method.refresh_every = 100
