"""Model cards as the Hub's own library reads them back."""

import json

import pytest
from huggingface_hub import ModelCard

from configs import grpo_rank, ppo, rlaif_v
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.serving import model_card
from vlmrlaif_jax.stages.stage import load_stages

SFT, RLAIF_V, GRPO = "2402.03746", "2405.17220", "2510.02561"
RATES = {"kept": 5, "asked": 8, "truth_pairs": 4, "truth_agreement": 0.75}


@pytest.fixture
def card_of(tmp_path):
  """The card of a stage of a recipe, written to a file and read back."""

  def make(stage, recipe=ppo, kind="merged", *, files=None, **given):
    config = json.loads(recipe.get_config().to_json_best_effort())
    config["stages"] = runner.list_stages(recipe.get_config())
    files = {"config.json": config, **(files or {})}
    for name, content in files.items():
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_text(json.dumps(content))
    model_card.make_model_card(tmp_path, stage, kind, **given).save(
      tmp_path / "README.md"
    )
    return ModelCard.load(tmp_path / "README.md")

  return make


def test_every_trained_stage_has_a_paper():
  trained = [stage for stage in load_stages().values() if stage.steps]
  assert {"sft_long", "rm", "ppo"} <= {stage.name for stage in trained}
  assert [stage.name for stage in trained if not stage.paper] == []


@pytest.mark.parametrize(
  "stage, recipe, paper",
  [
    ("sft_short", ppo, SFT),
    ("sft_long", ppo, SFT),
    ("rm", ppo, SFT),
    ("ppo", ppo, SFT),
    ("dpo_2", rlaif_v, RLAIF_V),
    ("grpo", grpo_rank, GRPO),
  ],
)
def test_card_follows_the_paper_of_its_stage(card_of, stage, recipe, paper):
  text = card_of(stage, recipe).text
  (method,) = [line for line in text.splitlines() if "following" in line]
  assert f"https://arxiv.org/abs/{paper}" in method
  assert method.count("arxiv.org") == 1


def test_round_is_in_the_title(card_of):
  assert "DPO, round 2, following" in card_of("dpo_2", rlaif_v).text


@pytest.mark.parametrize(
  "kind, library", [("merged", "transformers"), ("adapter", "peft")]
)
def test_metadata_name_library_and_base_and_leave_the_license_open(
  card_of, kind, library
):
  data = card_of("ppo", kind=kind, base_model="llava-hf/llava-1.5-7b-hf").data
  assert data.library_name == library
  assert data.base_model == "llava-hf/llava-1.5-7b-hf"
  assert data.pipeline_tag == "video-text-to-text"
  assert data.license is None


def test_path_is_no_base_model(card_of):
  with pytest.raises(ValueError, match="base_model|repo"):
    card_of("ppo", base_model="/checkpoints/llava/7b")


def test_feedback_is_that_of_the_stages_up_to_the_exported_one(card_of):
  files = {"label/rates.json": RATES}
  sft = card_of("sft_long", files=files)
  assert "no feedback from a model" in sft.text and sft.data.tags == ["jax"]
  trained = card_of("ppo", files=files)
  assert "5 of 8 pairs" in trained.text and "75.0%" in trained.text
  assert trained.data.tags == ["jax", "rlaif"]


def test_feedback_of_rounds_is_that_of_claims(card_of):
  card = card_of("dpo_2", rlaif_v)
  assert "`claims_1`, `claims_2`: a model" in card.text
  assert "claims_3" not in card.text.split("## Config")[0]


def test_feedback_of_grpo_is_its_oracle(card_of):
  assert "oracle `reward_rank`" in card_of("grpo", grpo_rank).text


def test_reward_model_is_no_pipeline_and_has_no_code_for_videos(card_of):
  card = card_of("rm")
  assert card.data.pipeline_tag is None
  assert "reward_head.safetensors" in card.text and "```python" not in card.text


@pytest.mark.parametrize(
  ("stage", "kind", "said"),
  [
    ("ppo", "merged", "`vllm serve FOLDER"),
    ("ppo", "adapter", "PeftModel.from_pretrained("),
    ("rm", "merged", "`--config.model.reward_model_path=FOLDER`"),
  ],
)
def test_the_card_says_how_to_use_what_it_is_of(card_of, stage, kind, said):
  use = card_of(stage, kind=kind).text.split("## Use")[1].split("## Limits")[0]
  assert said in use


def test_summaries_of_finished_stages_are_listed(card_of):
  done = {"summary": {"loss": 0.12345, "pairs": 7}}
  card = card_of("ppo", files={"rm/done.json": done})
  assert "- `rm`: loss 0.123, pairs 7\n" in card.text


def test_evaluation_is_a_table_if_there_is_one(card_of):
  assert "has not been evaluated" in card_of("ppo").text
  stat = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
  policy = {"accuracy": stat}
  held_out = {
    "counts": {},
    "questions": 9,
    "videos": 3,
    "policies": {"sft": policy, "ppo": policy},
    "pair": ["sft", "ppo"],
    "difference": policy,
  }
  card = card_of("ppo", files={"eval/results.json": {"held_out": held_out}})
  assert "9 held-out questions about 3 videos" in card.text
  assert "|---|---|---|---|---|\n| accuracy | 50.0 [40.0, 60.0] |" in card.text
