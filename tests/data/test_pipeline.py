"""From files to splits and to the rows of a step."""

import json

import numpy as np
import pytest

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.data.video import MediaList

VIDEOS = [f"clips/v{i}.mp4" for i in range(10)]


def row(number, answer="A ring.", **fields):
  turns = [{"from": "human", "value": f"<video>\nWhat is in {number}?"}]
  turns += [{"from": "gpt", "value": answer}] if answer else []
  return {"id": f"r{number}", "video": VIDEOS[number % 10], "conversations": turns,
          **fields}  # fmt: skip


@pytest.fixture
def config(tmp_path):
  """A user's own data: a JSON file and a folder of videos, two questions on each."""
  (tmp_path / "videos" / "clips").mkdir(parents=True)
  for name in VIDEOS:
    (tmp_path / "videos" / name).touch()
  made = pipeline.default_config()
  made.records = write(tmp_path, "records", [row(i) for i in range(20)])
  made.videos = str(tmp_path / "videos")
  return made


def write(folder, name, rows):
  (folder / f"{name}.json").write_text(json.dumps(rows))
  return str(folder / f"{name}.json")


def load(config, folder, seed=0):
  return pipeline.load_splits(config, folder / "world", seed=seed)


def ids(examples):
  return [example["id"] for example in examples]


def test_own_records_are_split_by_video(config, tmp_path):
  config.holdout = 0.3
  splits, problems = load(config, tmp_path)
  assert problems == []
  assert (len(splits.sft), len(splits.benchmark)) == (14, 6)
  assert splits.prompts == splits.sft
  assert not {e["video"] for e in splits.sft} & {e["video"] for e in splits.benchmark}
  assert splits.sft[0]["video"].endswith(".mp4")


def test_own_files_for_prompts_and_benchmark_are_used(config, tmp_path):
  config.prompts = write(tmp_path, "prompts", [row(i, answer="") for i in (20, 21)])
  config.benchmark = write(tmp_path, "benchmark", [row(30)])
  splits, _ = load(config, tmp_path)
  assert ids(splits.prompts) == ["r20", "r21"] and splits.prompts[0]["answer"] == ""
  assert ids(splits.benchmark) == ["r30"]
  assert len(splits.sft) == 20


def test_prompts_for_labels_are_those_for_rl_or_others(config, tmp_path):
  config.prompts = write(tmp_path, "prompts", [row(i, answer="") for i in (20, 21)])
  splits, _ = load(config, tmp_path)
  assert ids(splits.labels) == ["r20", "r21"]
  config.label_prompts = write(
    tmp_path, "labels", [row(i, answer="") for i in (40, 41)]
  )
  splits, _ = load(config, tmp_path)
  assert ids(splits.prompts) == ["r20", "r21"] and ids(splits.labels) == ["r40", "r41"]


def test_prompts_are_drawn_at_random_up_to_a_number(config, tmp_path):
  every, _ = load(config, tmp_path)
  config.max_prompts, config.max_label_prompts = 5, 7
  splits, _ = load(config, tmp_path)
  again, _ = load(config, tmp_path)
  names = ids(splits.prompts)
  assert len(names) == 5 and len(splits.labels) == 7 and splits == again
  assert names == [name for name in ids(every.prompts) if name in names]
  assert names != ids(every.prompts)[:5]
  assert splits.sft == every.sft


def test_benchmark_is_measured_by_answers_or_truth(config, tmp_path):
  truth = {"kind": "count", "answer": "Two."}
  rows = [row(30), row(31, answer="", truth=truth), row(32, answer="")]
  config.benchmark = write(tmp_path, "benchmark", rows)
  splits, problems = load(config, tmp_path)
  assert ids(splits.benchmark) == ["r30", "r31"]
  assert problems == [("r32", "it has no answer to compare responses with", "")]


def test_what_is_wrong_with_a_record_is_told_and_the_rest_is_used(config, tmp_path):
  rows = [row(0), row(1, answer=""), row(2) | {"video": "gone.mp4"}, row(3)]
  config.records = write(tmp_path, "records", rows)
  splits, problems = load(config, tmp_path)
  assert sorted(ids(splits.sft) + ids(splits.benchmark)) == ["r0", "r3"]
  assert [problem.id for problem in problems] == ["r1", "r2"]
  assert "gone.mp4" in problems[1].reason


def test_file_without_a_usable_record_is_an_error_that_says_why(config, tmp_path):
  config.records = write(tmp_path, "records", [row(0, answer="")])
  said = r"no usable record in .*\n.*\n  records.json: r0: .*no answer"
  with pytest.raises(ValueError, match=said):
    load(config, tmp_path)


@pytest.mark.parametrize("field", ["records", "videos"])
def test_what_is_not_there_is_an_error(config, tmp_path, field):
  config[field] = str(tmp_path / "no_such.json")
  with pytest.raises(FileNotFoundError, match="no_such"):
    load(config, tmp_path)


def test_embedded_world_is_built_where_no_records_are_named(tmp_path):
  config = pipeline.default_config()
  config.sizes = dict(sft=2, prompts=1, benchmark=1)
  splits, _ = load(config, tmp_path)
  assert all(example["answer"] for example in splits.sft)
  assert all(not e["answer"] for e in [*splits.prompts, *splits.benchmark])
  assert {len({e["video"] for e in part}) for part in splits[:3]} == {1, 2}
  assert all("scene" in example["truth"] for example in splits.benchmark)
  assert load(config, tmp_path)[0] == splits


def test_the_world_has_videos_for_labels_of_their_own(tmp_path):
  config = pipeline.default_config()
  config.sizes = dict(sft=1, prompts=2, benchmark=1, labels=2)
  splits, _ = load(config, tmp_path)
  labels, prompts = ({e["video"] for e in x} for x in (splits.labels, splits.prompts))
  assert len(labels) == 2 and not labels & prompts
  assert all(not e["answer"] for e in splits.labels)


@pytest.mark.parametrize("count", [0, 1])
def test_a_shifted_benchmark_is_made_if_it_is_asked_for(tmp_path, count):
  config = pipeline.default_config()
  config.sizes = dict(sft=1, prompts=1, benchmark=1, shifted=count)
  splits, _ = load(config, tmp_path)
  assert len({example["video"] for example in splits.shifted}) == count
  assert (tmp_path / "world" / "videos" / "shifted").exists() == bool(count)


def examples(videos):
  return [{"id": f"e{i}", "video": video} for i, video in enumerate(videos)]


def test_hold_out_takes_videos_and_loses_nothing():
  given = examples(VIDEOS * 3)
  rest, held = pipeline.split_held_out(given, 0.2, seed=0)
  assert len({e["video"] for e in held}) == 2 and len(held) == 6
  assert sorted(ids(rest + held)) == sorted(ids(given))
  assert not {e["video"] for e in rest} & {e["video"] for e in held}


def test_parts_of_one_video_are_held_out_together():
  given = examples([f"{i}.mp4#t={start},9" for start in range(3) for i in range(5)])
  _, held = pipeline.split_held_out(given, 0.2, seed=0)
  assert len(held) == 3 and len({e["video"].partition("#")[0] for e in held}) == 1


def test_records_that_share_one_of_their_videos_are_held_out_together():
  pairs = [("a", "b"), ("b#t=1,2", "c"), ("d", "c"), ("e", "f")]
  given = examples([MediaList(pair) for pair in pairs] + ["a", "g"])
  for seed in range(4):
    _, held = pipeline.split_held_out(given, 0.3, seed=seed)
    assert ids(held) in (["e0", "e1", "e2", "e4"], ["e3"], ["e5"])
  sides = [pipeline.split_held_out(each, 0.3, seed=1) for each in (given, given[::-1])]
  assert ids(sides[0][1]) == ids(sides[1][1])[::-1]


def test_prompts_have_the_videos_of_their_first_question():
  mark, several = MEDIA_MARK, MediaList(("a", "b", "c"))
  turns = [
    [(f"{mark}A?", "x"), (f"{mark}B{mark}?", "y")],
    [(f"A{mark}{mark}?", "x"), (f"B?{mark}", "y")],
    [(f"A{mark}{mark}{mark}?", "x"), ("B?", "y")],
    [("A?", "x"), (f"{mark}{mark}{mark}B?", "y")],
  ]
  given = [{"id": f"e{i}", "video": several, "turns": x} for i, x in enumerate(turns)]
  prompts, [problem] = pipeline.keep_first_questions(given)
  assert [e["video"] for e in prompts] == ["a", MediaList(("a", "b")), several]
  assert [e["turns"] for e in prompts] == [turns[0][:1], turns[1][:1], turns[2]]
  assert problem.id == "e3" and "first question" in problem.reason


def test_hold_out_depends_on_the_seed_alone():
  takes = lambda seed, given: {
    e["video"] for e in pipeline.split_held_out(given, 0.3, seed=seed)[1]
  }
  given = examples(VIDEOS)
  assert takes(0, given) == takes(0, given[::-1])
  assert len({tuple(sorted(takes(seed, given))) for seed in range(5)}) > 1


def test_hold_out_takes_one_video_at_least():
  _, held = pipeline.split_held_out(examples(VIDEOS), 0.01, seed=0)
  assert len(held) == 1


def of_lengths(lengths):
  return [{"id": f"e{i}", "answer": "word " * n} for i, n in enumerate(lengths)]


def test_curriculum_goes_by_length():
  easy, hard = pipeline.split_curriculum(
    of_lengths([9, 2, 30, 3, 8]), short_share=0.5, threshold=0
  )
  assert (ids(easy), ids(hard)) == (["e1", "e3", "e4"], ["e0", "e2"])


def test_curriculums_threshold_counts_words():
  easy, hard = pipeline.split_curriculum(
    of_lengths([4, 5, 6]), short_share=0.0, threshold=5
  )
  assert (ids(easy), ids(hard)) == (["e0", "e1"], ["e2"])


def test_curriculum_of_equal_answers_is_easy_twice():
  easy, hard = pipeline.split_curriculum(
    of_lengths([4, 4]), short_share=0.5, threshold=0
  )
  assert easy == hard == of_lengths([4, 4])


def test_a_threshold_below_every_answer_is_refused():
  with pytest.raises(
    UserError, match="sft.threshold=3 leaves .* 2 answers has 4 words"
  ):
    pipeline.split_curriculum(of_lengths([4, 5]), short_share=0.5, threshold=3)


def test_a_curriculum_of_nothing_is_refused():
  with pytest.raises(UserError, match="no record is left to train on"):
    pipeline.split_curriculum([], short_share=0.5, threshold=0)


def test_to_hold_out_everything_is_refused():
  one = examples(["a.mp4", "a.mp4"])
  with pytest.raises(UserError, match="rm.holdout=0.1 .* 2 records are about 1"):
    pipeline.split_for_training(one, 0.1, 0, "rm.holdout")
  with pytest.raises(UserError, match="are about 2. .*or lower the share"):
    pipeline.split_for_training(examples(["a.mp4", "b.mp4"]), 0.9, 0, "rm.holdout")


def rows(step, *, count=12, size=4, seed=0):
  return pipeline.shuffled_row_indices(count, size, seed=seed, step=step).tolist()


def test_steps_of_an_epoch_hold_every_row_once():
  for epoch in range(3):
    seen = sum((rows(3 * epoch + i) for i in range(3)), [])
    assert sorted(seen) == list(range(12))


def test_every_epoch_has_its_own_order():
  orders = {str([rows(3 * epoch + i) for i in range(3)]) for epoch in range(4)}
  assert len(orders) == 4


def test_step_that_crosses_an_epoch_takes_from_both():
  seen = sum((rows(i, count=6) for i in range(3)), [])
  assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_rows_follow_from_seed_and_step_alone():
  later = rows(5)
  assert [rows(i) for i in range(6)][5] == later
  assert rows(5, seed=1) != later


def test_batch_larger_than_the_data_goes_on_to_the_next_epoch():
  seen = rows(0, count=3, size=6)
  assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


def test_no_data_is_an_error():
  with pytest.raises(ValueError, match="no records"):
    rows(0, count=0)


def encode(tok, given, *, answered, prompt_len=40, response_len=12):
  return pipeline.tokenize_examples(
    given, tok, tokenization.CONVERSATION_TEMPLATES["brief"],
    lay_out=lambda video: lay_out_features(4),
    prompt_len=prompt_len, response_len=response_len, answered=answered,
  )  # fmt: skip


TURNS = [("What is it?", "A ring."), ("Is it red?", "Yes.")]
TALK = {"id": "talk", "video": "v.mp4", "question": "What is it?", "answer": "A ring.",
        "turns": TURNS}  # fmt: skip
LONG = TALK | {"id": "long", "turns": [("What is it?", "ring " * 40)]}


def test_answered_examples_hold_all_their_turns(tok):
  kept, made, problems = encode(tok, [TALK], answered=True, response_len=40)
  assert (ids(kept), problems) == (["talk"], [])
  said = tok.decode(made.tokens[0][made.loss_mask[0]])
  assert said.strip() == "A ring.</s> Yes.</s>"


def test_answers_without_loss_are_part_of_the_prompt(tok):
  flagged = TALK | {"loss": [False, True]}
  _, made, _ = encode(tok, [flagged], answered=True, prompt_len=90)
  assert tok.decode(made.tokens[0][made.loss_mask[0]]).strip() == "Yes.</s>"
  prompt = made.tokens[0][made.mask[0] & ~made.loss_mask[0]]
  assert "A ring." in tok.decode(prompt[prompt >= 0])


def test_prompts_hold_the_first_question_and_nothing_to_learn(tok):
  _, made, _ = encode(tok, [TALK], answered=False, response_len=0)
  assert not made.loss_mask.any() and made.mask[0, -1]
  said = tok.decode([i for i in made.tokens[0][made.mask[0]] if i >= 0])
  assert said.endswith("What is it? ASSISTANT:")


def test_example_that_is_too_long_is_left_out_and_told_of(tok):
  kept, made, problems = encode(tok, [LONG, TALK], answered=True, response_len=40)
  assert ids(kept) == ["talk"] and len(made.tokens) == 1
  assert problems[0].id == "long" and "data.response_len 40" in problems[0].reason


def test_nothing_that_fits_makes_no_rows(tok):
  kept, made, _ = encode(tok, [LONG], answered=True)
  assert kept == [] and made.tokens.shape == (0, 52)


def test_holdout_of_a_seed_is_what_it_was():
  """A run that is resumed with another version must not mix up its splits."""
  _, held = pipeline.split_held_out(examples(VIDEOS), 0.3, seed=0)
  names = np.random.default_rng([0, 7]).permutation(sorted(VIDEOS))[:3]
  assert {e["video"] for e in held} == set(names)
