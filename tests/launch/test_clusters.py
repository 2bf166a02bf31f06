"""The command lines that the cluster scripts build, as stand-ins write them down."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

from launch import supervisor
from vlmrlaif_jax import alarms, watch

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ["--config=configs/ppo.py:7b", "--workdir=/runs/a b"]
# Of launch/run.py: what would be met again, and what is worth another start.
FINAL = [1, 2, alarms.ALARMED]
AGAIN = [watch.STOPPED, 128 + 9]
NOT_OURS = [126, 127]  # Of a shell that finds no interpreter.
# Each writes a line of its arguments to $SAID, one after another in brackets.
WRITES = 'line=$(printf "[%s]" "${0##*/}" "$@"); echo "$line" >> "$SAID"\n'


@pytest.fixture
def call(tmp_path):
  """Runs a script beside stand-ins for programs, and tells what those were given."""

  def run(script, *arguments, programs, **env):
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
      (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
      (folder / name).chmod(0o755)
    said = tmp_path / "said"
    said.write_text("")
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
      [ROOT / "launch" / script, *arguments],
      env={"PATH": path, "SAID": str(said), "PYTHON": str(folder / "python"), **env},
      capture_output=True,
      text=True,
      timeout=60,
    )
    return done, said.read_text().splitlines()

  return run


# Slurm.

# Two nodes; what both of them end with is the step's code, the higher of the two.
SRUN = (
  WRITES
  + """
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))
"""
)
SCONTROL = WRITES + 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n'
SLURM = {
  "SLURM_JOB_ID": "40123",
  "SLURM_NNODES": "2",
  "SLURM_JOB_NODELIST": "node[7-8]",
  "SLURM_CPUS_ON_NODE": "96",
}


def slurm(call, *, code, state="RUNNING None", **env):
  """(what became of a job whose processes end with a code, their lines, others).

  Args:
    state: of the job by then, and why, as Slurm tells.
  """
  programs = {
    "srun": SRUN,
    "scontrol": SCONTROL,
    "squeue": f"{WRITES}echo {state}\n",
    "python": f"{WRITES}exit {code}\n",
  }
  done, lines = call("slurm.sbatch", *RECIPE, programs=programs, **SLURM, **env)
  ours = sorted(line for line in lines if line.startswith("[python]"))
  return done, ours, [line for line in lines if line not in ours]


def test_slurm_starts_a_numbered_process_on_each_node(call):
  _, lines, _ = slurm(call, code=0)
  assert lines == [
    "[python][launch/run.py][--coordinator=node7:20123][--processes=2]"
    f"[--process={number}][--config=configs/ppo.py:7b][--workdir=/runs/a b]"
    for number in (0, 1)
  ]


def test_slurm_gives_each_process_all_of_its_node(call):
  _, _, others = slurm(call, code=0)
  (step,) = [line for line in others if line.startswith("[srun]")]
  assert step.startswith("[srun][--cpus-per-task=96][--kill-on-bad-exit=0][bash]")
  script = (ROOT / "launch" / "slurm.sbatch").read_text()
  asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
  assert "exclusive" in asked and asked["ntasks-per-node"] == "1"


@pytest.mark.parametrize("code", AGAIN)
def test_slurm_requeues_what_was_stopped_or_killed(call, code):
  done, _, others = slurm(call, code=code)
  assert done.returncode == 0 and others[-1] == "[scontrol][requeue][40123]"


@pytest.mark.parametrize("code", [0, *FINAL, *NOT_OURS])
def test_slurm_does_not_requeue_what_is_done_or_wrong(call, code):
  done, _, others = slurm(call, code=code)
  assert done.returncode == code
  assert not any("[requeue]" in line for line in others)


def test_slurm_requeues_what_was_not_saved_before_its_time_limit(call):
  done, _, others = slurm(call, code=143, state="COMPLETING TimeLimit")
  assert done.returncode == 0 and others[-1] == "[scontrol][requeue][40123]"


def test_slurm_does_not_requeue_what_a_user_cancels(call):
  done, _, others = slurm(call, code=75, state="COMPLETING None")
  assert done.returncode == 75 and "not requeued" in done.stdout
  assert not any("[requeue]" in line for line in others)


# As at the limit: the tasks are signalled before it, by --signal, and all later.
LIMIT = """
trap 'exit 75' TERM
sleep 0.5
kill -TERM "$PPID"  # The script.
kill -TERM "$$"
sleep 5 & wait
"""


def test_slurm_outlives_the_signals_of_the_time_limit_and_requeues(call):
  programs = {"srun": LIMIT, "scontrol": SCONTROL, "squeue": "echo RUNNING None\n"}
  done, lines = call("slurm.sbatch", *RECIPE, programs=programs, **SLURM)
  assert done.returncode == 0 and "ended with code 75" in done.stdout
  assert lines[-1] == "[scontrol][requeue][40123]"


def test_slurm_signals_the_tasks_in_time():
  script = (ROOT / "launch" / "slurm.sbatch").read_text()
  (name, seconds) = re.search(r"^#SBATCH --signal=(\w+)@(\d+)$", script, re.M).groups()
  assert name in [number.name.removeprefix("SIG") for number in watch.SIGNALS]
  assert int(seconds) >= 300


def test_slurm_gives_up_after_so_many_requeues(call):
  done, _, others = slurm(call, code=75, SLURM_RESTART_COUNT="3", RESTARTS="3")
  assert done.returncode == 75 and "requeued 3 times" in done.stderr
  assert not any("[requeue]" in line for line in others)


def test_slurm_without_a_recipe_says_how(call):
  done, _ = call("slurm.sbatch", programs={})
  assert done.returncode == 2 and "--config=FILE" in done.stderr


# A TPU slice over SSH.

POD = ["--tpu=pod", "--zone=us-a", "--project=mine", "--wait=0"]


def gcloud(*codes, states=(), create=0):
  """A gcloud whose hosts end with these codes, one for each start; then with 0.

  Args:
    states: of the slice, one for each time that it is asked; READY afterwards, and ""
      where there is no such slice.
    create: the code that making a slice ends with.
  """
  asked = "\n".join(f"    {i}) state={s!r} ;;" for i, s in enumerate(states))
  cases = "\n".join(f"    {i}) code={code} ;;" for i, code in enumerate(codes))
  return (
    WRITES
    + f"""
if [[ $* == *describe* ]]; then
  state=READY
  case $(($(grep -c describe "$SAID") - 1)) in
{asked}
  esac
  if [[ -z $state ]]; then echo "NOT_FOUND" >&2; exit 1; fi
  echo "$state"; exit
fi
if [[ $* == *" create "* ]]; then exit {create}; fi
if [[ $* == *launch/run.py* ]]; then
  count=$(($(grep -c 'launch/run.py' "$SAID") - 1)) code=0
  case $count in
{cases}
  esac
  echo "host ended with code 0"; echo "host ended with code $code"
fi
"""
  )


def starts(lines):
  return [line for line in lines if "launch/run.py" in line]


def test_a_pod_starts_the_same_command_on_all_hosts(call):
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs={"gcloud": gcloud()})
  (line,) = starts(lines)
  assert done.returncode == 0
  assert line.startswith(
    "[gcloud][compute][tpus][tpu-vm][ssh][pod][--zone=us-a][--project=mine]"
    "[--worker=all][--command=("
  )
  assert (
    "cd vlmrlaif_jax && .venv/bin/python launch/run.py "
    "--config=configs/ppo.py:7b --workdir=/runs/a\\ b);"
  ) in line


def test_a_pod_starts_again_when_hosts_were_stopped(call):
  programs = {"gcloud": gcloud(75, 137)}
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  assert done.returncode == 0 and len(starts(lines)) == 3


@pytest.mark.parametrize("code", FINAL + NOT_OURS)
def test_a_pod_does_not_start_again_after_an_error(call, code):
  programs = {"gcloud": gcloud(code)}
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  assert done.returncode == code and len(starts(lines)) == 1


def test_a_pod_gives_up_after_so_many_starts(call):
  programs = {"gcloud": gcloud(75, 75, 75)}
  asked = [*POD, "--retries=1", "--", *RECIPE]
  done, lines = call("tpu_pod.sh", *asked, programs=programs)
  assert done.returncode == 75 and len(starts(lines)) == 2
  assert "started 2 times" in done.stderr


def test_a_pod_is_set_up_from_what_is_committed(call):
  programs = {"gcloud": gcloud(), "git": "echo /code\n" + WRITES}
  _, lines = call("tpu_pod.sh", *POD, "--setup", programs=programs)
  assert "[git][-C][/code][archive][--format=tar.gz]" in lines[1]
  assert "describe" in lines[2]
  assert lines[3].startswith("[gcloud][compute][tpus][tpu-vm][scp]")
  assert 'pip install -q -e ".[tpu]"' in lines[4] and "--worker=all" in lines[4]


def test_a_pod_is_set_up_anew_before_each_further_start(call):
  programs = {"gcloud": gcloud(75, 75)}
  _, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  what = lambda line: next(w for w in ("describe", "scp", "pip", "run.py") if w in line)
  again = ["run.py", "describe", "scp", "pip"]
  assert list(map(what, lines)) == ["describe", *again, *again, "run.py"]


HOST = 'for last; do :; done; bash -c "${last#--command=}"\n'  # One, at our own place.


def test_a_host_without_a_checkout_asks_for_a_setup(call, tmp_path):
  asked = 'if [[ $* == *describe* ]]; then echo READY; exit; fi\ncd "$EMPTY"\n' + HOST
  given = ("tpu_pod.sh", *POD, "--", *RECIPE)
  done, _ = call(*given, programs={"gcloud": asked}, EMPTY=str(tmp_path))
  assert done.returncode == 2 and "nothing is installed here: give --setup" in (
    done.stdout
  )


# The states of a slice.

MADE = ["--type=v5litepod-16", "--version=v2", "--spot"]


def test_a_slice_that_gcloud_does_not_know_ends_it_before_anything_is_done(call):
  programs = {"gcloud": gcloud(states=[""])}
  done, lines = call("tpu_pod.sh", *POD, "--setup", "--", *RECIPE, programs=programs)
  assert done.returncode == 2 and len(lines) == 1
  assert "gcloud knows no slice pod in us-a" in done.stderr and "NOT_FOUND" in (
    done.stderr
  )
  assert "tpu-vm list --zone=us-a" in done.stderr
  assert "tpu-vm create pod --zone=us-a" in done.stderr


def test_a_mistyped_name_makes_no_slice(call):
  made = ["--type=v5litepod-16", "--version=v2"]
  programs = {"gcloud": gcloud(states=[""])}
  done, lines = call("tpu_pod.sh", *POD, *made, "--", *RECIPE, programs=programs)
  assert done.returncode == 2 and len(lines) == 1


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "FAILED", ""])
def test_a_slice_that_is_gone_ends_it_with_how_to_make_another(call, state):
  programs = {"gcloud": gcloud(75, states=["READY", state])}
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  assert done.returncode == 75 and len(starts(lines)) == 1
  assert f"pod is {state or 'gone'} and will not be ready again" in done.stderr
  assert "tpu-vm delete pod" in done.stderr and "tpu-vm create pod" in done.stderr
  assert not any("[create]" in line or "[delete]" in line for line in lines)


@pytest.mark.parametrize(
  "state", ["CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING"]
)
def test_a_slice_that_is_on_its_way_is_waited_for(call, state):
  programs = {"gcloud": gcloud(75, states=["READY", state, state])}
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  assert done.returncode == 0 and len(starts(lines)) == 2
  assert done.stderr.count(f"waiting for pod: {state}") == 2


def test_a_slice_that_someone_has_stopped_is_left_to_them(call):
  programs = {"gcloud": gcloud(75, states=["READY", "STOPPED"])}
  done, lines = call("tpu_pod.sh", *POD, *MADE, "--", *RECIPE, programs=programs)
  assert done.returncode == 75 and len(lines) == 3
  assert "pod is STOPPED" in done.stderr and "tpu-vm start pod" in done.stderr


def test_waiting_has_an_end(call):
  programs = {"gcloud": gcloud(states=["REPAIRING"] * 9)}
  asked = [*POD, "--limit=0", "--", *RECIPE]
  done, lines = call("tpu_pod.sh", *asked, programs=programs)
  assert done.returncode == 75 and starts(lines) == []
  assert "not ready after --limit=0 seconds (REPAIRING)" in done.stderr


def test_a_slice_that_is_gone_is_made_again_and_set_up_where_its_type_is_given(call):
  programs = {"gcloud": gcloud(75, states=["READY", "PREEMPTED", "CREATING"])}
  done, lines = call("tpu_pod.sh", *POD, *MADE, "--", *RECIPE, programs=programs)
  assert done.returncode == 0 and len(starts(lines)) == 2
  make = lines.index(
    "[gcloud][compute][tpus][tpu-vm][create][pod][--zone=us-a][--project=mine]"
    "[--accelerator-type=v5litepod-16][--version=v2][--spot]"
  )
  assert "[delete][pod]" in lines[make - 1] and "[--quiet]" in lines[make - 1]
  assert "scp" in lines[make + 3]  # Asked twice before.


def test_a_slice_that_was_gone_before_is_set_up_before_the_first_start(call):
  programs = {"gcloud": gcloud(states=["PREEMPTED"])}
  done, lines = call("tpu_pod.sh", *POD, *MADE, "--", *RECIPE, programs=programs)
  assert done.returncode == 0 and "pip" in lines[-2] and "run.py" in lines[-1]


def test_what_cannot_be_made_now_is_tried_again_up_to_the_limit(call):
  states = ["READY", "PREEMPTED", *[""] * 99]
  programs = {"gcloud": gcloud(75, states=states, create=1)}
  asked = [*POD, *MADE, "--limit=1", "--", *RECIPE]
  done, lines = call("tpu_pod.sh", *asked, programs=programs)
  assert done.returncode == 75 and "not ready after --limit=1" in done.stderr
  assert sum("[create]" in line for line in lines) > 1
  assert sum("[delete]" in line for line in lines) == 1


def test_a_type_without_a_version_is_refused(call):
  done, _ = call("tpu_pod.sh", *POD, "--type=v5litepod-16", programs={})
  assert done.returncode == 2 and "--type and --version" in done.stderr


def test_a_dry_run_runs_nothing(call):
  asked = [*POD, "--setup", "--dry-run", "--", *RECIPE]
  done, lines = call("tpu_pod.sh", *asked, programs={"gcloud": gcloud()})
  assert done.returncode == 0 and lines == []
  assert "gcloud compute tpus tpu-vm ssh pod" in done.stdout


def test_a_pod_without_a_name_says_what_it_wants(call):
  done, _ = call("tpu_pod.sh", "--zone=us-a", programs={})
  assert done.returncode == 2 and "--tpu and --zone" in done.stderr


# GKE.


@pytest.fixture(scope="module")
def job_set():
  return yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())


def job_of(job_set):
  (jobs,) = job_set["spec"]["replicatedJobs"]
  return jobs["template"]["spec"]


def test_gke_runs_the_launcher_with_a_recipe_that_there_is(job_set):
  (container,) = job_of(job_set)["template"]["spec"]["containers"]
  program = [*container["command"], *container["args"]]
  assert program[:2] == ["python", "launch/run.py"]
  assert program[2:] == ["--config=configs/RECIPE", "--workdir=/runs/vlmrlaif"]


def test_gke_restarts_all_pods_unless_the_recipe_is_wrong(job_set):
  job = job_of(job_set)
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == FINAL
  policy = job_set["spec"]["failurePolicy"]
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert job["backoffLimit"] == 0 and policy["maxRestarts"] > 0


def test_gke_has_a_pod_for_each_host_of_the_slice(job_set):
  job = job_of(job_set)
  pod = job["template"]["spec"]
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips


# What all of them go by.


def test_the_documents_tell_of_each_exit_code():
  assert supervisor.AGAIN == watch.STOPPED
  page = (ROOT / "docs" / "launching.md").read_text()
  rows = dict(re.findall(r"^\| (\d+) \|.*\| (end|start again)[^|]*\|$", page, re.M))
  ends = {str(code): "end" for code in (0, *FINAL)}
  assert rows == ends | {str(watch.STOPPED): "start again"}
  told = re.findall(r"^  (\d+)  ", supervisor.__doc__, re.M)
  assert told == list(rows)
