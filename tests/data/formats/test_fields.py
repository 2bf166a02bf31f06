"""Keys that change the meaning of a record are errors; other keys are metadata."""

import pytest

from vlmrlaif_jax.data.formats.fields import REJECTED, WEIGHTS, check_fields


@pytest.mark.parametrize("key", sorted(REJECTED))
def test_key_that_changes_the_meaning_is_an_error(key):
  with pytest.raises(ValueError, match=f'it has "{key}": '):
    check_fields({key: ["x"]})
  check_fields({key: []})


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [0, False, 0.5, [1, 0]])
def test_weight_of_a_record_is_an_error(key, value):
  with pytest.raises(ValueError, match=f'it has "{key}": '):
    check_fields({key: value})
  check_fields({key: 1})


@pytest.mark.parametrize(
  "row",
  [
    {"timestamps": [1, 2]},
    {"clip": [1, 2]},
    {"segment": [[1, 2]]},
    {"label": True},
    {"loss": False},
  ],
)
def test_value_of_a_kind_is_an_error(row):
  with pytest.raises(ValueError, match="it has"):
    check_fields(row)


@pytest.mark.parametrize(
  "row",
  [
    {"timestamp": "2024-01-01", "label": "dog", "segment": "train", "duration": 3.5},
    {"data_source": "0_30_s", "chosen_score": 5, "metadata": {"fps": 30}, "split": "a"},
  ],
)
def test_metadata_is_no_error(row):
  check_fields(row)
