"""A rule as a term of the reward: short responses.

config.reward.terms.brevity = dict(
  fn="examples/rewards/brevity.py:score_brevity", weight=0.5, kwargs=dict(words=12)
)
"""


def score_brevity(samples, *, words=12):
  """Returns 1 for a response of at most `words` words, and less for a longer one."""
  counts = [len(sample.response.split()) for sample in samples]
  return [min(words / max(count, 1), 1.0) for count in counts]
