"""Small datasets, and the changed model, that tests make."""

import importlib.util
import io
import itertools
import os
import pathlib
import struct
import subprocess
import types
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from mixer_jax.data.dataset import Source

REPOSITORY = pathlib.Path(__file__).parents[1]


def encode(image: np.ndarray, ending: str = ".png") -> bytes:
    return cv2.imencode(ending, image[..., ::-1])[1].tobytes()


def photographs() -> list[np.ndarray]:
    """scikit-learn's two photographs, uint8 [427, 640, 3]."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def write_folder(root: pathlib.Path, images: dict[str, int]) -> pathlib.Path:
    """Writes `n` crops of photographs under each "split/class"."""
    rng = np.random.default_rng(0)
    endings = [".jpg", ".PNG", ".webp", ".JPEG"]
    for i, (folder, count) in enumerate(images.items()):
        (root / folder).mkdir(parents=True)
        for j in range(count):
            top, left = rng.integers(0, 300, 2)
            crop = photographs()[i % 2][top : top + 90, left : left + 120]
            ending = endings[j % 4]
            (root / folder / f"{j:03}{ending}").write_bytes(
                encode(crop, ending.lower())
            )
    return root


def touch_folder(root: pathlib.Path, images: dict[str, int]) -> pathlib.Path:
    """Makes `n` empty files 0.png … under each "split/class": enough for a listing."""
    for folder, count in images.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}.png").touch()
    return root


def gating_fork(folder: pathlib.Path) -> str:
    """mixer_jax/model.py with the change of docs/fork.md, made in `folder`."""
    copy = folder / "mixer_jax" / "model.py"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((REPOSITORY / "mixer_jax" / "model.py").read_bytes())
    subprocess.run(
        ["git", "apply", REPOSITORY / "tests" / "forks" / "gating.diff"],
        cwd=folder,
        # In a folder of a repository, git would look for the file at its root.
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        check=True,
    )
    return copy.read_text()


def import_gating_fork(folder: pathlib.Path) -> types.ModuleType:
    """That module, imported from a new folder."""
    gating_fork(folder)
    path = folder / "mixer_jax" / "model.py"
    spec: Any = importlib.util.spec_from_file_location("gating", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiff(
    pixels: bytes, width: int, height: int, tags: dict[int, tuple[int, ...]], order="<"
) -> bytes:
    """A TIFF of one uncompressed strip; `tags` says what is not grey with 8 bits."""
    tags = {
        256: (width,), 257: (height,), 258: (8,), 259: (1,), 262: (1,), 273: (0,),
        277: (1,), 278: (height,), 279: (len(pixels),),
    } | tags  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    more = b"".join(struct.pack(f"{order}{len(x)}I", *x) for x in tags.values())
    tags[273] = (start + len(more),)
    entries, values = b"", b""
    for tag, x in sorted(tags.items()):
        content = struct.pack(f"{order}{len(x)}I", *x)
        if len(x) > 1:
            values, content = (
                values + content,
                struct.pack(f"{order}I", start + len(values)),
            )
        entries += struct.pack(f"{order}HHI", tag, 4, len(x)) + content
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    head = mark + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + values.ljust(len(more), b"\0") + pixels


def _overwritten(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def _garbage(data: bytes, start: int, length: int) -> bytes:
    return _overwritten(data, start, np.random.default_rng(0).bytes(length))


ZEROED = "zeros from the middle on"

# What befalls image files, each from a whole JPEG, PNG or WebP file's contents.
DAMAGES = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in half": lambda data: data[: len(data) // 2],
    "last bytes missing": lambda data: data[:-2],
    ZEROED: lambda data: _overwritten(
        data, len(data) // 2, bytes(len(data) - len(data) // 2)
    ),
    "all zeros": lambda data: bytes(len(data)),
    "garbage in the header": lambda data: _garbage(data, 4, 200),
    "text": lambda data: b"<html><body>404 Not Found</body></html>\n",
}


def write_mixed_folder(
    root: pathlib.Path,
    count: int,
    damaged: int = 0,
    photos: list[np.ndarray] | None = None,
) -> set[str]:
    """Writes `count` crops of photographs as {train,test}/photo_<i>/<n>.<ending>.

    The endings are .jpg, .png and .webp, a fifth is for testing, and the sizes differ.

    Args:
      root: a new folder.
      count: how many files.
      damaged: how many of them to damage, as DAMAGES says, in turn.
      photos: what to cut from, one photograph a class; default: `photographs`.

    Returns:
      The paths of the damaged files.
    """
    rng = np.random.default_rng(0)
    photos = photos or photographs()
    victims = rng.choice(count, damaged, replace=False).tolist()
    kinds = dict(zip(victims, itertools.cycle(DAMAGES), strict=False))
    paths = set()
    for i in range(count):
        photo = photos[i % len(photos)]
        height, width = rng.integers(40, 160, 2)
        top = rng.integers(photo.shape[0] - height)
        left = rng.integers(photo.shape[1] - width)
        kind = kinds.get(i)
        # WebP has neither checksums nor an end marker: zeros in its pixels go unseen.
        ending = (".jpg", ".png", ".webp")[i % (2 if kind == ZEROED else 3)]
        data = encode(photo[top : top + height, left : left + width], ending)
        split = "test" if i // len(photos) % 5 == 4 else "train"
        path = root / split / f"photo_{i % len(photos)}" / f"{i:04}{ending}"
        if kind:
            data = DAMAGES[kind](data)
            paths.add(str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return paths


def labels(source: Source) -> list:
    return [source[i].label for i in range(len(source))]


def names(source: Source) -> set[str]:
    return {source[i].name for i in range(len(source))}


def prepare_tfds(data_dir: str) -> None:
    """Prepares the dataset `tiny_shapes` as array_record, without TensorFlow."""

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3)),
                        "label": tfds.features.ClassLabel(names=["low", "high"]),
                        "real_label": tfds.features.Sequence(
                            tfds.features.ClassLabel(names=["low", "high"])
                        ),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {
                "train": self._generate_examples(40),
                "test": self._generate_examples(14),
            }

        def _generate_examples(self, count):
            for i in range(count):
                level = np.random.default_rng(i).integers(0, 128, (20, 30, 3), np.uint8)
                # Bytes, since encoding an array is what TFDS needs TensorFlow for.
                image = io.BytesIO(encode(level + np.uint8(128 * (i % 2))))
                several = [[], [i % 2], [0, 1]][i % 3]  # none, the label, or both
                yield i, {"image": image, "label": i % 2, "real_label": several}

    builder = TinyShapes(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
