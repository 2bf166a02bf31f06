"""CHAIR: mentions, files and scores worked out by hand."""

import json

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import chair, world_files

TABLE = "dog, puppy\nhot dog, frankfurter\nknife\nperson, woman, people\nbus\n"


@pytest.fixture
def table(tmp_path):
  path = tmp_path / "synonyms.txt"
  path.write_text(TABLE)
  return path


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("A puppy and a dog.", ["dog", "dog"]),
    ("Hot dogs, not a hot day: dogs.", ["hot dog", "dog"]),
    ("Two women with knives wait for buses.", ["person", "knife", "bus"]),
    ("People.", ["person"]),
    ("A dogged hotdog.", []),
    ("", []),
  ],
)
def test_mentions_are_the_longest_words_in_either_number(table, text, found):
  assert chair.find_mentions(text, chair.read_synonym_table(table)) == found


@pytest.mark.parametrize(
  ("word", "many"),
  [("box", "boxes"), ("berry", "berries"), ("toy", "toys"), ("potato", "potatoes"),
   ("leaf", "leaves"), ("bench", "benches"), ("policeman", "policemen")],
)  # fmt: skip
def test_regular_plurals_are_mentions(word, many):
  assert chair.find_mentions(
    f"Some {many}.", chair.make_synonym_table({"x": [word]})
  ) == ["x"]


def test_a_word_of_two_classes_is_refused(table):
  table.write_text("dog, pet\ncat, pet\n")
  with pytest.raises(ValueError, match="'pet' belongs to the classes 'dog' and 'cat'"):
    chair.read_synonym_table(table)


def config(path, table, annotations=()):
  made = files.config(path)
  made.update(synonyms=str(table), annotations=annotations)
  return made


def record(name, question, *objects):
  return {"image_id": name, "question": question, "objects": list(objects)}


SAID = {
  "1?": "A dog sees a knife and knives.",  # 3 mentions, 2 wrong; 1 of 2 there.
  "2?": "A puppy.",  # 1 mention, none wrong; 1 of 1 there.
  "3?": "Nothing here.",  # None; 0 of 1 there.
}


@pytest.fixture
def path(tmp_path):
  rows = [record("a", "1?", "dog", "bus"), record("b", "2?", "puppy"),
          record("c", "3?", "person"), record("d", "4?", "person")]  # fmt: skip
  return files.write(tmp_path / "halbench.json", rows)


def test_scores_are_ratios_of_sums(path, table):
  found = files.run(chair, files.model(SAID), world_files.EXACT, config(path, table))
  means = {name: (value.mean, value.n) for name, value in found.values.items()}
  assert means == {
    "chair_s": (1 / 2, 2),
    "chair_i": (2 / 4, 2),
    "recall": (2 / 4, 3),
    "words": (pytest.approx((7 + 2 + 2) / 3), 3),
  }
  assert found.counts == {"cases": 4, "unanswered": 1, "unjudged": 0, "unparsed": 0}


def test_nothing_is_measured_of_responses_that_mention_nothing(path, table):
  found = files.run(
    chair, files.model({"1?": "Hm."}), world_files.EXACT, config(path, table)
  )
  assert set(found.values) == {"recall", "words"}


def test_what_cocos_files_name_by_category_or_caption_is_there(tmp_path, table):
  path = tmp_path / "halbench.jsonl"
  path.write_text('{"image_id": 42, "question": "1?", "image": "aGk="}\n\n')
  instances = {"categories": [{"id": 7, "name": "dog"}],
               "annotations": [{"image_id": 42, "category_id": 7}]}  # fmt: skip
  captions = {"annotations": [{"image_id": 42, "caption": "Knives beside buses."}]}
  given = tuple(
    str(files.write(tmp_path / name, rows))
    for name, rows in [("instances.json", instances), ("captions.json", captions)]
  )
  [item] = chair.load(config(path, table, given))
  assert item.objects == {"dog", "knife", "bus"}
  assert item.question.video == "videos/COCO_val2014_000000000042.jpg"


@pytest.mark.parametrize(
  ("row", "said"),
  [
    ({"image_id": "a"}, "record 1: it has no .'question'"),
    ({"image_id": "a", "question": "?"}, 'has neither "objects" nor a record in'),
    (record("a", "?", "cat"), "the table of synonyms has no 'cat'"),
    (["a"], "record 1: it is not an object"),
  ],
)
def test_other_layouts_are_refused(tmp_path, table, row, said):
  path = files.write(tmp_path / "halbench.json", [row])
  with pytest.raises(ValueError, match=said):
    chair.load(config(path, table))


def test_missing_files_say_where_to_get_them(tmp_path, path, table):
  with pytest.raises(FileNotFoundError, match="no file of synonyms.*LisaAnne"):
    chair.load(config(path, tmp_path / "none.txt"))
  with pytest.raises(FileNotFoundError, match="no annotations at.*cocodataset"):
    chair.load(config(path, table, (str(tmp_path / "none.json"),)))
  with pytest.raises(FileNotFoundError, match="no file at.*Object HalBench"):
    chair.load(config(tmp_path / "none.json", table))


@pytest.mark.parametrize("rows", [[], {}, {"annotations": [{"image_id": 1}]}])
def test_annotations_of_another_layout_are_refused(path, table, tmp_path, rows):
  odd = tmp_path / "odd.json"
  odd.write_text(json.dumps(rows))
  with pytest.raises(ValueError, match="odd.json is not COCO's"):
    chair.load(config(path, table, (str(odd),)))
