import pytest

from vlmrlaif_jax.core.markdown import markdown_table


def test_table_has_a_line_for_each_row():
  made = markdown_table([["a", 1], ["b", 2.5]], ["name", "n"])
  assert made == "| name | n |\n|---|---|\n| a | 1 |\n| b | 2.5 |"


def test_row_of_another_width_is_refused():
  with pytest.raises(ValueError, match="2 cells"):
    markdown_table([["a"]], ["name", "n"])
