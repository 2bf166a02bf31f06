"""AMBER: both parts worked out by hand, and files of other layouts."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import amber, world_files

NOTES = [
  {"id": 1, "type": "generative", "truth": ["dog", "tree"], "hallu": ["cat", "sky"]},
  {"id": 2, "type": "generative", "truth": ["dog"], "hallu": ["cat"]},
  {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
  {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
  {"id": 5, "type": "discriminative-attribute-number", "truth": "yes"},
  {"id": 6, "type": "discriminative-attribute-state", "truth": "yes"},
  {"id": 7, "type": "discriminative-relation", "truth": "no"},
]
SAID = {
  "1": "A puppy, cats and a dog by the lake.",  # 4 mentions, 1 wrong; the lake is safe.
  "2": "A dog.",
  "3": "No, there is none.",
  "4": "Yes.",
  "5": "no",
  "6": "Yes, it is.",
  "7": "I cannot tell.",
}


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "query").mkdir()
  files.write(tmp_path / "annotations.json", NOTES)
  asked = [{"id": n["id"], "image": "AMBER_1.jpg", "query": str(n["id"])}
           for n in NOTES]  # fmt: skip
  files.write(tmp_path / "query" / "query_all.json", asked)
  related = {"dog": ["puppy"], "tree": [], "cat": ["kitten"], "sky": [], "lake": []}
  files.write(tmp_path / "relation.json", related)
  (tmp_path / "safe_words.txt").write_text("lake\n")
  return tmp_path


def run(folder, said=SAID):
  return files.run(amber, files.model(said), world_files.EXACT, files.config(folder))


def means(found, *names):
  return {name: (found.values[name].mean, found.values[name].n) for name in names}


def test_descriptions_are_measured_by_ratios_of_sums(folder):
  assert means(run(folder), "chair", "cover", "hal", "cog") == {
    "chair": (1 / 5, 2),
    "cover": (2 / 3, 2),  # Both dogs, and not the tree.
    "hal": (1 / 2, 2),
    "cog": (1 / 3, 2),
  }


def test_no_is_the_positive_class(folder):
  found = means(run(folder), "accuracy", "precision", "recall", "f1", "odd")
  assert found == {
    "accuracy": (2 / 5, 5),
    "precision": (1 / 2, 2),  # Of 3 and 5, to which "no" was said.
    "recall": (pytest.approx(1 / 3), 3),  # Of 3, 4 and 7, of which "no" is right.
    "f1": (pytest.approx(2 / 5), 4),
    "odd": (1 / 5, 5),
  }


def test_each_kind_has_its_own_measures(folder):
  found = run(folder).values
  assert found["existence.recall"].mean == 1 / 2
  assert found["existence.precision"].mean == 1
  assert found["attribute.accuracy"].mean == 1 / 2
  assert "attribute.recall" not in found  # No question's answer is no.
  assert found["relation.odd"].mean == 1 and found["relation.accuracy"].mean == 0


def test_what_was_not_answered_is_counted_and_not_scored(folder):
  found = run(folder, {"5": "No.", "1": "Grass."})
  assert found.counts["unanswered"] == 5 and found.values["accuracy"].n == 1
  assert "chair" not in found.values and found.values["cover"].mean == 0


@pytest.mark.parametrize(
  "name",
  ["annotations.json", "relation.json", "safe_words.txt", "query/query_all.json"],
)
def test_a_missing_file_says_where_to_get_it(folder, name):
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=f"{name}: AMBER comes from"):
    amber.load(files.config(folder))


@pytest.mark.parametrize(
  ("notes", "said"),
  [
    (NOTES[:-1], "annotations.json has no usable record of id 7"),
    ([*NOTES, NOTES[0]], "id 1 is there twice"),
    ([*NOTES[:-1], {"id": 7, "type": "x", "truth": "maybe"}], "got 'maybe'"),
    ([NOTES[0] | {"truth": ["fish"]}, *NOTES[1:]], "relation.json has no ['fish']"),
  ],
)
def test_a_bad_annotation_costs_its_query_alone(folder, notes, said):
  whole = amber.load(files.config(folder))
  files.write(folder / "annotations.json", notes)
  items = amber.load(files.config(folder), problems := [])
  assert len(items) >= len(whole) - 1 and [said in p.reason for p in problems] == [True]


def test_relations_of_another_layout_are_refused(folder):
  files.write(folder / "relation.json", ["dog"])
  with pytest.raises(ValueError, match="relation.json is not AMBER's"):
    amber.load(files.config(folder))
