import pytest

from mixer_jax.data.sizes import (
    as_size,
    as_value,
    covers,
    fits_crop,
    in_proportion,
    is_size,
    parse_size,
    size_text,
)


def test_one_number_stands_for_both_sides():
    assert as_size(224) == as_size([224, 224]) == (224, 224)
    assert as_size((320, 224)) == (320, 224)
    assert as_value((224, 224)) == 224
    assert as_value((320, 224)) == (320, 224)


def test_sizes_as_texts():
    assert (size_text(224), size_text([320, 224])) == ("224x224", "320x224")
    assert (parse_size("224"), parse_size("320x224")) == ((224, 224), (320, 224))
    for text in ("", "x", "224x", "a", "1x2x3", "-1", "2.5", "224 x 224"):
        assert not is_size(text)
        with pytest.raises(ValueError, match="no size of images, such as 224 or 320x"):
            parse_size(text)


def test_sizes_compared_and_scaled():
    assert covers(256, 224)
    assert covers((320, 224), (320, 224))
    assert not covers(256, (320, 224))
    assert not covers((300, 300), (224, 320))
    assert fits_crop(256, 12)
    assert fits_crop((4096, 500), (320, 224))
    assert not fits_crop((4097, 500), (320, 224))
    assert not fits_crop(223, 224)
    assert in_proportion((256, 256), (224, 224), (320, 224)) == (366, 256)
