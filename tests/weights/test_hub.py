import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, utils
from safetensors.numpy import save_file

from mixer_jax.weights import hub, huggingface, layout, published, pytorch, timm
from mixer_jax.weights.layout import CheckpointError

from .hub_server import COMMIT, FakeHub, fail, reply

REPOSITORY = "someone/mixer_tiny"
TOKEN = "hf_AbcdefGhijkl"
MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub that could be reached."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    at(monkeypatch, "http://127.0.0.1:9")
    yield folder
    utils.close_session()


def at(monkeypatch, url):
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(monkeypatch, folder):
    server = FakeHub()
    server.put(REPOSITORY, folder)
    at(monkeypatch, server.url)
    with contextlib.closing(server):
        yield server


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder as timm writes it, of a tiny Mixer."""
    folder = tmp_path / "written"
    folder.mkdir()
    timm.save_timm(folder / MODEL, tiny.tree(), "erf")
    config = {
        "architecture": "mixer_s32_224",
        "num_classes": 5,
        "model_args": {"img_size": [16, 16]},
        "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "num_classes": 5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files_in(cache):
    """The files that are kept, but for the hub's own notes."""
    return [
        path
        for path in cache.rglob("*")
        if path.is_file() and {"blobs", "snapshots"} & set(path.parts)
    ]


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "mean", "interpolation"),
    [
        ("mixer_b16_224.goog_in21k_ft_in1k", 1000, 59_880_472, 0.5, "pil_bicubic"),
        ("mixer_b16_224.goog_in21k", 21843, 75_908_739, 0.5, "pil_bicubic"),
        ("mixer_l16_224.goog_in21k_ft_in1k", 1000, 208_196_168, 0.5, "pil_bicubic"),
        ("mixer_l16_224.goog_in21k", 21843, 229_560_243, 0.5, "pil_bicubic"),
        ("mixer_b16_224.miil_in21k", 11221, 67_740_421, 0, "pil_bilinear"),
        ("mixer_b16_224.miil_in21k_ft_in1k", 1000, 59_880_472, 0, "pil_bilinear"),
    ],
)
def test_timm_names_are_known_without_a_network(
    name, classes, parameters, mean, interpolation, monkeypatch
):
    at(monkeypatch, "https://huggingface.co")
    model = hub.HUB_MODELS[f"timm/{name}"]
    for prefix in ("", "hf-hub:"):
        assert hub.is_hub_name(f"{prefix}timm/{name}")
        assert hub.hub_urls(f"{prefix}timm/{name}") == [
            f"https://huggingface.co/timm/{name}/resolve/main/{file}"
            for file in ("config.json", "model.safetensors")
        ]
    pinned = hub.hub_urls(f"timm/{name}@{COMMIT}")[1]
    assert pinned.endswith(f"/resolve/{COMMIT}/model.safetensors")
    assert model.sizes.num_classes == classes
    assert sum(map(math.prod, model.sizes.shapes().values())) == parameters
    transform = model.transform
    assert (transform.crop, transform.resize) == ((224, 224), (256, 256))
    assert transform.mean == (mean,) * 3
    assert transform.std == (0.5 if mean else 1.0,) * 3
    assert transform.interpolation == interpolation


def test_sizes_are_those_of_googles_files():
    """timm's goog_in21k are Google's parameters, whose file sizes are known."""
    for name in ("B_16", "L_16"):
        file = published.PUBLISHED[f"imagenet21k/Mixer-{name}"]
        timm_name = f"timm/mixer_{name.lower().replace('_', '')}_224.goog_in21k"
        assert hub.HUB_MODELS[timm_name].sizes == file.sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf-hub:someone/mixer", True),
        ("someone/mixer", True),
        ("someone/mixer@v1.0", True),
        ("someone/mixer@refs/pr/1", True),
        ("imagenet21k/Mixer-B_16", False),  # Google's
        ("imagenet21k/Mixer-Z_99", False),
        ("sam/anything", False),
        ("final.npz", False),
        ("someone/final.npz", False),
        ("someone/a.safetensors", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./a/b", False),
        ("~/b", False),
        ("gs://mixer_models/imagenet21k", False),
        ("https://huggingface.co/a/b", False),
        ("runs/digits", False),  # the folder runs is there, digits is not
        ("here/file", False),
        ("timm/mixer_b16_224.goog_in21k", True),  # though there is a folder timm
        ("timm/other", False),
        ("hf-hub:timm/other", True),
    ],
)
def test_what_is_a_hub_name(text, expected, tmp_path):
    for folder in ("runs", "timm", "here/file"):
        (tmp_path / folder).mkdir(parents=True)
    assert hub.is_hub_name(text) is expected


@pytest.mark.parametrize(
    "text",
    [
        *("hf-hub:", "hf-hub:bert", "hf-hub:a/b/c", "hf-hub:a--b/c", "hf-hub:a/b.git"),
        *("hf-hub:a/b-", f"hf-hub:a/{100 * 'b'}", "hf-hub:a/b@../../c", "hf-hub:a/.."),
    ],
)
def test_no_name_of_a_repository(text):
    with pytest.raises(CheckpointError, match=r"Expected hf-hub:owner/name, or with a"):
        hub.resolve_hub(text)


def test_fetched_once_and_kept(server, folder, tiny, assert_same, capfd):
    found = hub.resolve_hub(REPOSITORY)
    for name in ("config.json", MODEL):
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert_same(pytorch.read_pytorch(found / MODEL), tiny.tree())
    assert huggingface.read_folder_config(found).transform.mean == (0, 0, 0)
    assert server.names("GET") == ["config.json", MODEL]
    assert hub.resolve_hub(f"hf-hub:{REPOSITORY}@main") == found
    assert len(server.names("GET")) == 2
    assert server.requests[0][2]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in "".join(capfd.readouterr())


def test_revisions(server):
    server.revisions |= {"v1.0", "refs/pr/1"}
    for revision in ("v1.0", "refs/pr/1", COMMIT):
        assert hub.resolve_hub(f"{REPOSITORY}@{revision}").name == COMMIT
    del server.requests[:]
    hub.resolve_hub(f"{REPOSITORY}@{COMMIT}")
    assert not server.requests  # a commit never changes


def test_both_files_are_of_one_commit(server):
    hub.resolve_hub(REPOSITORY)
    (path,) = [x[1] for x in server.requests if x[0] == "GET" and MODEL in x[1]]
    assert f"/resolve/{COMMIT}/" in path


def test_large_files_come_from_another_host_without_the_token(server, folder):
    server.redirect(REPOSITORY, MODEL)
    found = hub.resolve_hub(REPOSITORY)
    assert (found / MODEL).read_bytes() == (folder / MODEL).read_bytes()
    (headers,) = [x[2] for x in server.requests if "/cdn/" in x[1]]
    assert "authorization" not in {name.lower() for name in headers}


def test_without_a_network_the_cache_is_used(server, monkeypatch, caplog):
    found = hub.resolve_hub(REPOSITORY)
    at(monkeypatch, "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert hub.resolve_hub(REPOSITORY) == found
    (message,) = caplog.messages
    assert f"{REPOSITORY}@main: taken from the cache, since" in message
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        assert hub.resolve_hub(REPOSITORY) == found
    assert not caplog.messages


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_message_says_what_to_put_where(
    offline, cache, monkeypatch, caplog
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    at(monkeypatch, "http://someone:secret@127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"config\.json could not be fetched") as error:
        hub.resolve_hub(f"{REPOSITORY}@v1")
    assert time.monotonic() - start < 5  # huggingface_hub would try for 25 s
    text = str(error.value)
    for file in ("config.json", MODEL):
        assert f"\n  http://127.0.0.1:9/{REPOSITORY}/resolve/v1/{file}" in text
    assert "put them in a folder, and give that folder here" in text
    assert (
        f"hf download {REPOSITORY} config.json {MODEL} --revision v1 --local-dir"
        in text
    )
    assert not {"secret", TOKEN} & set(text.replace("@", ":").split(":"))
    assert not caplog.messages
    assert not cache.exists()


def broken(kind):
    """Returns what to do to the fake hub, for each mistake."""

    def put(name, content):
        return lambda server: server.files.update({(REPOSITORY, name): content})

    def answer(name, function):
        return lambda server: server.answers.update({(REPOSITORY, name): function})

    def cut(server):
        content = server.files[REPOSITORY, MODEL]
        answer(MODEL, lambda h: reply(h, content, sent=content[:300]))(server)

    def short(server):
        content = server.files[REPOSITORY, MODEL]
        size = {"Content-Length": str(len(content) + 5)}
        sizes = lambda h: size if h.command == "HEAD" else {}
        answer(MODEL, lambda h: reply(h, content, **sizes(h)))(server)

    def damaged(server):
        content = server.files[REPOSITORY, MODEL]
        answer(MODEL, lambda h: reply(h, content[:-1] + b"x", etag="0" * 64))(server)

    def truncated(server):
        server.files[REPOSITORY, MODEL] = server.files[REPOSITORY, MODEL][:-100]

    def no_model(server):
        del server.files[REPOSITORY, MODEL]

    def pickled(server):
        no_model(server)
        put("pytorch_model.bin", b"\x80\x02")(server)

    def no_config(server):
        del server.files[REPOSITORY, "config.json"]

    config = {"architecture": "vit_base_patch16_224", "num_classes": 5}
    transformers = {"model_type": "vit", "architectures": ["ViTModel"]}
    return {
        "cut": cut,
        "short": short,
        "damaged": damaged,
        "truncated": truncated,
        "a web page": put(MODEL, b"<!DOCTYPE html><html>Sign in</html>"),
        "no JSON": put("config.json", b"<!DOCTYPE html>"),
        "a Vision Transformer": put("config.json", json.dumps(config).encode()),
        "of transformers": put("config.json", json.dumps(transformers).encode()),
        "no model": no_model,
        "a pickle": pickled,
        "no config": no_config,
        "gated": answer("config.json", lambda h: fail(h, 403, "GatedRepo")),
        "bad token": answer(
            "config.json", lambda h: reply(h, b"", status=401, **BAD_TOKEN)
        ),
        "sign in": answer(
            "config.json",
            lambda h: reply(
                h, b"", status=302, Location="http://localhost:9/x?k=s3", **NO_COMMIT
            ),
        ),
        "a loop": answer(
            "config.json", lambda h: reply(h, b"", status=302, Location=h.path)
        ),
        "down": answer("config.json", lambda h: reply(h, b"", status=503)),
        "forbidden": answer(MODEL, lambda h: reply(h, b"", status=403)),
    }[kind]


NO_COMMIT = {"X-Repo-Commit": ""}
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"model.safetensors could not be fetched.*the connection was cut off"),
        ("short", r"model.safetensors could not be fetched.*should be of size"),
        ("damaged", r"model.safetensors arrived damaged: its SHA-256 is .*Try again"),
        ("truncated", r"no whole safetensors file but cut off or damaged"),
        ("a web page", r"no whole safetensors file but a web page"),
        ("no JSON", r"config.json is no JSON file"),
        (
            "a Vision Transformer",
            r"architecture is vit_base.*expected one of mixer_s32",
        ),
        ("of transformers", r"is .*[vV]i[tT].*, expected the config.json of a Mixer"),
        ("no model", r"there is no model.safetensors .*Is it a Mixer's\?"),
        ("a pickle", r"It has pytorch_model.bin, a pickle.*FOLDER/model.safetensors"),
        ("no config", r"no config.json .*Fetch the model.safetensors by itself"),
        ("gated", r"is gated: ask its owner at http://127.*hf auth login"),
        ("bad token", r"refused the token.*hf auth login"),
        ("sign in", r"what answered is no Hugging Face hub"),
        ("a loop", r"Exceeded \d+ redirects"),
        ("down", r"config.json could not be fetched.*503"),
        ("forbidden", r"model.safetensors could not be fetched.*403"),
    ],
)
def test_mistakes_of_a_hub_are_one_message_and_nothing_is_kept(
    kind, message, server, cache, caplog, capfd, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between tries
    broken(kind)(server)
    with pytest.raises((CheckpointError, OSError), match=f"(?s){message}") as error:
        hub.resolve_hub(REPOSITORY)
    assert REPOSITORY in str(error.value)
    shown = [str(error.value), caplog.text, *capfd.readouterr()]
    assert not any(secret in text for secret in (TOKEN, "k=s3") for text in shown)
    assert not caplog.messages
    # A config.json that is right may stay: without the other file it is no model.
    is_right = kind in {"cut", "short", "forbidden"}
    kept = {"snapshots": [], "blobs": []}
    for path in files_in(cache):
        kept[path.relative_to(cache).parts[1]].append(path.name)
    assert kept["snapshots"] == (["config.json"] if is_right else [])
    assert len(kept["blobs"]) == len(kept["snapshots"])
    # The next call does not take anything silently either.
    with pytest.raises((CheckpointError, OSError), match=f"(?s){message}"):
        hub.resolve_hub(REPOSITORY)


def test_unknown_repositories_and_revisions(server):
    with pytest.raises(OSError, match="someone/else is no file or folder here, and no"):
        hub.resolve_hub("someone/else")
    with pytest.raises(OSError, match="has no branch, tag or commit 'v9'"):
        hub.resolve_hub(f"{REPOSITORY}@v9")


def test_files_of_other_programs_stay_in_the_cache(server, cache):
    """A Vision Transformer that timm fetched is no Mixer, but not ours to delete."""
    config = json.dumps({"architecture": "vit_base_patch16_224"})
    server.files[REPOSITORY, "config.json"] = config.encode()
    huggingface_hub.hf_hub_download(REPOSITORY, "config.json")
    before = files_in(cache)
    with pytest.raises(CheckpointError, match="architecture is vit"):
        hub.resolve_hub(REPOSITORY)
    assert files_in(cache) == before


def test_a_wrong_file_that_was_there_is_found_in_loading(server, folder):
    """Such as one that another program fetched, of another model."""
    tensors = {"cls_token": np.zeros(3, np.float32)}
    save_file(tensors, folder / MODEL)
    server.put(REPOSITORY, folder)
    for name in ("config.json", MODEL):
        huggingface_hub.hf_hub_download(REPOSITORY, name)
    found = hub.resolve_hub(REPOSITORY)
    with pytest.raises(CheckpointError, match="a Vision Transformer"):
        pytorch.read_pytorch(found / MODEL)


def test_a_known_name_with_another_model(server, folder, cache, caplog, monkeypatch):
    name = "timm/mixer_b16_224.miil_in21k"
    server.put(name, folder)
    with pytest.raises(
        CheckpointError,
        match=r"parameters, expected the 67,740,421 of a .*11221 classes",
    ):
        hub.resolve_hub(name)
    assert not files_in(cache)
    known = hub.HUB_MODELS[name]
    sizes = layout.infer_model(pytorch.read_pytorch(folder / MODEL))
    monkeypatch.setitem(hub.HUB_MODELS, name, hub.HubModel(sizes, known.transform))
    with caplog.at_level(logging.WARNING):
        hub.resolve_hub(name)
    assert "images are made otherwise than in timm 1.0.31" in caplog.text


def test_the_command_line_and_the_variables_of_huggingface_hub(server, tmp_path):
    """In a process of its own, since the variables are read when it starts."""
    command = "from mixer_jax.cli import main; main()"
    variables = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    variables.pop("HF_TOKEN")
    inspect = lambda name, **more: subprocess.run(
        [sys.executable, "-c", command, "inspect", name],
        env=variables | more,
        capture_output=True,
        text=True,
    )
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = inspect(REPOSITORY, **more)
        assert found.returncode == 0, found.stderr
        assert "12 channels" in found.stdout
        assert "gelu erf" in found.stdout
    assert (tmp_path / "hf" / "hub" / "models--someone--mixer_tiny").is_dir()
    missing = inspect("hf-hub:someone/else")
    assert missing.returncode == 1
    assert "someone/else is no file or folder here, and no repository" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_a_token_that_no_request_can_hold_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x0bx")
    with pytest.raises(OSError, match="could not be fetched") as error:
        hub.resolve_hub(REPOSITORY)
    assert TOKEN not in str(error.value)


def test_an_endpoint_that_is_no_url(monkeypatch):
    at(monkeypatch, "http://[bad")
    with pytest.raises(OSError, match="could not be fetched"):
        hub.resolve_hub(REPOSITORY)
