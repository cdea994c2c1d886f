"""A trained model as one file that runs without this package: StableHLO, ONNX.

Both take uint8 images [n, height, width, 3] for any n, hold the parameters, and scale
the pixels themselves. A JSON file beside each says how to make such images out of any
others, and what the outputs stand for.
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

from mixer_jax.data.preprocess import EvalTransform, scale
from mixer_jax.files import replace_when_whole
from mixer_jax.model import MlpMixer

PLATFORMS = ("cpu", "cuda", "tpu")

_ONNX_LIMIT_BYTES = 2**31 - 1  # of a protobuf message, which an ONNX file is


class ExportError(ValueError):
    """A model that cannot be written in the format wanted."""


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
      CheckpointError: `path` is a URL.
      ValueError: the parameters are not for the model, or for another image size.
    """
    about = _describe(model, transform, class_names, features)
    function = _forward(model, params, features)
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
      ExportError: as above, the extra `onnx` is not installed, or the model is over
        2 GiB.
      CheckpointError: `path` is a URL.
      ValueError: the parameters are not for the model, or for another image size.
    """
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    if num_bytes > _ONNX_LIMIT_BYTES:
        raise ExportError(
            f"{path}: not written. The parameters have {num_bytes:,} bytes and an ONNX "
            f"file at most {_ONNX_LIMIT_BYTES:,}. Export to StableHLO."
        )
    function = _forward(model, params, features)
    about = _describe(model, transform, class_names, features)
    images = jax.ShapeDtypeStruct(("n", *_image_shape(transform)), jnp.uint8)
    # The converter's own convolution relies on rank promotion.
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


def _forward(
    model: MlpMixer, params: Mapping[str, Any], features: bool
) -> Callable[[jax.Array], jax.Array]:
    if features:
        model = model.clone(num_classes=None)
        params = {key: value for key, value in params.items() if key != "head"}

    def forward(images: jax.Array) -> Any:
        return model.apply({"params": params}, scale(images), train=False)

    return forward


def _image_shape(transform: EvalTransform) -> tuple[int, int, int]:
    return transform.crop, transform.crop, 3


def _describe(
    model: MlpMixer,
    transform: EvalTransform,
    class_names: Sequence[str] | None,
    features: bool,
) -> dict[str, Any]:
    """What the JSON file says."""
    if transform.permute:
        raise ExportError(
            "The run permuted its images' pixels (pp.permute), which an exported model "
            "cannot ask of its users."
        )
    is_logits = bool(model.num_classes) and not features
    width = model.num_classes if is_logits else model.hidden_dim
    return {
        "model": model.model_name or "Mixer",
        "gelu": model.gelu,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": ["n", *_image_shape(transform)],
            "channels": "RGB",
        },
        "output": {
            "name": "logits" if is_logits else "pre_logits",
            "dtype": "float32",
            "shape": ["n", width],
        },
        "preprocessing": {
            "evaluation": transform.evaluation,
            "crop": transform.crop,
            "resize": transform.resize,
            "steps": f"{transform.steps}; round to uint8. "
            "Scaling to [-1, 1] is in the model.",
        },
        "class_names": list(class_names) if class_names and is_logits else None,
        "jax_version": jax.__version__,
    }


def _write(
    path: str | os.PathLike[str], content: bytes | bytearray, about: dict[str, Any]
) -> None:
    """Writes both files, the model last: where that is, its description is too."""
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    with replace_when_whole(f"{os.fspath(path)}.json") as partial:
        partial.write_text(text, encoding="utf-8")
    with replace_when_whole(pathlib.Path(path)) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hides what jax2onnx prints, logs and warns of: its own workings."""
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
