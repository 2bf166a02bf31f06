"""A tokenizer of the embedded world, from few texts: the shipped one takes longer."""

import pytest

from tools.pretraining import tokenizer


@pytest.fixture(scope="session")
def tok():
  return tokenizer.train(tokenizer.corpus(0, scenes=40), vocab=500)
