import contextlib
import dataclasses
import http.server
import io
import math
import re
import threading
import traceback
import zipfile

import jax
import numpy as np
import pytest

import mixer_jax
from mixer_jax.run.loading import load_model
from mixer_jax.weights import layout, published
from mixer_jax.weights.about import About
from mixer_jax.weights.pytorch import save_pytorch
from mixer_jax.weights.reading import find_checkpoint, open_weights, read_weights

# Sizes by an older numpy, which wrote 20 bytes less for each entry.
OLDER = [name for name in published.PUBLISHED if name.startswith("imagenet")]
NAME = "imagenet21k/Mixer-T_4"


class Server:
    """Files on loopback; each name maps to (content, Content-Length, status)."""

    def __init__(self):
        self.files = {}
        self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                self.requests.append(handler.path)
                content, length, status = self.files.get(handler.path, (b"", 0, 404))
                handler.send_response(status)
                handler.send_header("Content-Length", str(length))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(self, *args):
                del args

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def put(self, name, content, length=None):
        self.files[f"/{name}.npz"] = (content, length or len(content), 200)

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(published, "BASE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with contextlib.closing(server):
        yield server


@pytest.fixture
def content(tiny, monkeypatch):
    """What the published file holds, which is a tiny one here."""
    content = to_bytes(tiny.flat())
    file = published.PublishedFile(len(content), tiny.sizes)
    monkeypatch.setitem(published.PUBLISHED, NAME, file)
    return content


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def to_bytes(flat):
    file = io.BytesIO()
    np.savez(file, **flat)
    return file.getvalue()


def files_in(folder):
    return sorted(
        x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()
    )


def test_fetched_once_and_kept_by_folder(
    tiny, server, content, cache, capsys, assert_same
):
    server.put(NAME, content)
    assert_same(mixer_jax.load_checkpoint(NAME), tiny.tree())
    assert "100%" in capsys.readouterr().err  # a progress bar
    assert files_in(cache) == [f"{NAME}.npz"]
    same = [
        f"gs://mixer_models/{NAME}.npz",
        f"gs://mixer_models/{NAME}",
        f"{server.url}{NAME}.npz",
    ]
    for name in same:
        assert published.resolve(name) == cache / f"{NAME}.npz"
    assert server.requests == [f"/{NAME}.npz"]


@pytest.mark.parametrize("folder", ["imagenet21k", "gs://mixer_models/imagenet21k/"])
def test_a_file_of_a_published_folder(server, content, cache, folder, tiny):
    server.put(NAME, content)
    for pretrained_dir in (folder, server.url + "imagenet21k"):
        name = find_checkpoint(pretrained_dir, "Mixer-T_4")
        assert read_weights(name).where == str(cache / f"{NAME}.npz")
    with pytest.raises(ValueError, match=r"imagenet21k/Mixer-B_32.*gsam/Mixer-S_8"):
        open_weights(find_checkpoint("imagenet21k", "B/32"))
    assert len(server.requests) == 1


def test_any_url(tiny, server, cache, assert_same):
    server.put("mine/a", to_bytes(tiny.flat()))
    server.put("yours/a", to_bytes(tiny.flat(seed=1)))
    url = server.url.replace("127.0.0.1", "localhost") + "{}/a.npz"
    for _ in range(2):
        assert_same(mixer_jax.load_checkpoint(url.format("mine")), tiny.tree())
        assert_same(mixer_jax.load_checkpoint(url.format("yours")), tiny.tree(seed=1))
    assert server.requests == ["/mine/a.npz", "/yours/a.npz"]
    assert len(files_in(cache)) == 2


def test_a_safetensors_file_by_its_url(tiny, server, cache, tmp_path, assert_same):
    save_pytorch(
        tmp_path / "a.safetensors", tiny.tree(), "timm", About({"gelu": "erf"})
    )
    content = (tmp_path / "a.safetensors").read_bytes()
    server.files["/mine/a.safetensors"] = (content, len(content), 200)
    url = f"{server.url.replace('127.0.0.1', 'localhost')}mine/a.safetensors"
    assert_same(mixer_jax.load_checkpoint(url), tiny.tree())
    assert [x.rpartition(".")[2] for x in files_in(cache)] == ["safetensors"]
    server.files["/mine/b.safetensors"] = (content[:-9], len(content) - 9, 200)
    with pytest.raises(ValueError, match="did not send what it should"):
        mixer_jax.load_checkpoint(url.replace("/a.", "/b."))
    assert len(files_in(cache)) == 1


def test_a_changed_model_fetches_and_starts_from_a_published_file(
    tiny, server, content, cache, monkeypatch
):
    """Neither the check of a download nor that of its contents knows the model."""
    server.put(NAME, content)
    init, flat = tiny.tree(seed=1), tiny.flat()
    init["MixerBlock_0"]["gamma"] = np.ones(12, np.float32)
    monkeypatch.setattr(layout, "shapes_of_model", None)
    params = mixer_jax.load_pretrained(NAME, init)
    np.testing.assert_array_equal(params["stem"]["bias"], flat["stem/bias"])
    assert params["MixerBlock_0"]["gamma"] is init["MixerBlock_0"]["gamma"]
    assert files_in(cache) == [f"{NAME}.npz"]


SECRET = "X-Amz-Signature=" + 40 * "5ec7e7"


def test_presigned_urls_are_kept_under_short_names_without_their_signature(
    tiny, server, cache, assert_same
):
    server.put("mine/a b", to_bytes(tiny.flat()))
    server.files[f"/mine/a%20b.npz?{SECRET}&id=1"] = server.files["/mine/a b.npz"]
    server.files[f"/mine/a%20b.npz?{SECRET}&id=2"] = server.files["/mine/a b.npz"]
    url = f"{server.url}mine/a%20b.npz?{SECRET}&id="
    url = url.replace("127.0.0.1", "localhost")
    for _ in range(2):
        assert_same(mixer_jax.load_checkpoint(f"{url}1"), tiny.tree())
    assert_same(mixer_jax.load_checkpoint(f"{url}2"), tiny.tree())
    assert len(server.requests) == 2
    first, second = files_in(cache)  # what another query gives may be another file
    assert re.fullmatch(r"urls/a_20b-[0-9a-f]{16}\.npz", first)
    assert first != second
    long = published._url_cache_path(f"{url}{300 * 'é'}/é.npz")
    assert len(long.name.encode()) < 128


def test_messages_hold_no_secrets_of_urls(tiny, server, cache, caplog):
    url = server.url.replace("127.0.0.1", "localhost") + f"mine/a.npz?{SECRET}"
    url = url.replace("//", "//me:pass5ec7e7@")

    def message(url):
        with pytest.raises((OSError, ValueError)) as info:
            load_model(url)
        lines = traceback.format_exception(info.value)
        assert "5ec7e7" not in "".join(lines) + caplog.text
        return str(info.value)

    assert "/mine/a.npz?... could not be fetched: 404" in message(url)
    page = b"<html>Sign in</html>"
    server.files[f"/mine/a.npz?{SECRET}"] = (page, len(page), 200)
    assert "/mine/a.npz?... did not send what it should" in message(url)
    assert "only gs://mixer_models/ and" in message(f"s3://mine/a.npz?{SECRET}")
    bucket = f"{server.url}imagenet1k/Mixer-B_16.npz?{SECRET}"
    assert "?...: no such published file" in message(bucket)
    flat = tiny.flat(tiny.sizes_with(num_tokens=15))
    server.files[f"/mine/a.npz?{SECRET}"] = (to_bytes(flat), len(to_bytes(flat)), 200)
    assert "15 tokens" in message(url)
    server.close()
    url = url.replace("mine", "yours")  # the other one is kept
    assert "/yours/a.npz?... could not be fetched" in message(url)


@pytest.mark.parametrize("end", ["a.npz", "", "(1)", "a-"])
def test_queries_are_left_out_whatever_they_follow(end):
    shown = published.without_secrets(f"https://host/{end}?sig=5ec7e7&x=1")
    assert shown == f"https://host/{end}?..."


def test_damaged_downloads_never_count(tiny, server, content, cache, monkeypatch):
    def fails(error, match):
        for _ in range(2):  # nor are they found the second time
            with pytest.raises(error, match=match) as info:
                published.resolve(NAME)
            assert f"{server.url}{NAME}.npz" in str(info.value)
            assert files_in(cache) == []

    def serve(bytes_sent):
        server.put(NAME, bytes_sent)
        entry = published.PublishedFile(len(bytes_sent), tiny.sizes)
        monkeypatch.setitem(published.PUBLISHED, NAME, entry)

    half = content[: len(content) // 2]
    server.put(NAME, half, length=len(content))  # the connection breaks
    fails(OSError, r"put it at .*Mixer-T_4\.npz")
    server.put(NAME, half)
    fails(ValueError, rf"{len(half):,} bytes arrived, expected {len(content):,}")
    server.files.clear()
    fails(OSError, r"404.*Where this machine has no connection")

    # Of the right size, and wrong inside.
    serve(b"<html>" + content[6:])
    fails(ValueError, "did not send what it should")
    flat = tiny.flat()
    flat["head/bias"][1] = np.nan
    serve(to_bytes(flat))
    fails(ValueError, "head/bias has 1 NaN")
    serve(to_bytes(tiny.flat() | {"head/extra": np.zeros(3, "float32")}))
    fails(ValueError, "head/extra: unknown")
    serve(to_bytes(tiny.flat(tiny.sizes_with(num_classes=9))))
    fails(ValueError, r"and 9 classes; the published file.* and 5 classes")

    serve(content)
    assert published.resolve(NAME).read_bytes() == content


def test_interrupted_download_leaves_nothing(server, content, cache, monkeypatch):
    server.put(NAME, content)

    def interrupt(path, suffix, entry):
        assert suffix == ".npz"
        assert path.read_bytes() == content
        assert not (cache / f"{NAME}.npz").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(published, "_check_download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            published.resolve(NAME)
    assert files_in(cache) == []
    assert published.resolve(NAME).exists()


def test_offline_says_what_to_fetch_and_where_to_put_it(
    tiny, server, content, cache, assert_same
):
    server.close()
    with pytest.raises(OSError, match="could not be fetched") as error:
        mixer_jax.load_checkpoint(NAME)
    path = cache / f"{NAME}.npz"
    assert f"{server.url}{NAME}.npz" in str(error.value)
    assert f"{len(content):,} bytes" in str(error.value)
    assert str(path) in str(error.value)
    path.write_bytes(content)  # by hand, as told
    assert_same(mixer_jax.load_checkpoint(NAME), tiny.tree())


def test_file_of_another_size_in_the_cache_is_fetched_again(server, content, cache):
    server.put(NAME, content)
    path = cache / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content[:100])
    assert published.resolve(NAME).read_bytes() == content


def test_another_model_under_a_published_name(tiny, cache, content, monkeypatch):
    wrong = to_bytes(tiny.flat(tiny.sizes_with(num_classes=9)))
    entry = published.PublishedFile(len(wrong), tiny.sizes)
    monkeypatch.setitem(published.PUBLISHED, NAME, entry)
    path = cache / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"9 classes.*5 classes.*Delete the file"):
        mixer_jax.load_checkpoint(NAME)


def test_names_that_mean_nothing():
    with pytest.raises(ValueError, match=r"imagenet1k/Mixer-B_32: no such published"):
        published.resolve("gs://mixer_models/imagenet1k/Mixer-B_32")
    with pytest.raises(ValueError, match=r"s3://a/b.npz: only gs://mixer_models/"):
        published.resolve("s3://a/b.npz")
    with pytest.raises(FileNotFoundError, match=r"not the name.*sam/Mixer-B_32"):
        published.resolve("imagenet1k/Mixer-B_32")


def test_cache_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXER_JAX_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.cache_dir() == tmp_path / "somewhere"
    monkeypatch.delenv("MIXER_JAX_CACHE")
    assert published.cache_dir().name == "mixer_jax"


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_sizes_follow_from_the_shapes(name):
    """What np.savez writes: local header, npy header and data, directory entry."""
    file = published.PUBLISHED[name]
    num_bytes = 22  # end of the directory
    for key, shape in file.sizes.shapes().items():
        header = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        data = len(header.getvalue()) + 4 * math.prod(shape)
        num_bytes += 30 + 46 + 2 * len(f"{key}.npy") + data
        num_bytes += 0 if name in OLDER else 20
    assert num_bytes == file.num_bytes
    assert file.sizes.image_size == (224, 224)
    assert f"Mixer-{file.sizes.variant.name}".replace("/", "_") == name.split("/")[1]


def test_eleven_files_add_up_to_the_bucket():
    sizes = [file.num_bytes for file in published.PUBLISHED.values()]
    assert len(sizes) == 11
    assert sum(sizes) + 6 == 3_489_219_014  # a marker has 6 bytes
    heads = {n: f.sizes.num_classes for n, f in published.PUBLISHED.items()}
    assert {n for n in heads if heads[n] == 21843} == {
        "imagenet21k/Mixer-B_16",
        "imagenet21k/Mixer-L_16",
    }


@pytest.mark.parametrize(
    "name",
    [
        name if "Mixer-S" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in published.PUBLISHED
    ],
)
def test_file_of_the_published_shapes_loads_by_name(name, tiny, cache, assert_same):
    """Those who wrote the four older files left out 20 bytes of an entry's header."""
    file = published.PUBLISHED[name]
    flat = tiny.flat(file.sizes)
    path = cache / f"{name}.npz"
    path.parent.mkdir(parents=True)
    if name in OLDER:
        with zipfile.ZipFile(path, "w") as older:
            for key, array in flat.items():
                npy = io.BytesIO()
                np.save(npy, array)
                older.writestr(f"{key}.npy", npy.getbuffer())
    else:
        np.savez(path, **flat)
    assert path.stat().st_size == file.num_bytes
    assert_same(mixer_jax.load_checkpoint(name), tiny.tree(file.sizes))
    init = tiny.tree(dataclasses.replace(file.sizes, num_classes=10), seed=1)
    params = mixer_jax.load_pretrained(name, init)
    assert jax.tree.structure(params) == jax.tree.structure(init)
    assert params["head"]["kernel"] is init["head"]["kernel"]
    np.testing.assert_array_equal(params["stem"]["kernel"], flat["stem/kernel"])
