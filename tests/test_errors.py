"""What a `UserError` says it is about."""

import pytest

from ard_jax.errors import UserError, settings_of


@pytest.mark.parametrize(
    ("sentence", "key"),
    [
        ("depth is 0: give more.", "depth"),
        ("teacher.optimizer.clip is -1: give more.", "teacher.optimizer.clip"),
        ("data.image_size 9 is not a multiple of 2: choose one.", "data.image_size"),
        ("student.points has [4], which the store lacks.", "student.points"),
        ("--batch-sizes is 'x': give numbers.", "--batch-sizes"),
        ("The class folder a holds no images.", ""),
        ("/nowhere is not there: give a file.", ""),
    ],
)
def test_the_key_is_what_the_sentence_begins_with(sentence, key):
    assert UserError(sentence).key == key


def test_a_section_stands_before_a_modules_own_field():
    for raised, said in {
        "remat is 'x'.": "model.remat is 'x'.",
        "model.dtype is 'x'.": "model.dtype is 'x'.",
        "There is no such file.": "There is no such file.",
    }.items():
        with pytest.raises(UserError) as error, settings_of("model"):
            raise UserError(raised)
        assert str(error.value) == said
