"""A judge as a term of the reward: a server with OpenAI's chat completions API.

config.reward.terms.helpful = dict(
  fn="examples/rewards/judge.py:score_helpfulness",
  weight=1.0,
  kwargs=dict(url="http://localhost:8000/v1", model="NAME"),
)
"""

import os

import openai

from vlmrlaif_jax.feedback.replies.scores import parse_score

PROMPT = (
  "How helpful is this response to a question about a video? Write a score from 0 to "
  '10 as {{"score": 7}}.\nQuestion: {question}\nResponse: {response}'
)


async def score_helpfulness(samples, *, url, model):
  """Returns the judge's score from 0 to 1, None for a reply that cannot be read."""
  key = os.environ.get("OPENAI_API_KEY", "none")
  async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
    scores = []
    for sample in samples:  # One sample: async functions are called for each by itself.
      text = PROMPT.format(question=sample.prompt, response=sample.response)
      reply = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0.0
      )
      score = parse_score(reply.choices[0].message.content or "", high=10)
      scores.append(None if score is None else score / 10)
    return scores
