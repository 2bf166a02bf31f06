"""A tokenizer of the embedded world, from few texts: the shipped one takes longer."""

import pytest

from vlmrlaif_jax.data.world import tokenizer


@pytest.fixture(scope="session")
def tok():
  corpus = tokenizer.corpus
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizer, "corpus", lambda seed: corpus(seed, scenes=40))
    return tokenizer.train(0, vocab=500)
