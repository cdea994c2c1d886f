"""Every default of a run. The other configs change what they must."""

import ml_collections
from ml_collections import config_dict

from mixer_jax.variants import get_variant


def get_config() -> ml_collections.ConfigDict:
    """Returns what holds unless a config says otherwise: vit_jax's fine-tuning."""
    config = ml_collections.ConfigDict()

    # Where {model.model_name}.npz is, whose parameters the run starts from, all but the
    # head: a published folder (imagenet1k, imagenet21k, sam, gsam; fetched once), or a
    # local one. None or '': start from scratch.
    config.pretrained_dir = config_dict.placeholder(str)

    # "digits", a folder with {train,test}/<class>/<image>, a .csv or .tsv file with the
    # columns path, label and perhaps split, or any name of TensorFlow Datasets.
    config.dataset = "cifar10"
    # Where TensorFlow Datasets keeps what is prepared, and where it finds files that
    # one must download by hand. None: its defaults, in ~/tensorflow_datasets.
    config.tfds_data_dir = config_dict.placeholder(str)
    config.tfds_manual_dir = config_dict.placeholder(str)

    # From examples to batches.
    config.pp = ml_collections.ConfigDict()
    # Splits to train and test on, such as "train[:98%]". None: as is usual for the
    # dataset (mixer_jax.data.sources.DEFAULT_SPLITS), else "train" and "test".
    config.pp.train = config_dict.placeholder(str)
    config.pp.test = config_dict.placeholder(str)
    config.pp.crop = 224  # side of the images that the model sees, in pixels
    config.pp.resize = 256  # see evaluation, in pixels
    # "resize" straight to crop x crop, "resize_then_central_crop" by way of
    # resize x resize, or "resize_small_then_central_crop": the short side to resize.
    config.pp.evaluation = "resize"
    config.pp.area_range = (0.05, 1.0)  # of a training crop, as a share of the image
    config.pp.aspect_range = (0.75, 1.33)  # of a training crop, width / height
    config.pp.flip = True  # mirror every other training image
    config.pp.transfer = "uint8"  # or "float32", exact, at four times the bytes

    config.seed = 0  # of the initial parameters, the data's order and augmentation
    config.total_steps = 10_000
    config.batch = 512  # images of an update
    config.accum_steps = 8  # slices of a batch, computed in turn to save memory
    config.batch_eval = 512
    config.prefetch = 2  # batches prepared ahead

    config.optimizer = "sgd"  # with momentum 0.9; or "adam"
    config.optim_dtype = "bfloat16"  # of the momentum; of Adam's first moment
    config.grad_norm_clip = 1.0  # highest global norm of the gradient
    config.weight_decay = 0.0  # of kernels, decoupled, per unit of learning rate
    config.base_lr = 0.03
    config.warmup_steps = 500
    config.decay_type = "cosine"  # to 0; or "linear" to linear_end; or "constant"
    config.linear_end = 1e-5

    # Steps between two evaluations, checkpoints and rows of metrics.
    config.eval_every = 500
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 3  # the newest ones
    config.progress_every = 10

    config.mesh = ml_collections.ConfigDict()
    config.mesh.fsdp = 1  # devices that share one copy of the state

    config.model = get_model("Mixer-B_16")
    return config.lock()


def get_model(name: str) -> ml_collections.ConfigDict:
    """Returns the fields of MlpMixer for a published name, such as "Mixer-B_16"."""
    variant = get_variant(name)
    model = ml_collections.ConfigDict()
    model.model_name = name
    model.patches = ml_collections.ConfigDict()
    model.patches.size = (variant.patch_size, variant.patch_size)
    model.num_blocks = variant.num_blocks
    model.hidden_dim = variant.hidden_dim
    model.tokens_mlp_dim = variant.tokens_mlp_dim
    model.channels_mlp_dim = variant.channels_mlp_dim
    model.stoch_depth = 0.0  # probability of dropping the last block's branches
    model.dropout_rate = 0.0  # after the GELU and the second Dense of every MLP
    # Of the activations: "float32", or "bfloat16". None: bfloat16 on TPU, else float32.
    model.dtype = config_dict.placeholder(str)
    # What the backward pass computes again to save memory: "none", "blocks" (each one
    # whole), "dots" (all but matrix products). None: blocks on TPU, else none.
    model.remat = config_dict.placeholder(str)
    model.scan_blocks = False  # compile one block for all: quicker for TPU
    model.gelu = "tanh"  # as published; "erf" for parameters from PyTorch
    return model.lock()


def with_dataset(
    config: ml_collections.ConfigDict, dataset: str
) -> ml_collections.ConfigDict:
    """Returns `config` for another dataset, with vit_jax's number of steps for it."""
    config.dataset = dataset
    config.total_steps = 20_000 if dataset == "imagenet2012" else 10_000
    return config
