"""A small part of the damaged inputs; `python -m tests.fuzz.program` reads all."""

import pytest

from tests.fuzz import program


@pytest.mark.parametrize("kind", program.KINDS)
def test_damaged_inputs_are_read_or_refused_by_name(kind, tmp_path):
  outcome = program.run(kind, tmp_path, seed=1, share=0.1)
  assert not outcome.findings
  assert sum(outcome.counts.values()) >= 0.1 * program.COUNTS[kind]
