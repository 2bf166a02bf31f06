"""Limits of a run's videos in its export: transformers reads the same frames."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from tests.helpers.processor_oracle import Call, run_calls
from vlmrlaif_jax.data.processors.interface import Processor
from vlmrlaif_jax.huggingface import families
from vlmrlaif_jax.serving import export_files

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"size": {"height": 28, "width": 28}, **HALF}
TOTAL, RATE, SIZE = 100, 10.0, (60, 90)  # Frames, frames per second, height and width.


class Case(NamedTuple):
  """The files of a base, and the limits of a run."""

  image: dict
  video: dict | None  # None for the config of the image processor.
  limits: tuple[float, int, int]
  config: dict = {}


QWEN2 = {
  "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14,
  "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 401408,
  **HALF,
}  # fmt: skip
CASES = {
  "qwen3_vl": Case(
    {**QWEN2, "patch_size": 16},
    {
      "video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16,
      "temporal_patch_size": 2, "merge_size": 2, **HALF,
      "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    },
    (1.0, 8, 8 * 64 * 64),
  ),
  "qwen2_5_vl": Case(
    QWEN2, None, (1.0, 6, 6 * 56 * 84), {"vision_config": {"tokens_per_second": 2}}
  ),
  "llava_onevision": Case(
    {"image_processor_type": "LlavaOnevisionImageProcessor", **SQUARE},
    {"video_processor_type": "LlavaOnevisionVideoProcessor", **SQUARE},
    (0.0, 5, 0),
    {
      "vision_config": {"image_size": 28, "patch_size": 14},
      "text_config": {"hidden_size": 8},
    },
  ),
  "smolvlm": Case(
    {
      "image_processor_type": "SmolVLMImageProcessor",
      "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, **HALF,
      "video_sampling": {
        "fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}
      },
    },
    None,
    (0.5, 4, 0),
    {"vision_config": {"image_size": 32, "patch_size": 8}, "scale_factor": 2},
  ),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Name -> the processor of a run, and the folder of its export."""
  made: dict[str, tuple[Processor, object]] = {}
  for name, case in CASES.items():
    base, out = (tmp_path_factory.mktemp(f"{name}_{x}") for x in ("base", "out"))
    (base / "config.json").write_text(json.dumps({"model_type": name}))
    for kind, config in (("", case.image), ("video_", case.video)):
      if config is not None:
        (base / f"{kind}preprocessor_config.json").write_text(json.dumps(config))
    processor = families.read_processor(base, {"model_type": name, **case.config})
    processor = processor.limit(*case.limits)
    export_files.copy_files(out, base, export_files.OWN_TEMPLATE)
    export_files.write_limits(out, base, processor)
    made[name] = processor, out
  return made


@pytest.mark.parametrize("name", CASES)
def test_limits_are_read_again(exported, name):
  processor, folder = exported[name]
  config = {"model_type": name, **CASES[name].config}
  assert families.read_processor(folder, config) == processor


def test_limits_are_written_into_a_joint_config(tmp_path):
  case = CASES["qwen3_vl"]
  joint = {"image_processor": case.image, "video_processor": case.video, "other": 1}
  (tmp_path / "processor_config.json").write_text(json.dumps(joint))
  config = {"model_type": "qwen3_vl"}
  processor = families.read_processor(tmp_path, config).limit(*case.limits)
  export_files.write_limits(tmp_path, tmp_path, processor)
  assert families.read_processor(tmp_path, config) == processor
  assert json.loads((tmp_path / "processor_config.json").read_text())["other"] == 1
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.torchvision
def test_transformers_reads_the_frames_of_the_run(exported):
  pixels = np.random.default_rng(0).integers(0, 256, (TOTAL, *SIZE, 3), np.uint8)
  metadata = dict(total_num_frames=TOTAL, fps=RATE, duration=TOTAL / RATE)
  given = dict(videos=[pixels], video_metadata=[metadata], return_metadata=True)
  calls = [
    Call(
      "AutoVideoProcessor.from_pretrained",
      {"pretrained_model_name_or_path": str(folder)},
      given,
    )
    for _, folder in exported.values()
  ]
  results = run_calls(calls)
  for (name, (processor, _)), out in zip(exported.items(), results, strict=True):
    (found,) = out["video_metadata"]
    want = processor.sample_frames(TOTAL, RATE)
    np.testing.assert_array_equal(found.frames_indices, want, err_msg=name)
    assert len(want) < 10, name
    if "video_grid_thw" in out:
      grid = processor.choose_grid(*SIZE, len(want))
      assert out["video_grid_thw"][0].tolist() == list(grid), name
