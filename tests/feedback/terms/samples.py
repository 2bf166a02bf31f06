"""Samples for the tests of terms."""

from vlmrlaif_jax.feedback.terms.sample import Sample


def sample(**fields):
  """A response of three tokens that ends; fields replace its own."""
  own = dict(
    id="v", prompt="What?", response="A dog.", tokens=(7, 8, 2), stopped=True,
    max_tokens=6, answer="A dog.", record={}, video="v.mp4", seed=0,
  )  # fmt: skip
  return Sample(**{**own, **fields})
