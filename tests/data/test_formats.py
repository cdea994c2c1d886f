import zipfile

import pytest

from mixer_jax.data import formats
from mixer_jax.data.decode import decode
from mixer_jax.data.formats import ImageError, kind_of_file

FILES = {
    b"\x00\x00\x00\x18ftypheic\0\0": "a HEIC photograph",
    b"\x00\x00\x00\x18ftypmif1\0\0": "a HEIC photograph",
    b"\x00\x00\x00\x18ftypavif\0\0": "an AVIF image",
    b"\x00\x00\x00\x18ftypisom\0\0": "a video",
    b"\x1aE\xdf\xa3webm": "a video",
    b"RIFF\x00\x00\x00\x00AVI LIST": "a video",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:": "a Git LFS pointer",
    b"<!DOCTYPE html><html>": "a web page",
    b"\n  <html><head>": "a web page",
    b"<?xml version='1.0'?><svg width='1'>": "an SVG drawing",
    b"<?xml version='1.0'?><Error>AccessDenied": "an XML text",
    b"PK\x03\x04\x14\0": "a zip archive",
    b"\x1f\x8b\x08": "an archive",
    b"%PDF-1.7": "a PDF",
    b"8BPS\0\1": "a Photoshop file",
    b"\x00\x05\x16\x07\x00\x02": "a file of macOS",
    b"\xff\x0a\xfa": "a JPEG XL image",
    bytes(128) + b"DICM": "a DICOM file",
    b"\x93NUMPY\1\0": "a NumPy array",
    b'{"error": 404}': "a JSON text",
    b"Not found\n": "damaged or not an image: a text that begins 'Not found'",
    "нет\n".encode(): "damaged or not an image: a text that begins 'нет'",
    bytes(5000): "damaged or not an image: the file begins with zeros",
    b"\x81\xfe\x00\x01": r"damaged or not an image: the file begins with b'\x81\xfe",
}


@pytest.mark.parametrize("data", FILES, ids=FILES.values())
def test_files_that_are_no_images_are_called_what_they_are(data):
    assert kind_of_file(data).startswith(FILES[data])
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value).startswith(FILES[data])


def test_a_real_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.jpg", "w") as file:
        file.writestr("photo.jpg", b"x" * 100)
    with pytest.raises(ImageError, match="a zip archive; unpack it"):
        decode((tmp_path / "x.jpg").read_bytes())


def test_tags_that_point_behind_the_end_are_left_out():
    assert formats.tiff_pages(b"II*\0") == []
    assert formats.tiff_pages(b"II*\0\xff\xff\xff\xff") == []
    # A chain of pages that leads back to its start ends.
    loop = b"II*\0" + (8).to_bytes(4, "little") + bytes(2) + (8).to_bytes(4, "little")
    assert formats.tiff_pages(loop) == [{}]
