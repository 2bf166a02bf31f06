"""An HTTP server as a term of the reward, with a JSON request for each response.

The request is {"id", "prompt", "response", "answer"}, and the reply {"score": 0.5}.

config.reward.terms.server = dict(
  fn="examples/rewards/reward_server.py:request_scores",
  weight=1.0,
  kwargs=dict(url="http://localhost:9000/score"),
)
"""

import httpx


async def request_scores(samples, *, url):
  """Returns the score in the server's reply to each sample."""
  async with httpx.AsyncClient(timeout=None) as client:  # reward.timeout_s limits it.
    scores = []
    for sample in samples:  # One sample: async functions are called for each by itself.
      fields = {
        "id": sample.id,
        "prompt": sample.prompt,
        "response": sample.response,
        "answer": sample.answer,
      }
      reply = await client.post(url, json=fields)
      reply.raise_for_status()
      scores.append(reply.json()["score"])
    return scores
