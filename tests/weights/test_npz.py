import io
import logging
import os
import pickle
import re
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_jax
from mixer_jax.variants import Patches, get_variant
from mixer_jax.weights import layout, npz
from mixer_jax.weights.about import About, read_beside, write_beside


def test_older_layout_gives_the_published_tree_and_logits(golden, assert_same):
    params = mixer_jax.load_checkpoint(golden.path / "older_layout_checkpoint.npz")
    expected = golden.load("older_layout_expected.npz")
    assert_same(params, golden.tree(expected, "params/"))
    model = layout.infer_model(params).create_model()
    logits = model.apply({"params": params}, expected["images"], train=False)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)


def test_older_layout_keeps_axes_of_size_one_that_mean_something(
    tiny, tmp_path, assert_same
):
    patches = Patches((1, 1))
    sizes = tiny.sizes_with(patches=patches, num_tokens=1, image_channels=1)
    params = tiny.flat(sizes)
    older = {}
    for key, x in params.items():
        key = key.replace("stem", "embedding").replace("pre_head_", "Mixer/encoder_")
        key = key.replace("layer_norm", "norm")
        key = key.replace("MixerBlock_", "Mixer/encoderblock_")
        if "_mixing/" in key:
            key = key.replace("_mixing/", "_mixing_phase_0/")
            key = re.sub(r"Dense_(\d)/(\w+)", lambda m: f"{m[2]}{int(m[1]) + 1}", key)
            x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        older[key] = x
    np.savez(tmp_path / "older.npz", **older)
    assert "Mixer/encoderblock_1/token_mixing_phase_0/kernel2" in older
    assert "Mixer/encoder_norm/scale" in older
    params = layout.unflatten(params)
    assert_same(npz.read_checkpoint(tmp_path / "older.npz"), params)


@pytest.mark.parametrize("to_arrays", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_load_save_load_is_exact(golden, tmp_path, assert_same, to_arrays):
    first = npz.read_checkpoint(golden.path / "older_layout_checkpoint.npz")
    path = tmp_path / "new folder" / "file of any name"
    mixer_jax.save_checkpoint(path, jax.tree.map(to_arrays, first))
    assert_same(mixer_jax.load_checkpoint(path), first)
    with np.load(path) as file:  # anyone can read it, in the published layout
        assert file["MixerBlock_2/token_mixing/Dense_1/kernel"].shape == (10, 16)
        assert file["stem/kernel"].dtype == np.float32
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_saved_file_is_as_readable_as_any_other(tiny, tmp_path):
    mixer_jax.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    (tmp_path / "plain").touch()
    mode = lambda name: (tmp_path / name).stat().st_mode
    assert mode("a.npz") == mode("plain")


def test_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch, assert_same):
    path = tmp_path / "a.npz"
    mixer_jax.save_checkpoint(path, tiny.tree())

    def disk_full(file, **arrays):
        del arrays
        file.write(b"PK half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(OSError, match="No space left"):
        mixer_jax.save_checkpoint(path, tiny.tree(seed=1))
    assert_same(mixer_jax.load_checkpoint(path), tiny.tree())
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_changed_models_parameters_are_saved(tiny, tmp_path, assert_same):
    """Read as a bare file, they are named."""
    params = tiny.tree()
    params["MixerBlock_0"]["gate"] = np.ones(3, np.float32)
    mixer_jax.save_checkpoint(tmp_path / "a.npz", params)
    assert np.load(tmp_path / "a.npz")["MixerBlock_0/gate"].shape == (3,)
    with pytest.raises(ValueError, match=r"its workdir.*\n  MixerBlock_0/gate: found"):
        mixer_jax.load_checkpoint(tmp_path / "a.npz")
    found = npz.read_checkpoint(tmp_path / "a.npz")
    assert_same(found, params)


def test_save_refuses_what_could_not_be_loaded(tiny, tmp_path):
    def save(params, path=tmp_path / "a.npz"):
        mixer_jax.save_checkpoint(path, params)

    with pytest.raises(ValueError, match=r"below 'params'"):
        save({"params": tiny.tree()})
    with pytest.raises(ValueError, match=r"is bfloat16, expected float32"):
        save(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny.tree()))
    params = tiny.tree()
    params["stem"]["bias"][3] = np.inf
    with pytest.raises(ValueError, match=r"stem/bias has 1 NaN or infinite"):
        save(params)
    with pytest.raises(ValueError, match=r"Found no parameters, expected the tree"):
        save({})
    with pytest.raises(TypeError, match=r"nested dict of arrays; found list"):
        save([1.0])
    with pytest.raises(TypeError, match=r"stem: expected an array, found float"):
        save({"stem": 1.0})
    with pytest.raises(ValueError, match=r"gs://mine/a.npz is a URL"):
        save(tiny.tree(), "gs://mine/a.npz")
    assert os.listdir(tmp_path) == []


def write_float64(path, flat):
    np.savez(path, **{k: x.astype("float64") for k, x in flat.items()})


def write_pickled(path, flat):
    objects = {"stem/bias": np.array([{"a": 1}], dtype=object)}
    np.savez(path, allow_pickle=True, **(flat | objects))


def write_truncated(path, flat):
    np.savez(path, **flat)
    path.write_bytes(path.read_bytes()[:-5000])


def write_flipped_bit(path, flat):
    np.savez(path, **flat)
    content = bytearray(path.read_bytes())
    content[content.index(flat["head/kernel"].tobytes()) + 40] ^= 1
    path.write_bytes(content)


def write_not_finite(value):
    def write(path, flat):
        flat["MixerBlock_1/token_mixing/Dense_0/kernel"][2, 3] = value
        np.savez(path, **flat)

    return write


def write_vit(path, flat):
    keys = ["cls", "embedding/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"]
    np.savez(path, **dict.fromkeys(keys, flat["stem/bias"]))


def write_with(**changes):
    """Writes the parameters with each key changed or, for None, left out."""

    def write(path, flat):
        flat = flat | changes
        np.savez(path, **{k: x for k, x in flat.items() if x is not None})

    return write


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_member(name, content, method=zipfile.ZIP_STORED):
    """Writes the parameters with one member made by hand."""

    def write(path, flat):
        np.savez(path, **{k: x for k, x in flat.items() if k != name})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{name}.npy", content, method)

    return write


def npy_header(shape, dtype="<f4"):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


zeros = lambda *shape: np.zeros(shape, "float32")
BROKEN = {
    "truncated": (write_truncated, "cut off or damaged"),
    "flipped bit": (write_flipped_bit, "head/kernel cannot be read .*CRC-32"),
    "pickled entry": (write_pickled, "stem/bias cannot be read .*pickled objects"),
    "pickle": (
        lambda path, flat: path.write_bytes(pickle.dumps(flat)),
        "no npz file.*pickles are never read",
    ),
    "npy": (
        lambda path, flat: path.write_bytes(npy_bytes(flat["stem/bias"])),
        "no npz file",
    ),
    "empty": (lambda path, flat: path.touch(), "but an empty file"),
    "float64": (write_float64, r"MixerBlock_0/\S+ is float64, expected float32"),
    "NaN": (write_not_finite(np.nan), "MixerBlock_1/token_.* has 1 NaN or inf.* 96"),
    "infinity": (write_not_finite(-np.inf), "has 1 NaN or infinite"),
    "missing key": (
        write_with(**{"MixerBlock_0/LayerNorm_1/scale": None}),
        r"MixerBlock_0/LayerNorm_1/scale: missing, expected \(12,\)",
    ),
    "no stem": (write_with(**{"stem/kernel": None}), "no key ends in 'stem/kernel'"),
    "extra key": (
        write_with(**{"MixerBlock_99999/scale": zeros(3)}),
        r"MixerBlock_99999/scale: found \(3,\), expected no such key",
    ),
    "wrong shape": (
        write_with(**{"MixerBlock_0/LayerNorm_0/scale": zeros(13)}),
        r"MixerBlock_0/LayerNorm_0/scale: found \(13,\), expected \(12,\)",
    ),
    "wrong rank": (
        write_with(**{"MixerBlock_0/token_mixing/Dense_0/kernel": zeros(3)}),
        r"MixerBlock_0/token_mixing/Dense_0/kernel: found \(3,\), expected \(16, 6\)",
    ),
    "wrong head": (
        write_with(**{"head/bias": zeros(9)}),
        r"head/bias: found \(9,\), expected \(5,\)",
    ),
    "ViT": (write_vit, "looks like a Vision Transformer"),
    "unnamed arrays": (
        lambda path, flat: np.savez(path, flat["stem/bias"]),
        "Found arr_0: this looks like unnamed arrays",
    ),
    "huge shape": (
        write_member("head/bias", npy_header((2**40, 2**20)) + bytes(20)),
        r"head/bias cannot be read \(its 20 bytes are no array of .* \(1099511627776,",
    ),
    "negative shape": (
        write_member("head/bias", npy_header((-5, -1)) + bytes(20)),
        r"head/bias cannot be read \(its 20 bytes are no array of .* \(-5, -1\)",
    ),
    "nothing of a huge axis": (
        write_member("head/bias", npy_header((2**62, 0))),
        r"head/bias cannot be read \(its 0 bytes are no array of",
    ),
    "zip bomb": (
        write_member("bomb", npy_header((2**25,)) + bytes(2**27), zipfile.ZIP_DEFLATED),
        r"would become 134,\d+,\d+ bytes of arrays",
    ),
    "bz2": (
        write_member("bomb", npy_header((5,)) + bytes(20), zipfile.ZIP_BZIP2),
        "bomb cannot be read .*compressed in a way",
    ),
    "brackets in brackets": (
        write_member("bomb", b"\x93NUMPY\1\0\x40\x1f" + b"(" * 8000),
        "bomb cannot be read",
    ),
    "two of a key": (
        write_member("embedding/bias", npy_bytes(np.zeros(12, "float32"))),
        "stem/bias cannot stand beside the other arrays",
    ),
    "an array below an array": (
        write_member("stem/bias/x", npy_bytes(np.zeros(12, "float32"))),
        "stem/bias/x cannot stand beside the other arrays",
    ),
    "a path for a key": (
        write_member("../../etc/passwd", npy_bytes(np.zeros(12, "float32"))),
        r"\.\./\.\./etc/passwd: found \(12,\), expected no such key",
    ),
    "no arrays": (lambda path, flat: np.savez(path), "Found no keys at all"),
    "train state": (
        lambda path, flat: np.savez(path, **{f"params/{k}": flat[k] for k in flat}),
        "below 'params'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_input_is_named(tiny, tmp_path, kind):
    write, message = BROKEN[kind]
    path = tmp_path / "broken.npz"
    write(path, tiny.flat())

    def read_one_by_one(path):
        shapes = npz.read_shapes(path)
        expected = layout.infer_sizes(shapes, str(path)).shapes()
        layout.check_shapes(shapes, expected, str(path))

    for load in (mixer_jax.load_checkpoint, read_one_by_one):
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert str(error.value).startswith(str(path))


def test_an_array_without_values_is_kept(tiny, tmp_path, assert_same):
    tree = tiny.tree() | {"mine": {"a": np.zeros((0,), "float32")}}
    tree["mine"]["b"] = np.zeros((3, 0), "float32")
    npz.save_checkpoint(tmp_path / "a.npz", tree)
    assert_same(npz.read_checkpoint(tmp_path / "a.npz"), tree)


def test_folder_and_missing_file(tiny, tmp_path):
    npz.save_checkpoint(tmp_path / "mine.npz", tiny.tree())
    with pytest.raises(layout.CheckpointError, match=r"is a folder.*In it: mine.npz"):
        mixer_jax.load_checkpoint(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"is a folder.*In it: mine.npz"):
        npz.read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nine.npz: no such file.* mine.npz"):
        mixer_jax.load_checkpoint(tmp_path / "nine.npz")
    with pytest.raises(FileNotFoundError, match=r"nine.npz: no such file"):
        npz.read_checkpoint(tmp_path / "nine.npz")


def test_large_finite_values_are_no_mistake(tiny, tmp_path, assert_same):
    params = tiny.tree()
    params["head"]["kernel"][:] = np.finfo("float32").max
    npz.save_checkpoint(tmp_path / "a.npz", params)
    assert_same(npz.read_checkpoint(tmp_path / "a.npz"), params)


def test_compressed_file_loads(tiny, tmp_path, assert_same):
    np.savez_compressed(tmp_path / "a.npz", **tiny.flat())
    assert_same(npz.read_checkpoint(tmp_path / "a.npz"), tiny.tree())


def test_reading_makes_no_second_copy(tiny, tmp_path):
    sizes = layout.sizes_of(get_variant("S/32"), 1000)
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree(sizes))
    head_only = {"kernel": zeros(512, 3), "bias": zeros(3)}
    init = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.tree(sizes)
    ) | {"head": head_only}
    tracemalloc.start()
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert params["head"] == head_only
    assert peak_bytes < 1.1 * (tmp_path / "a.npz").stat().st_size


@pytest.mark.parametrize("name", ["S/32", "H/14"])
def test_variant_sizes_are_those_that_flax_initialises(name):
    model = mixer_jax.create_model(name, num_classes=10)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)["params"]
    params = jax.eval_shape(init, images)
    sizes = layout.sizes_of(get_variant(name), 10)
    assert sizes.shapes() == layout.shapes_of(params)
    assert layout.infer_model(params) == sizes
    assert (sizes.variant.name, sizes.image_size) == (name, (224, 224))


def test_infer_model_of_other_grids_patches_and_channels(tiny):
    sizes = tiny.sizes_with(
        patches=Patches((2, 5)), num_tokens=15, image_channels=4, num_classes=None
    )
    params = tiny.tree(sizes)
    found = layout.infer_model(params)
    assert found == sizes
    assert (found.variant.name, found.image_size) == (None, None)
    model = found.create_model(dropout_rate=0.1)
    assert (model.dropout_rate, model.num_classes) == (0.1, None)
    images = np.zeros((2, 6, 25, 4), "float32")
    assert model.apply({"params": params}, images, train=False).shape == (2, 12)
    square = tiny.sizes_with(patches=Patches((2, 5)), num_tokens=9)
    assert square.image_size == (6, 15)


@pytest.mark.parametrize("num_classes", [5, 9, None])
def test_load_pretrained_takes_all_but_the_head(
    tiny, tmp_path, assert_same, num_classes
):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    sizes = tiny.sizes_with(num_classes=num_classes)
    init = tiny.tree(sizes, seed=1)
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    assert jax.tree.structure(params) == jax.tree.structure(init)
    expected = tiny.tree()
    del expected["head"]
    if num_classes:
        expected["head"] = init["head"]
    assert_same(params, expected)


def test_load_pretrained_after_init(tiny, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    model = tiny.sizes.create_model(num_classes=3)
    images = jnp.ones((2, 16, 16, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", variables["params"])
    logits, state = model.apply(
        {"params": params}, images, train=False, mutable=["intermediates"]
    )
    assert not logits.any()  # the new head's kernel is zero
    assert state["intermediates"]["pre_logits"][0].any()


def test_load_pretrained_takes_a_file_without_a_head(tiny, tmp_path):
    headless = tiny.sizes_with(num_classes=None)
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree(headless))
    init = tiny.tree(seed=1)
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    assert params["head"]["kernel"] is init["head"]["kernel"]


def test_load_pretrained_of_another_image_size_says_which(tiny, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    init = tiny.tree(tiny.sizes_with(num_tokens=36))
    with pytest.raises(ValueError, match=r"In a run: --config.pp.crop=16\.") as error:
        mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    message = str(error.value)
    assert "on images of 16x16 pixels" in message
    assert "16 tokens (images of 16x16 pixels" in message
    assert "36 tokens (images of 24x24 pixels" in message
    key = "MixerBlock_1/token_mixing/Dense_0/kernel"
    assert f"{key}: found (16, 6), expected (36, 6)" in message
    assert "channel_mixing" not in message


def test_load_pretrained_of_images_that_are_not_square_says_how_many_patches(
    tiny, tmp_path
):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree(tiny.sizes_with(num_tokens=15)))
    with pytest.raises(ValueError, match="model on images of 15 patches, or") as error:
        mixer_jax.load_pretrained(tmp_path / "a.npz", tiny.tree())
    assert "In a run: --config.pp.crop=HEIGHT,WIDTH." in str(error.value)


def changed(tiny, **sizes):
    """The parameters of a changed model: more, fewer and other keys than published."""
    params = tiny.tree(tiny.sizes_with(**sizes), seed=1)
    for name, block in params.items():
        if name.startswith("MixerBlock_"):
            block["gamma"] = np.full(12, 0.1, np.float32)
            block["gate"] = {"kernel": np.ones((16, 16), np.float32)}
            del block["token_mixing"]
    del params["pre_head_layer_norm"]
    return params


def test_load_pretrained_into_a_changed_model(tiny, tmp_path, caplog, assert_same):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    init = changed(tiny, num_classes=3)
    with caplog.at_level(logging.INFO, logger="mixer_jax"):
        params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    expected = tiny.tree() | {"head": init["head"]}
    del expected["pre_head_layer_norm"]
    for i in (0, 1):
        block = expected[f"MixerBlock_{i}"]
        del block["token_mixing"]
        block |= {key: init[f"MixerBlock_{i}"][key] for key in ("gamma", "gate")}
    assert_same(params, expected)
    new, left_out = caplog.messages
    assert new.endswith(f": not in {tmp_path / 'a.npz'}")
    assert "2 x MixerBlock_*/gamma, 2 x MixerBlock_*/gate/kernel" in new
    assert "2 x MixerBlock_*/token_mixing/Dense_1/bias" in left_out
    assert "pre_head_layer_norm/scale" in left_out
    assert "head/" not in caplog.text
    assert "LayerNorm_0" not in caplog.text


def test_load_pretrained_takes_everything_of_the_same_changed_model(
    tiny, tmp_path, caplog, assert_same
):
    file, init = changed(tiny), changed(tiny, num_classes=3)
    file["MixerBlock_1"]["gamma"][:] = 0.7
    npz.save_checkpoint(tmp_path / "a.npz", file)
    with caplog.at_level(logging.INFO, logger="mixer_jax"):
        params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    assert_same(params, file | {"head": init["head"]})
    assert caplog.messages == []


def test_load_pretrained_of_other_blocks_altogether(tiny, tmp_path, assert_same):
    """A model without any MixerBlock takes the stem and the last norm."""
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    init = tiny.tree(seed=1)
    del init["MixerBlock_0"], init["MixerBlock_1"]
    init["Block_0"] = {"kernel": np.ones((12, 12), np.float32)}
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    taken = {key: tiny.tree()[key] for key in ("stem", "pre_head_layer_norm")}
    assert_same(params, init | taken)


def test_load_pretrained_never_drops_or_starts_what_should_fit(tiny, tmp_path):
    def load(file, init):
        npz.save_checkpoint(tmp_path / "a.npz", file)
        with pytest.raises(ValueError, match=r"a\.npz does not fit the model") as error:
            mixer_jax.load_pretrained(tmp_path / "a.npz", init)
        return str(error.value)

    # Another depth, of a changed model too.
    message = load(tiny.tree(), changed(tiny, num_blocks=1))
    assert "MixerBlock_1/LayerNorm_0/bias: found (12,), expected no such key" in message
    assert "MixerBlock_0" not in message
    message = load(tiny.tree(), changed(tiny, num_blocks=3))
    assert "MixerBlock_2/LayerNorm_0/bias: missing, expected (12,)" in message
    assert "gamma" not in message
    # A damaged file.
    damaged = tiny.tree()
    del damaged["MixerBlock_1"]["LayerNorm_1"]["scale"]
    message = load(damaged, changed(tiny))
    assert "MixerBlock_1/LayerNorm_1/scale: missing, expected (12,)" in message
    # A changed model's file, which the plain model has no use for.
    message = load(changed(tiny), tiny.tree())
    assert "MixerBlock_0/gate/kernel: found (16, 16), expected no such key" in message
    assert "MixerBlock_0/token_mixing/Dense_0/bias: missing, expected (6,)" in message
    # Another shape of what only changed models have.
    other = changed(tiny)
    other["MixerBlock_0"]["gamma"] = np.ones(3, np.float32)
    message = load(other, changed(tiny))
    assert "MixerBlock_0/gamma: found (3,), expected (12,)" in message
    # Another program's file.
    write_vit(tmp_path / "vit.npz", tiny.flat())
    with pytest.raises(ValueError, match="looks like a Vision Transformer"):
        mixer_jax.load_pretrained(tmp_path / "vit.npz", tiny.tree())


def test_load_pretrained_names_every_key_that_does_not_fit(tiny, tmp_path):
    path = tmp_path / "a.npz"
    npz.save_checkpoint(path, tiny.tree())
    fork = tiny.tree(tiny.sizes_with(num_blocks=1))
    fork["MixerBlock_0"]["gate"] = {"kernel": jnp.zeros((3, 4))}
    fork["stem"]["kernel"] = jnp.zeros((8, 8, 3, 12))
    with pytest.raises(ValueError, match=re.escape(f"{path} does not fit")) as error:
        mixer_jax.load_pretrained(path, fork)
    message = str(error.value)
    assert "MixerBlock_0/gate" not in message  # the model's own: it starts anew
    assert "stem/kernel: found (4, 4, 3, 12), expected (8, 8, 3, 12)" in message
    for key in tiny.flat():
        assert (f"{key}: found" in message) == (
            key.startswith("MixerBlock_1/") or key == "stem/kernel"
        )


def test_load_pretrained_of_more_than_the_params(tiny, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    with pytest.raises(ValueError, match=r"init_params: no Mixer.* below 'params'"):
        mixer_jax.load_pretrained(tmp_path / "a.npz", {"params": tiny.tree()})


def test_what_was_said_of_other_parameters_goes_with_them(tiny, tmp_path):
    path = tmp_path / "a.npz"
    npz.save_checkpoint(path, tiny.tree())
    write_beside(path, About({"gelu": "erf"}))
    before = path.read_bytes()
    with pytest.raises(layout.CheckpointError, match="not written"):
        npz.save_checkpoint(path, {})
    assert path.read_bytes() == before
    assert read_beside(path) == About({"gelu": "erf"})
    npz.save_checkpoint(path, tiny.tree())
    assert read_beside(path) == About()
    assert list(tmp_path.iterdir()) == [path]
