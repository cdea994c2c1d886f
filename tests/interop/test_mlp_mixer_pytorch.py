"""Against mlp-mixer-pytorch itself: its state dict, both ways."""

import jax
import numpy as np
import pytest

from mixer_jax.weights import layout
from mixer_jax.weights.mlp_mixer_pytorch import MLP_MIXER_PYTORCH
from mixer_jax.weights.state_dict import read_header, read_params, save_state_dict

torch = pytest.importorskip("torch")
package = pytest.importorskip("mlp_mixer_pytorch")


@pytest.mark.parametrize(
    ("size", "channels", "options"),
    [
        (64, 3, {}),
        ((96, 64), 3, {"expansion_factor": 2, "expansion_factor_token": 1.3}),
        (64, 1, {}),
    ],
)
def test_state_dict_in_and_out(size, channels, options, randomize, tmp_path):
    from safetensors.torch import load_file, save_file

    model = package.MLPMixer(
        image_size=size,
        channels=channels,
        patch_size=16,
        dim=48,
        depth=3,
        num_classes=7,
        **options,
    )
    save_file(randomize(model).state_dict(), tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors", [MLP_MIXER_PYTORCH])
    params = read_params(tmp_path / "in.safetensors", header)

    height, width = (size, size) if isinstance(size, int) else size
    images = np.random.default_rng(0).standard_normal(
        (2, channels, height, width), np.float32
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    ours = layout.infer_model(params).create_model(**MLP_MIXER_PYTORCH.fields)
    apply = jax.jit(lambda x: ours.apply({"params": params}, x, train=False))
    np.testing.assert_allclose(
        apply(np.moveaxis(images, 1, -1)), expected, atol=1e-5, rtol=0
    )

    save_state_dict(tmp_path / "out.safetensors", params, MLP_MIXER_PYTORCH, {})
    state = load_file(tmp_path / "out.safetensors")
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    model.load_state_dict(state)
