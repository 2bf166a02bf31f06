"""The launcher: what it refuses, in which words, with which exit code."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from tests.helpers import several
from vlmrlaif_jax.core.files import flatten_settings
from vlmrlaif_jax.core.interrupts import EXIT_RESUMABLE
from vlmrlaif_jax.recipes import validation

ROOT = pathlib.Path(__file__).parents[2]
SFT, PPO = (str(ROOT / "configs" / name) for name in ("sft.py", "ppo.py"))


@pytest.fixture(scope="module")
def launcher():
  """launch/run.py as a module; flags can be defined only once in a process."""
  spec = importlib.util.spec_from_file_location("launcher", ROOT / "launch" / "run.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def refused(launcher, capsys, *argv):
  """What is said of a command line that ends in exit code 2 before anything is done."""
  with pytest.raises(SystemExit) as end:
    launcher.check_overrides(list(argv))
  assert end.value.code == 2
  return capsys.readouterr().err


def test_unknown_key_is_refused_with_a_near_one(launcher, capsys):
  said = refused(launcher, capsys, f"--config={SFT}", "--config.sft.batchsize=4")
  assert "no setting 'sft.batchsize'" in said and "sft.batch_size" in said


@pytest.mark.parametrize(
  "argv",
  [
    [f"--config={PPO}:7b", "--config.ppo.kl_coeff=1"],
    ["--config", PPO, "--config.ppo.kl_coeff", "1"],
  ],
)
def test_unknown_key_is_found_however_it_is_written(launcher, capsys, argv):
  said = refused(launcher, capsys, *argv)
  assert "no setting 'ppo.kl_coeff'; did you mean --config.ppo.kl_coef" in said


@pytest.mark.parametrize(
  "old, new",
  [
    ("benchmarks.names", "evaluate.names"),
    ("ppo.async_rollouts", "ppo.rollout.max_staleness"),
  ],
)
def test_the_new_name_of_a_setting_is_given(launcher, capsys, old, new):
  said = refused(launcher, capsys, f"--config={PPO}", f"--config.{old}=x")
  assert f"no setting '{old}'; it is now --config.{new}" in said


@pytest.mark.parametrize(
  "argv",
  [
    ["--ppo.kl_coef=0.1"],
    ["ppo.kl_coef=0.1"],
    ["--workdir=here", "ppo.kl_coef=0.1"],
    ["--workdir", "here", "ppo.kl_coef=0.1"],
  ],
)
def test_setting_without_config_is_refused_with_its_flag(launcher, capsys, argv):
  message = refused(launcher, capsys, f"--config={PPO}", *argv)
  assert "did you mean --config.ppo.kl_coef=0.1?" in message


def test_misspelt_setting_without_config_is_refused_with_a_near_flag(launcher, capsys):
  message = refused(launcher, capsys, f"--config={PPO}", "--ppo.kl_coeff=0.1")
  assert "did you mean --config.ppo.kl_coef " in message


@pytest.mark.parametrize("value", ["ppo.kl_coef=0.1", "seed=1"])
def test_values_of_flags_are_no_settings(launcher, value):
  launcher.check_overrides([f"--config={PPO}", "--workdir", value])


@pytest.mark.parametrize(
  ("recipe", "key", "suggestion"),
  [
    ("grpo", "grpo.num_generations", "grpo.samples"),
    ("grpo", "grpo.beta", "grpo.kl_coef"),
    ("ppo", "beta", "ppo.kl_coef"),
    ("dpo", "beta", "dpo.beta"),
    ("grpo", "grpo.max_completion_length", "data.response_len"),
    ("grpo", "max_prompt_length", "data.prompt_len"),
    ("ppo", "ppo.learning_rate", "ppo.optimizer.learning_rate"),
    ("rm", "rm.per_device_train_batch_size", "rm.batch_size"),
    ("dpo", "dpo.gradient_accumulation_steps", "dpo.microbatches"),
  ],
)
def test_names_of_trl_lead_to_ours(launcher, capsys, recipe, key, suggestion):
  path = ROOT / "configs" / f"{recipe}.py"
  message = refused(launcher, capsys, f"--config={path}", f"--config.{key}=1")
  assert f"no setting {key!r}; did you mean --config.{suggestion}" in message


def test_known_keys_pass(launcher):
  launcher.check_overrides(
    [f"--config={PPO}", "--config.seed=1", "--config.ppo.kl_coef=0.2"]
  )


def test_settings_of_other_recipes_are_unknown(launcher, capsys):
  said = refused(launcher, capsys, f"--config={SFT}", "--config.ppo.kl_coef=0.2")
  assert "no setting 'ppo.kl_coef'" in said


def test_unknown_preset_is_refused_with_those_there_are(launcher, capsys):
  said = refused(launcher, capsys, f"--config={SFT}:13b")
  assert "('tiny', '7b', 'tiny_qwen3vl', 'qwen3vl_2b'" in said and "'13b'" in said


def test_missing_recipe_is_refused_with_those_there_are(launcher, capsys):
  said = refused(launcher, capsys, "--config=configs/dpi.py")
  assert "no recipe at configs/dpi.py" in said and "ppo.py" in said


def test_name_of_a_recipe_leads_to_its_file(launcher, capsys):
  message = refused(launcher, capsys, "--config=ppo")
  assert message.endswith("did you mean configs/ppo.py?\n")


def test_only_recipes_are_choices(launcher):
  recipes = launcher.list_recipes()
  assert {"ppo.py", "eval.py", "pretrain.py", "benchmarks.py"} <= set(recipes)
  assert not {"__init__.py", "front.py", "prices.py"} & set(recipes)


def test_every_leaf_is_a_setting(launcher):
  keys = list(flatten_settings(launcher.load_recipe(SFT).to_dict()))
  assert {"seed", "mesh.fsdp", "data.sizes.sft", "sft.optimizer.b1"} <= set(keys)
  assert "sft" not in keys and "sft.optimizer" not in keys


def test_one_flag_sets_the_judge_of_every_stage(launcher, monkeypatch):
  argv = ["run", f"--config={ROOT / 'configs' / 'grpo.py'}"]
  argv += [
    "--config.evaluate.endpoint.model=other",
    "--config.judge.url=http://localhost/v1",
    "--config.judge.model=m",
    "--config.judge.temperature=1",
    "--config.judge.key_env=",
  ]
  monkeypatch.setattr(sys, "argv", argv)  # Flags of a config read overrides from it.
  launcher.check_overrides(argv[1:])
  parsed = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=parsed)
  parsed(argv)
  config = parsed["config"].value
  assert config.is_locked
  sections = (config.label, config.reward, config.grpo.oracle, config.evaluate)
  servers = [section.endpoint for section in sections]
  assert {each.url for each in servers} == {"http://localhost/v1"}
  assert [each.model for each in servers] == ["m", "m", "m", "other"]
  assert {(each.temperature, each.key_env) for each in servers} == {(1.0, "")}
  validation.check_recipe(config)


# As a user types it, all at once to save time.


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
  """(exit code, stdout, stderr) of each command line, by name."""
  workdir = tmp_path_factory.mktemp("run")
  lines = {
    "help": ["--help"],
    "unknown": [f"--config={SFT}", f"--workdir={workdir}/a", "--config.sede=1"],
    "7b": ["--config=configs/ppo.py:7b", f"--workdir={workdir}/b"],
    "without peers": [
      f"--config={SFT}",
      f"--workdir={workdir}/c",
      "--coordinator=localhost:1",
      "--processes=2",
      "--process=1",
      "--start_s=1",
    ],
  }
  command = [sys.executable, str(ROOT / "launch" / "run.py")]
  processes = {
    name: subprocess.Popen(
      [*command, *argv],
      cwd=ROOT,
      env=several.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for name, argv in lines.items()
  }
  said = {name: process.communicate() for name, process in processes.items()}
  assert list(workdir.iterdir()) == []  # Nothing was begun.
  return {name: (processes[name].returncode, *said[name]) for name in lines}


def test_help_says_how_to_run(typed):
  _, out, _ = typed["help"]
  assert "--config=configs/ppo.py[:preset] --workdir=DIR" in out
  assert "Folder of all outputs of the run." in out


def test_unknown_key_ends_the_program(typed):
  code, out, err = typed["unknown"]
  assert code == 2 and out == ""
  assert "no setting 'sede'; did you mean --config.seed" in err


def test_process_whose_peers_do_not_appear_ends_and_is_resumable(typed):
  code, _, err = typed["without peers"]
  assert code == EXIT_RESUMABLE
  assert err.index("--start_s=1") < err.index("error: this process was aborted")


def test_paper_preset_lists_every_missing_path_and_what_belongs_there(typed):
  code, _, err = typed["7b"]
  assert code == 2 and "Traceback" not in err
  for key in ("model.path", "model.reward_model_path", "data.records", "data.videos"):
    assert f"--config.{key}=" in err
  assert "LLaVA checkpoint in Hugging Face format" in err
  assert "the folder of the videos that the records name" in err
  assert "set these flags to your own paths" in err


@pytest.mark.parametrize(
  "text, steps", [("", range(0)), ("3", range(3, 4)), ("3-5", range(3, 6))]
)
def test_steps_of_a_trace(launcher, text, steps):
  assert launcher.parse_trace(text) == steps


@pytest.mark.parametrize("text", ["5-3", "x", "-2", "1,2"])
def test_steps_that_make_no_sense_are_refused(launcher, capsys, text):
  with pytest.raises(SystemExit) as end:
    launcher.parse_trace(text)
  assert end.value.code == 2
  assert f"not '{text}'" in capsys.readouterr().err
