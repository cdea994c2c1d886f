"""Every default of a run. The other configs change some of them."""

import dataclasses
import math
import pathlib

import ml_collections
from ml_collections import config_dict

from mixer_jax.data.dataset import usual_for
from mixer_jax.data.sizes import as_size, as_value, in_proportion, is_size, parse_size
from mixer_jax.model import MlpMixer
from mixer_jax.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults, those of fine-tuning in vit_jax."""
    config = ml_collections.ConfigDict()

    # The run starts from these parameters, without the head: a published folder
    # (imagenet1k, imagenet21k, sam, gsam; downloaded once) or a local one, in which the
    # file is {model.model_name}.npz; or one model: a file, a run's workdir, a name such
    # as timm/mixer_b16_224.goog_in21k. None or '': start from scratch.
    config.pretrained_dir = config_dict.placeholder(str)
    # If that file is for images or patches of another size: "error"; "interpolate", for
    # any size; or "block_diagonal" (paper, appendix C), for K times the height and
    # width: model.tokens_mlp_dim becomes K² times the file's. See docs/checkpoints.md.
    config.resolution = "error"

    # Instead of pretrained_dir, the workdir of a run: start from its parameters, with
    # its head for the classes of the same name. Optimizer and steps begin anew.
    config.init_from = config_dict.placeholder(str)

    # "digits", a folder with {train,test}/<class>/<image>, a .csv or .tsv file with the
    # columns path, label and perhaps split, or any name of TensorFlow Datasets.
    config.dataset = "cifar10"
    # Of a dataset of TensorFlow Datasets, the feature with the label or labels. None:
    # its usual one.
    config.label_key = config_dict.placeholder(str)
    # The folders where TensorFlow Datasets keeps prepared datasets, and where it looks
    # for files that are downloaded by hand. None: its defaults, in
    # ~/tensorflow_datasets.
    config.tfds_data_dir = config_dict.placeholder(str)
    config.tfds_manual_dir = config_dict.placeholder(str)

    # From examples to batches.
    config.pp = ml_collections.ConfigDict()
    # Splits to train and test on, such as "train[:98%]". None: the usual ones of the
    # dataset (DEFAULT_SPLITS of mixer_jax/data/dataset.py), or "train" and "test".
    config.pp.train = config_dict.placeholder(str)
    config.pp.test = config_dict.placeholder(str)
    # Size of the images that the model sees, in pixels: one number, or (height, width).
    config.pp.crop = _number_or_tuple(224)
    config.pp.resize = _number_or_tuple(256)  # see pp.evaluation; in the same way
    # Of test images: "resize" to crop x crop; "resize_then_central_crop", to
    # resize x resize first; "resize_small_then_central_crop", the short side first;
    # "torchvision", this as torchvision and timm do it; "squash", the one before as
    # timm does it. See docs/data.md.
    config.pp.evaluation = "resize"
    # How images are resized: "bilinear", "bicubic", "area", "pil_bilinear" or
    # "pil_bicubic". None: bilinear in training, and what pp.evaluation has in tests.
    config.pp.interpolation = config_dict.placeholder(str)
    # The model takes (pixel / 255 - mean) / std; one number, or three for red, green
    # and blue. None: those of the file of pretrained_dir; else 0.5: from -1 to 1.
    config.pp.mean = _number_or_tuple(None)
    config.pp.std = _number_or_tuple(None)
    config.pp.area_range = (0.05, 1.0)  # of a training crop, as a share of the image
    config.pp.aspect_range = (0.75, 1.33)  # of a training crop, width / height
    config.pp.flip = True  # mirror every other training image
    config.pp.transfer = "uint8"  # or "float32", exact, at four times the bytes

    config.pp.randaugment = (0, 0.0)  # layers and magnitude
    # One permutation for all images (paper, figure 4): "patches" shuffles the patches,
    # and the pixels within each; "pixels" shuffles all pixels.
    config.pp.permute = config_dict.placeholder(str)

    config.seed = 0  # of the initial parameters, the data's order and augmentation
    # Durations are given in steps, epochs of the training split or examples; the other
    # two are 0.
    config.total_steps = 10_000
    config.total_epochs = 0.0
    config.total_examples = 0
    config.batch = 512  # images of an update
    config.accum_steps = 8  # slices of a batch, one after the other to save memory
    config.batch_eval = 512
    config.prefetch = 2  # batches prepared ahead
    # Processes that prepare images; 0: threads of the one that trains. It changes no
    # result. None: what suits the machine, see docs/scaling.md.
    config.workers = config_dict.placeholder(int)

    # Cross-entropy of one label; or "sigmoid", for one or several labels of an image.
    config.loss = "softmax"
    config.label_smoothing = 0.0
    config.mixup_p = 0.0  # of the Beta distribution; 0 for no mixup
    config.head_bias_init = 0.0

    config.optimizer = "sgd"  # with momentum 0.9; or "adam"
    config.optim_dtype = "bfloat16"  # of the momentum; of Adam's first moment
    config.grad_norm_clip = 1.0  # highest global norm of the gradient; 0: no limit
    config.weight_decay = 0.0  # of kernels, decoupled, per unit of learning rate
    config.base_lr = 0.03
    config.warmup_steps = 500
    config.warmup_epochs = 0.0
    config.warmup_examples = 0
    config.decay_type = "cosine"  # to 0; or "linear" to linear_end; or "constant"
    config.linear_end = 1e-5
    # Pairs (regular expression, factor). The first expression that matches the whole
    # name of a parameter gives the factor of its learning rate; 0 freezes it. To train
    # only the head: (("head/.*", 1.0), (".*", 0.0)).
    config.lr_multipliers = ()
    config.sam_rho = 0.0  # radius of sharpness-aware minimization; 0 for none
    # Where the loss or the gradient is infinite or not a number: "stop", or "skip" the
    # update, and stop after nonfinite_limit of them in a row.
    config.on_nonfinite = "stop"
    config.nonfinite_limit = 10

    # Steps between two evaluations, checkpoints and rows of metrics.
    config.eval_every = 500
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3  # the newest ones
    config.progress_every = 10
    # Steps to trace for TensorBoard's profile plugin, after the first ones of a start:
    # tensorboard --logdir <workdir>/tensorboard. 0 for none.
    config.profile_steps = 0
    # A run saves and leaves after so many seconds, as for a signal: its exit status is
    # 75, and the same command continues it. Take the limit of the queue, less what a
    # step and a save need. 0 for no limit.
    config.max_run_secs = 0

    config.mesh = ml_collections.ConfigDict()
    config.mesh.fsdp = 1  # devices that share one copy of the state

    config.evals = ml_collections.ConfigDict()  # more evaluators; see add_evaluator

    config.model = get_model("Mixer-B_16")
    return config.lock()


def _number_or_tuple(value: object) -> config_dict.FieldReference:
    """Returns `value` for a key whose type may change."""
    return config_dict.FieldReference(value, field_type=object)


def get_model(name: str) -> ml_collections.ConfigDict:
    """Returns the fields of MlpMixer for a published name, such as "Mixer-B_16".

    Names and defaults are those of MlpMixer, where each is explained. A field that is
    added there is a key here.
    """
    sizes = get_variant(name)
    fields = {
        x.name: x.default
        for x in dataclasses.fields(MlpMixer)
        if x.default is not dataclasses.MISSING
    }
    del fields["parent"], fields["name"]  # Flax's
    fields |= vars(sizes)
    fields |= {"model_name": name, "patches": {"size": sizes.patches.size}}
    # None for dtype and remat: what suits the device. That is bfloat16 on TPU, and
    # float32 elsewhere; and "none", or "blocks" where the activations would not fit a
    # TPU's memory. None for the others: what the parameters of pretrained_dir were
    # trained with, else MlpMixer's.
    for name in {"dtype", "remat", "gelu", "layer_norm_epsilon"} & fields.keys():
        fields[name] = config_dict.placeholder(type(fields[name]))
    return ml_collections.ConfigDict(fields).lock()


def get_pretrain_config(variant: str) -> ml_collections.ConfigDict:
    """Returns the common part of the paper's pre-training recipes (appendix A).

    Args:
      variant: such as "b16".
    """
    config = get_config()
    config.model = get_model(f"Mixer-{variant[0].upper()}_{variant[1:]}")
    config.batch = config.batch_eval = 4096
    config.accum_steps = 1
    config.total_steps, config.total_epochs = 0, 300.0
    config.warmup_steps = 10_000
    config.loss = "sigmoid"
    config.optimizer = "adam"
    config.optim_dtype = "float32"
    config.base_lr = 0.001
    config.decay_type = "linear"
    config.linear_end = 1e-5 * config.base_lr
    config.weight_decay = 0.1
    config.model.stoch_depth = 0.1
    config.pp.evaluation = "resize_small_then_central_crop"
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.progress_every = 50
    add_evaluator(
        config,
        "fewshot_pets",
        type="fewshot",
        dataset="oxford_iiit_pet",
        every=25_000,
    )
    return config


def add_evaluator(
    config: ml_collections.ConfigDict, name: str, **values: object
) -> None:
    """Adds an evaluator to `config`; its numbers are called "<name>/…"."""
    spec = ml_collections.ConfigDict()
    # "classification" by the head, or "fewshot": a linear probe on pre_logits.
    spec.type = "classification"
    spec.dataset = config_dict.placeholder(str)  # None: the one trained on
    spec.split = "test"
    # As label_key of a run, which is the default for the run's dataset. Images may have
    # several labels.
    spec.label_key = config_dict.placeholder(str)
    spec.evaluation = config_dict.placeholder(str)  # None: as pp.evaluation
    spec.resize = _number_or_tuple(0)  # 0: as pp.resize
    spec.every = 0  # steps; 0: as eval_every
    spec.train_split = "train"  # few-shot: of the probe's examples
    spec.shots = (1, 5, 10, 25)  # few-shot: numbers of examples per class
    with config.unlocked():
        config.evals[name] = spec.lock()
        config.evals[name].update(values)


# Steps of fine-tuning: vit_jax's for CIFAR and ImageNet, the paper's for the others.
FINETUNE_STEPS = {
    "imagenet2012": 20_000,
    "oxford_iiit_pet": 500,
    "oxford_flowers102": 500,
}


def get_finetune_config(
    model_name: str, pretrained_dir: str | None, argument: str = "cifar10"
) -> ml_collections.ConfigDict:
    """Returns the config that fine-tunes a published model, as vit_jax does.

    Args:
      model_name: such as "Mixer-B_16".
      pretrained_dir: see get_config; None trains from scratch.
      argument: a dataset (see get_config), which has its usual number of steps; then
        after a comma the size of the images in pixels, if it is not 224, as in
        "cifar100,448", ",448" or ",320x224" (height x width); and ",smoke" for a run of
        seconds.
    """
    argument, smoke = split_argument(argument)
    dataset, comma, last = argument.rpartition(",")
    has_size = comma and is_size(last) and not pathlib.Path(argument).exists()
    size = parse_size(last) if has_size else None
    config = get_config()
    config.model = get_model(model_name)
    config.pretrained_dir = pretrained_dir
    config.dataset = (dataset if size else argument) or config.dataset
    config.total_steps = usual_for(config.dataset, FINETUNE_STEPS, 10_000)
    config.warmup_steps = min(500, config.total_steps // 5)
    if size:
        set_image_size(config, size)
    return shrink(config) if smoke else config


def set_image_size(
    config: ml_collections.ConfigDict, size: int | tuple[int, int]
) -> None:
    """Fine-tunes a file for images of pp.crop pixels at another size.

    For whole multiples that is the paper's scheme (appendix C).

    Args:
      config: is changed.
      size: (height, width) in pixels, or one number for both.
    """
    new, old = as_size(size), as_size(config.pp.crop)
    config.pp.resize = as_value(in_proportion(as_size(config.pp.resize), old, new))
    config.pp.crop = as_value(new)
    if new[0] % old[0] or new[1] % old[1]:
        config.resolution = "interpolate"
        return
    config.resolution = "block_diagonal"
    config.model.tokens_mlp_dim *= math.prod(new) // math.prod(old)


def split_argument(argument: str) -> tuple[str, bool]:
    """Splits the text behind the colon into the rest and whether it has "smoke"."""
    pieces = argument.split(",")
    return ",".join(p for p in pieces if p != "smoke"), "smoke" in pieces


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns `config` as a run of seconds on a CPU: two small blocks, on digits."""
    config.pretrained_dir = ""
    config.resolution = "error"
    config.init_from = config.label_key = None
    config.dataset = "digits"
    config.pp.train = config.pp.test = "test[:64]"
    config.pp.crop = 2 * config.model.patches.size[0]
    config.pp.resize = config.pp.crop + 2
    config.model.num_blocks = 2
    config.model.hidden_dim = 16
    config.model.tokens_mlp_dim = 8
    config.model.channels_mlp_dim = 32
    config.batch = config.batch_eval = 16
    config.accum_steps = min(config.accum_steps, 2)
    config.total_steps, config.total_epochs, config.total_examples = 4, 0.0, 0
    config.warmup_steps, config.warmup_epochs, config.warmup_examples = 1, 0.0, 0
    config.eval_every = config.checkpoint_every = 2
    config.progress_every = 1
    for name in config.evals:
        spec = config.evals[name]
        spec.dataset = spec.label_key = None
        spec.split, spec.train_split, spec.every = "test[64:128]", "train", 0
    return config
