"""The alarms of a stage, on disk and on the screen.

They follow from the lines of metrics.jsonl and nothing else: a run that goes on reads
there what it had raised, and every process raises the same.
"""

import math
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from vlmrlaif_jax.core.jsonl import read_jsonl, write_records
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.training.alarms import Alarm, Alarmed, Watcher


class Alarms:
  """The alarms of a stage, which go to alarms.jsonl and to the screen.

  Args:
    config: see alarms.default_config.
    folder: of the stage.
    last: the step that the run goes on from; what was raised until then stays.
  """

  def __init__(self, config: ConfigDict, folder: str, log: Log, last: int):
    self._watcher, self._log, self._raised = Watcher(config), log, []
    self._folder = pathlib.Path(folder)
    for step, metrics in logged(self._folder / "metrics.jsonl", last):
      self._raised += self._watcher.see(step, metrics)
    if (self._folder / "alarms.jsonl").exists():
      self._write()

  def look(self, step: int, metrics: Mapping[str, float]) -> str:
    """Raises the alarms that begin, and says which hold, for the progress line.

    Raises:
      Alarmed: one of them is to end the run.
    """
    begun = self._watcher.see(step, metrics)
    for alarm in begun:
      where = f"{self._log.stage}: ALARM {alarm.name} at step {step}"
      self._log.note(f"{where}: {alarm.message}; {alarm.remedy}")
    if begun:
      self._raised += begun
      self._write()
    stops = [alarm for alarm in begun if alarm.name in self._watcher.config.stop]
    if stops:
      raise Alarmed(self._told(stops[0]))
    holding = self._watcher.holding()
    return f"ALARM {' '.join(holding)}" if holding else ""

  def _told(self, alarm: Alarm) -> str:
    return (
      f"{self._log.stage} was stopped at step {alarm.step} by the alarm {alarm.name}: "
      f"{alarm.message}. Against it: {alarm.remedy}. With other settings the stage "
      f"begins anew: remove {self._folder} first. To go on all the same from its last "
      f"checkpoint, take {alarm.name} out of alarms.stop in the stage's section"
    )

  def _write(self) -> None:
    if self._log.writes:
      rows = [alarm._asdict() for alarm in self._raised]
      write_records(self._folder / "alarms.jsonl", rows)


def logged(path: pathlib.Path, last: int) -> list[tuple[int, dict[str, float]]]:
  """(step, metrics) of each line of a metrics.jsonl up to a step."""
  if not path.exists():
    return []
  found = []
  for row in read_jsonl(path):
    step = row.pop("step")
    # Values that are not finite were written as null.
    values = {k: math.nan if x is None else x for k, x in row.items()}
    numbers = {k: x for k, x in values.items() if k not in ("time", "phases")}
    if step <= last:
      found.append((step, numbers))
  return found
