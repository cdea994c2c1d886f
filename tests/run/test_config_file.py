"""What is wrong with a config file is said in one message, wherever it is read."""

import os
import subprocess
import sys

import pytest

from configs import digits
from mixer_jax.cli.app import UsageError
from mixer_jax.cli.runs import load_config
from mixer_jax.run.config import ConfigError, check_config

from ..test_train import ROOT, load, train

HEAD = "from configs import common\n\n\ndef get_config(argument=''):\n"
FILES = {
    "attribute": (
        HEAD + "    return common.get_modle('b16')\n",
        ":5: AttributeError: module 'configs.common' has no attribute 'get_modle'",
    ),
    "syntax": ("def get_config()\n    return 1\n", ":1: SyntaxError: expected ':'"),
    "import": ("import not_installed\n", ":1: ModuleNotFoundError: No module named"),
    "value": (HEAD + "    return int('ten')\n", ":5: ValueError: invalid literal"),
    "file": (
        HEAD + "    return open('/no/file')\n",
        ":5: FileNotFoundError: [Errno 2]",
    ),
    "key": (
        HEAD + "    config = common.get_config()\n    config.base_lrs = 1\n",
        ':6: AttributeError: Key "base_lrs" does not exist and cannot be added since '
        'the config is locked.\nDid you mean "base_lr" instead of "base_lrs"?',
    ),
    "type": (
        HEAD + "    config = common.get_config()\n    config.batch = 'many'\n",
        ":6: TypeError: Could not override field 'batch'",
    ),
    "called": (
        HEAD + "    return common.get_model('Mixer-Z_3')\n",
        "ValueError: No Mixer variant is called 'Mixer-Z_3'",
    ),
}


@pytest.fixture(params=FILES)
def broken(request, tmp_path):
    """A config file, and the message that it gives."""
    text, message = FILES[request.param]
    path = tmp_path / f"{request.param}.py"
    path.write_text(text)
    return path, message


def test_an_error_in_a_config_file_is_shown_with_its_line(broken):
    path, message = broken
    with pytest.raises(UsageError) as error:
        load_config(str(path), ["config.batch=8"])
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["attribute", "file"])
def test_train_py_shows_it_too(tmp_path, name):
    text, message = FILES[name]
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    done = train(f"--config={path}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: {path}{message}")
    assert "Traceback" not in done.stderr


def test_a_config_that_is_not_there():
    done = train("--config=configs/nope.py")
    assert done.returncode == 1
    assert "cannot be read: [Errno 2] No such file" in done.stderr
    assert "configs/nope.py" in done.stderr
    assert "Traceback" not in done.stderr


NUMBER, WHOLE = "a number, at least 0.", "a whole number, at least 1."
OVERRIDES = {
    # Keys that are not there.
    "base_lrs=1": "no key 'base_lrs'. Did you mean base_lr? configs/common.py lists",
    "lr=1": "no key 'lr'. Did you mean base_lr or lr_multipliers?",
    "batch_size=8": "no key 'batch_size'. Did you mean batch_eval or batch?",
    "crop=8": "no key 'crop'. Did you mean pp.crop?",
    "pp.crap=1": "no key 'pp.crap'. Did you mean pp.crop",
    "mode.gelu=erf": "no key 'mode.gelu'. Did you mean model.gelu?",
    "nopp.flip": "no key 'nopp.flip'. Did you mean pp.flip?",
    "pp.crop.x=1": "no key 'pp.crop.x'. Did you mean pp.crop?",
    "pp.area_range[0]=1": "no key 'pp.area_range[0]'. Did you mean pp.area_range",
    "x=": "no key 'x'. configs/common.py lists all keys.",
    "=": "no key ''. configs/common.py lists all keys.",
    # Groups of keys.
    "pp=crop": "pp is a group of keys and has no value of its own. Set the keys in it",
    "pp={'crop': 8}": "pp is a group of keys",
    "model=b16": "model is a group of keys",
    "model.patches=8": "as in --config.model.patches.size='(4, 4)'.",
    "mesh=None": "mesh is a group of keys",
    "evals=": "evals is a group of keys",
    # Values that are no such thing as the key has.
    "batch=many": f"batch is 'many'; expected {WHOLE}",
    "batch=true": f"batch is 'true'; expected {WHOLE}",
    "batch=1e3": f"batch is '1e3'; expected {WHOLE}",
    "batch=": f"batch is ''; expected {WHOLE}",
    "base_lr=True": f"base_lr is 'True'; expected {NUMBER}",
    "base_lr=0,1": f"base_lr is '0,1'; expected {NUMBER}",
    "base_lr=1e400": f"base_lr is inf; expected {NUMBER}",
    "base_lr=nan": f"base_lr is nan; expected {NUMBER}",
    "mixup_p=-0.1": f"mixup_p is -0.1; expected {NUMBER}",
    "label_smoothing=1.5": "label_smoothing is 1.5; expected a number, at least 0 and",
    "seed=-1": "seed is -1; expected a whole number from 0 to 2**32 - 1.",
    "seed=1e400": "seed is '1e400'; expected a whole number from 0 to 2**32 - 1.",
    "pp.flip=maybe": "pp.flip is 'maybe'; expected True or False.",
    "pp.crop=0": "pp.crop is 0; expected a whole number, at least 1, or two for",
    "pp.crop=8x12": "pp.crop is '8x12'; expected a whole number, at least 1, or two",
    "pp.mean=half": "pp.mean is 'half'; expected a number from 0 to 1, or three, for",
    "pp.randaugment=2": "pp.randaugment is (2,); expected (layers, magnitude)",
    "pp.area_range=(1,": "pp.area_range is '(1,'; expected two numbers, the smaller",
    "model.patches.size=8": "model.patches.size is (8,); expected two whole numbers",
    "optim_dtype=fp16": "optim_dtype is 'fp16'; expected one of float32, bfloat16.",
    "lr_multipliers=(('head/(', 1.0),)": "expected pairs (regular expression, factor)",
    # None, as a flag has it.
    "tfds_data_dir=None": "tfds_data_dir is 'None'; expected a folder, or None (in a",
    "tfds_data_dir=none": "tfds_data_dir is 'none'; expected a folder, or None (in a",
    "pretrained_dir=null": "To start from scratch: --config.pretrained_dir=''",
    "pp.test=null": "pp.test is 'null'; expected a split",
    "dataset=None": "dataset is 'None'; expected a text that is not empty.",
    "model.dtype=None": "expected one of float32, bfloat16, or no flag at all for what",
    "grad_norm_clip=None": "grad_norm_clip is 'None'; expected a number, at least 0; 0",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_named_with_what_is_expected(override):
    with pytest.raises((UsageError, ConfigError)) as error:
        check_config(load_config(digits.__file__, [f"config.{override}"]))
    assert OVERRIDES[override] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "texts", [("(0.1, 1.0)", "(0.2, 1.0)"), ("0.1", "0.9"), ("0.1", "0.2", "0.9")]
)
def test_a_tuple_that_is_given_twice_is_refused(texts):
    overrides = [f"config.pp.area_range={x}" for x in texts]
    with pytest.raises(UsageError, match=f"is given {len(texts)} times: ") as error:
        load_config(digits.__file__, overrides)
    assert " and ".join(texts) in str(error.value)


def test_of_other_keys_the_last_value_counts():
    config = load_config(digits.__file__, ["config.seed=1", "config.seed=2"])
    assert config.seed == 2


def test_a_config_anywhere_may_import_ours_and_a_module_beside_it(tmp_path):
    """Of a package that is installed, read from any folder."""
    (tmp_path / "exp").mkdir()
    path = tmp_path / "exp" / "mine.py"
    path.write_text(
        "import beside\nfrom configs import digits\n\n\ndef get_config():\n"
        "    config = digits.get_config()\n    config.base_lr = beside.LR\n"
        "    return config\n"
    )
    (tmp_path / "exp" / "beside.py").write_text("LR = -1.0\n")
    where = {"cwd": tmp_path, "PYTHONPATH": ""}
    expected = "base_lr is -1.0; expected a number, at least 0."
    done = train(f"--config={path}", path=str(ROOT / "train.py"), **where)
    assert done.stderr == f"ConfigError: {expected}\n"
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "from mixer_jax import cli\n"
        "sys.path.pop(0)  # an installed package is found otherwise\n"
        "cli.main()"
    )
    for command in (["data", "preview", path], ["plan", "--config", path]):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *command]
            + ["--topology=local"] * (command[0] == "plan"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        )
        assert done.stderr == f"UsageError: {expected}\n"
    assert [x.name for x in tmp_path.iterdir()] == ["exp"]


def test_sound_configs_are_read():
    assert load("digits", "--config.base_lr=1").base_lr == 1.0
