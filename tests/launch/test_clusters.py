"""The command lines that the cluster scripts build, as stand-ins write them down."""

import os
import pathlib
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ["--config=configs/ppo.py:7b", "--workdir=/runs/a b"]
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
SRUN = """
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first; a=$?; wait $second; b=$?
exit $((a > b ? a : b))
"""
SCONTROL = WRITES + 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n'
SLURM = {
  "SLURM_JOB_ID": "40123",
  "SLURM_NNODES": "2",
  "SLURM_JOB_NODELIST": "node[7-8]",
}


def slurm(call, *, code, **env):
  """(what became of a job whose processes end with a code, their lines, others)."""
  python = WRITES + f"exit {code}\n"
  programs = {"srun": SRUN, "scontrol": SCONTROL, "python": python}
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


@pytest.mark.parametrize("code", [75, 137])
def test_slurm_requeues_what_was_stopped_or_killed(call, code):
  done, _, others = slurm(call, code=code)
  assert done.returncode == 0 and others[-1] == "[scontrol][requeue][40123]"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_slurm_does_not_requeue_what_is_done_or_wrong(call, code):
  done, _, others = slurm(call, code=code)
  assert done.returncode == code
  assert not any("requeue" in line for line in others)


def test_slurm_gives_up_after_so_many_requeues(call):
  done, _, others = slurm(call, code=75, SLURM_RESTART_COUNT="3", RESTARTS="3")
  assert done.returncode == 75 and "requeued 3 times" in done.stderr
  assert not any("requeue]" in line for line in others)


def test_slurm_without_a_recipe_says_how(call):
  done, _ = call("slurm.sbatch", programs={})
  assert done.returncode == 2 and "--config=FILE" in done.stderr


# A TPU slice over SSH.

POD = ["--tpu=pod", "--zone=us-a", "--project=mine", "--wait=0"]


def gcloud(*codes):
  """A gcloud whose hosts end with these codes, one for each start; then with 0."""
  cases = "\n".join(f"    {i}) code={code} ;;" for i, code in enumerate(codes))
  return (
    WRITES
    + f"""
if [[ $* == *describe* ]]; then echo READY; exit; fi
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
  (line,) = lines
  assert done.returncode == 0
  assert line.startswith(
    "[gcloud][compute][tpus][tpu-vm][ssh][pod][--zone=us-a][--project=mine]"
    "[--worker=all][--command=cd vlmrlaif_jax && .venv/bin/python launch/run.py "
    "--config=configs/ppo.py:7b --workdir=/runs/a\\ b;"
  )


def test_a_pod_starts_again_when_hosts_were_stopped(call):
  programs = {"gcloud": gcloud(75, 137)}
  done, lines = call("tpu_pod.sh", *POD, "--", *RECIPE, programs=programs)
  assert done.returncode == 0 and len(starts(lines)) == 3


@pytest.mark.parametrize("code", [1, 2])
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
  assert lines[2].startswith("[gcloud][compute][tpus][tpu-vm][scp]")
  assert 'pip install -q -e ".[tpu]"' in lines[3] and "--worker=all" in lines[3]


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
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
  policy = job_set["spec"]["failurePolicy"]
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert job["backoffLimit"] == 0 and policy["maxRestarts"] > 0


def test_gke_has_a_pod_for_each_host_of_the_slice(job_set):
  job = job_of(job_set)
  pod = job["template"]["spec"]
  rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
