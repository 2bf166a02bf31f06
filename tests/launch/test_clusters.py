"""The command lines that the cluster scripts build, as stand-ins write them down."""

import pathlib
import re
import subprocess

import pytest
import yaml

from vlmrlaif_jax.core import interrupts
from vlmrlaif_jax.training import alarms

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ["--config=configs/ppo.py:7b", "--workdir=/runs/a b"]
# Exit codes of launch/run.py that end a job, and those that start it again.
FINAL = [1, 2, alarms.EXIT_ALARM]
AGAIN = [interrupts.EXIT_RESUMABLE, 128 + 9]
NOT_OURS = [126, 127]  # Of a shell that finds no interpreter.
# Each writes a line of its arguments to $SAID, one after another in brackets.
WRITES = 'line=$(printf "[%s]" "${0##*/}" "$@"); echo "$line" >> "$SAID"\n'

# TPU slices.

POD = ("tpu_pod.sh", "pod", "us-a")
SSH = "[gcloud][compute][tpus][tpu-vm][ssh][pod][--zone=us-a][--worker=all][--command="


def test_a_pod_runs_the_same_command_on_all_workers(call):
  done, lines = call(*POD, "run", *RECIPE, programs={"gcloud": WRITES})
  run = "cd vlmrlaif_jax && .venv/bin/python launch/run.py "
  assert done.returncode == 0
  assert lines == [
    f"{SSH}{run}--config=configs/ppo.py:7b --workdir=/runs/a\\ b]",
  ]


@pytest.mark.parametrize("code", FINAL + AGAIN)
def test_exit_code_of_a_pod_is_passed_on(call, code):
  done, lines = call(*POD, "run", *RECIPE, programs={"gcloud": f"{WRITES}exit {code}"})
  assert done.returncode == code and len(lines) == 1


def test_a_pod_is_set_up_from_what_is_committed(call):
  _, lines = call(*POD, "setup", programs={"gcloud": WRITES, "git": WRITES})
  archive, copy, install = lines
  assert "[archive][--format=tar.gz]" in archive and archive.endswith("[HEAD]")
  assert copy.startswith("[gcloud][compute][tpus][tpu-vm][scp]")
  assert copy.endswith("[pod:][--zone=us-a][--worker=all]")
  assert install.startswith(SSH) and '-e ".[tpu]"' in install


@pytest.mark.parametrize("given", [[], ["pod", "us-a"], ["pod", "us-a", "restart"]])
def test_a_pod_without_an_action_says_how(call, given):
  done, lines = call("tpu_pod.sh", *given, programs={"gcloud": WRITES})
  assert done.returncode == 2 and "usage" in done.stderr and lines == []


# SkyPilot.


@pytest.fixture(scope="module")
def sky():
  return yaml.safe_load((ROOT / "launch" / "cluster" / "sky.yaml").read_text())


def sky_run(sky, folder, programs, **env):
  """What the task's `run` starts on a host that has these programs."""
  (folder / ".venv" / "bin").mkdir(parents=True)
  for path in [folder / ".venv" / "bin" / "python", *map(folder.joinpath, programs)]:
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)
  done = subprocess.run(
    ["bash", "-c", sky["run"]],
    cwd=folder,
    env={
      "PATH": f"{folder}:/usr/bin:/bin",
      "RECIPE": "ppo.py:7b",
      "RUN": "7b",
      "FLAGS": "--trace=3 --heartbeat_s=60",
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NODE_RANK": "1",
      **env,
    },
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.splitlines()


COMMAND = ["launch/run.py", "--config=configs/ppo.py:7b", "--workdir=/runs/7b"]
FLAGS = ["--trace=3", "--heartbeat_s=60"]


def test_sky_numbers_the_processes_of_gpu_hosts(sky, tmp_path):
  lines = sky_run(sky, tmp_path, ["nvidia-smi"], SKYPILOT_NUM_NODES="2")
  peers = ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"]
  assert lines == [*COMMAND, *peers, *FLAGS]


@pytest.mark.parametrize("programs, hosts", [([], "4"), (["nvidia-smi"], "1")])
def test_sky_leaves_tpu_slices_and_single_hosts_to_jax(sky, tmp_path, programs, hosts):
  lines = sky_run(sky, tmp_path, programs, SKYPILOT_NUM_NODES=hosts)
  assert lines == [*COMMAND, *FLAGS]


def test_sky_restarts_what_is_resumable_and_no_errors(sky):
  recovery = sky["resources"]["job_recovery"]
  assert recovery == {"recover_on_exit_codes": [interrupts.EXIT_RESUMABLE]}


def test_sky_keeps_the_workdir_in_a_bucket_that_the_user_names(sky):
  assert sky["file_mounts"]["/runs"]["mode"] == "MOUNT"
  assert sky["file_mounts"]["/runs"]["name"] == "${BUCKET}"
  assert sky["envs"]["BUCKET"] is None
  assert (ROOT / "configs" / sky["envs"]["RECIPE"].partition(":")[0]).exists()


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
  script = (ROOT / "launch" / "cluster" / "slurm.sbatch").read_text()
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
  done, _, others = slurm(call, code=interrupts.EXIT_RESUMABLE, state="COMPLETING None")
  assert done.returncode == interrupts.EXIT_RESUMABLE and "not requeued" in done.stdout
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
  script = (ROOT / "launch" / "cluster" / "slurm.sbatch").read_text()
  (name, seconds) = re.search(r"^#SBATCH --signal=(\w+)@(\d+)$", script, re.M).groups()
  assert name in [number.name.removeprefix("SIG") for number in interrupts.SIGNALS]
  assert int(seconds) >= 300


def test_slurm_gives_up_after_so_many_requeues(call):
  done, _, others = slurm(
    call, code=interrupts.EXIT_RESUMABLE, SLURM_RESTART_COUNT="3", RESTARTS="3"
  )
  assert (
    done.returncode == interrupts.EXIT_RESUMABLE and "after 3 requeues" in done.stderr
  )
  assert not any("[requeue]" in line for line in others)


def test_slurm_without_a_recipe_says_how(call):
  done, _ = call("slurm.sbatch", programs={})
  assert done.returncode == 2 and "--config=FILE" in done.stderr


# GKE.


@pytest.fixture(scope="module")
def gke():
  """The objects of the file by kind."""
  text = (ROOT / "launch" / "cluster" / "gke.yaml").read_text()
  return {each["kind"]: each for each in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def job_set(gke):
  return gke["JobSet"]


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


def test_gke_lets_only_pods_of_the_job_reach_each_other(gke, job_set):
  policy = gke["NetworkPolicy"]["spec"]
  own = {"jobset.sigs.k8s.io/jobset-name": job_set["metadata"]["name"]}
  assert policy["podSelector"]["matchLabels"] == own
  assert policy["policyTypes"] == ["Ingress"]
  assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
  # A policy does not apply to pods in the network of their host.
  pod = job_of(job_set)["template"]["spec"]
  assert "hostNetwork" not in pod


# What all of them go by.


def test_the_documents_tell_of_each_exit_code():
  page = (ROOT / "docs" / "launching.md").read_text()
  rows = dict(re.findall(r"^\| (\d+) \|.*\| (end|start again)[^|]*\|$", page, re.M))
  ends = {str(code): "end" for code in (0, *FINAL)}
  assert rows == ends | {str(interrupts.EXIT_RESUMABLE): "start again"}
