"""Small datasets that tests make."""

import io
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds


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
                yield i, {"image": image, "label": i % 2}

    builder = TinyShapes(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
