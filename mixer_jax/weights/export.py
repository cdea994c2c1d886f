"""A trained model as one file that runs without this package: StableHLO, ONNX.

Both take uint8 images [n, height, width, 3] for any n, hold the parameters, and scale
the pixels themselves. A JSON file beside each says how to make such images out of any
image, and what the outputs stand for.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform, scale
from mixer_jax.files import replace_when_whole
from mixer_jax.model import MlpMixer
from mixer_jax.weights.layout import check_params

PLATFORMS = ("cpu", "cuda", "tpu")

_ONNX_LIMIT_BYTES = 2**31 - 1  # of a protobuf message, which an ONNX file is


class ExportError(ValueError):
    """A model that cannot be written in this format."""


def export_stablehlo(
    path: str | os.PathLike[str],
    model: MlpMixer,
    params: Mapping[str, Any],
    transform: EvalTransform,
    class_names: Sequence[str] | None = None,
    *,
    features: bool = False,
) -> None:
    """Writes a serialized StableHLO function, for the CPU, CUDA and TPUs.

    Any Python with JAX runs it: `jax.export.deserialize(data).call(images)`, where data
    is a bytearray of the file's contents. JAX keeps such files working for six months.

    Args:
      path: the file, used as given; the JSON file is called the same and ".json".
      model: the model.
      params: its parameters.
      transform: how the images it was trained for are made.
      class_names: what the logits stand for, if that is known.
      features: give pre_logits [n, hidden_dim] instead of logits [n, num_classes].

    Raises:
      ExportError: `transform` permutes pixels.
      CheckpointError: the parameters are of another model, or for images of another
        size.
      FileError: `path` is a URL.
    """
    function, about = _prepare(model, params, transform, class_names, features)
    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *_image_shape(transform)), jnp.uint8)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(images)
    _write(path, exported.serialize(), {"format": "stablehlo"} | about)


def export_onnx(
    path: str | os.PathLike[str],
    model: MlpMixer,
    params: Mapping[str, Any],
    transform: EvalTransform,
    class_names: Sequence[str] | None = None,
    *,
    features: bool = False,
) -> None:
    """Writes an ONNX model with the input `images`; takes the arguments of the above.

    The output is called `logits`, or `pre_logits` with features.

    Raises:
      ExportError: as above; the extra `onnx` is not installed; the model is larger
        than 2 GiB.
      CheckpointError, FileError: as above.
    """
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    if num_bytes > _ONNX_LIMIT_BYTES:
        raise ExportError(
            f"{path}: not written. The parameters have {num_bytes:,} bytes and an ONNX "
            f"file at most {_ONNX_LIMIT_BYTES:,}. Export to StableHLO."
        )
    function, about = _prepare(model, params, transform, class_names, features)
    images = jax.ShapeDtypeStruct(("n", *_image_shape(transform)), jnp.uint8)
    # jax2onnx converts convolutions with code that relies on rank promotion.
    with _quiet(), jax.numpy_rank_promotion("allow"):
        try:
            from jax2onnx import to_onnx
        except ImportError as error:
            raise ExportError(
                f"{path}: not written. ONNX needs jax2onnx ({error}): "
                'pip install "mixer-jax[onnx]"'
            ) from error
        proto = to_onnx(
            function,
            [images],
            model_name=about["model"].replace("/", "_"),
            input_names=["images"],
            output_names=[about["output"]["name"]],
        )
    _write(path, proto.SerializeToString(), {"format": "onnx"} | about)


def _image_shape(transform: EvalTransform) -> tuple[int, int, int]:
    return *transform.crop, 3


def _prepare(
    model: MlpMixer,
    params: Mapping[str, Any],
    transform: EvalTransform,
    class_names: Sequence[str] | None,
    features: bool,
) -> tuple[Callable[[jax.Array], jax.Array], dict[str, Any]]:
    """Returns the function to export, and what the JSON file says of it."""
    if transform.permute:
        raise ExportError(
            "The run permuted its images' pixels (pp.permute), which an exported model "
            "cannot ask of its users."
        )
    image_shape = _image_shape(transform)
    check_params(params, model, image_shape, "The parameters cannot be exported")
    if features:
        model = model.clone(num_classes=None)  # it leaves the head's parameters alone

    def forward(images: jax.Array) -> Any:
        inputs = scale(images, transform.mean, transform.std)
        return model.apply({"params": params}, inputs, train=False)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    width = jax.eval_shape(forward, images).shape[-1]
    is_logits = bool(model.num_classes)
    return forward, {
        "model": model.model_name or "Mixer",
        "gelu": model.gelu,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["n", *image_shape],
            "channels": "RGB",
        },
        "output": {
            "name": "logits" if is_logits else "pre_logits",
            "dtype": "float32",
            "shape": ["n", width],
        },
        "preprocessing": {
            **transform.as_dict(),
            "steps": f"{transform.steps}; round to uint8. "
            "Mean and standard deviation are applied in the model.",
        },
        "class_names": (
            [printable(x) for x in class_names] if class_names and is_logits else None
        ),
        "jax_version": jax.__version__,
    }


def _write(
    path: str | os.PathLike[str], content: bytes | bytearray, about: dict[str, Any]
) -> None:
    """Writes both files, the model last: a model always has its description."""
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    with replace_when_whole(f"{os.fspath(path)}.json") as partial:
        partial.write_text(text, encoding="utf-8")
    with replace_when_whole(pathlib.Path(path)) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hides what jax2onnx prints, logs and warns of, which is about itself."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
