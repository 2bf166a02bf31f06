"""The command lines that tpu_pod.sh builds, as a stand-in writes them down."""

import pytest

from tests.launch.clusters import FINAL, NOT_OURS, RECIPE, WRITES

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
