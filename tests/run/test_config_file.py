"""What is wrong with a config file is said in one message, wherever it is read."""

import pytest

from mixer_jax.cli.app import UsageError
from mixer_jax.cli.runs import load_config

from ..test_train import load, train

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
    assert done.stderr.startswith(f"{path}{message}")
    assert "Traceback" not in done.stderr


def test_a_config_that_is_not_there():
    done = train("--config=configs/nope.py")
    assert done.returncode == 1
    assert "cannot be read: [Errno 2] No such file" in done.stderr
    assert "configs/nope.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.base_lrs=1", "no key 'base_lrs'\nDid you mean \"base_lr\" instead"),
        ("config.pp.crap=1", "no key 'crap'\nDid you mean \"crop\" instead"),
        ("config.mode.gelu=erf", "no key 'mode'\nDid you mean \"model\" instead"),
        ("config.pp.crop.x=1", "Attempting to lookup: pp.crop.x"),
        ("config.pp.area_range=(1,", "flag --config.pp.area_range=(1,: Error while"),
        ("config.batch=many", "flag --config.batch=many: invalid literal for int()"),
    ],
)
def test_a_wrong_value_of_the_command_line(override, message):
    from configs import digits

    with pytest.raises(UsageError) as error:
        load_config(digits.__file__, [override])
    assert message in str(error.value)


def test_sound_configs_are_read():
    assert load("digits", "--config.base_lr=1").base_lr == 1.0
