"""What a run writes about itself: `metrics.jsonl` and TensorBoard events."""

from collections.abc import Iterable, Mapping
import contextlib
import json
import math
import os
import pathlib

import tensorboardX

from nfnet_jax.training import files, processes

Row = dict[str, float]


class MetricsWriter:
  """Appends rows of scalars to `WORKDIR/metrics.jsonl` and TensorBoard.

  Every training step has a row, and so has every evaluation. A row's `step` is
  the number of updates made. Of several processes the first one writes.

  Attributes:
    evaluations: step -> the row of its evaluation, earlier runs' included.

  Example:
    >>> import tempfile
    >>> with MetricsWriter(tempfile.mkdtemp(), resumed_step=0) as writer:
    ...   writer.write([{'step': 1, 'loss': 2.3}])
  """

  def __init__(self, workdir: str | os.PathLike, resumed_step: int):
    """Opens the files; rows after `resumed_step` are dropped."""
    self.evaluations: dict[int, Mapping[str, float]] = {}
    self._files = contextlib.ExitStack()
    workdir = pathlib.Path(workdir)
    if processes.is_primary():
      self._open(workdir, resumed_step)
    # All processes must skip the same evaluations when they resume.
    self._note_evaluations(
      processes.from_primary(lambda: list(self.evaluations.values()))
    )

  def _open(self, workdir: pathlib.Path, resumed_step: int) -> None:
    path = workdir / 'metrics.jsonl'
    kept = [row for row in read_metrics(path) if row['step'] <= resumed_step]
    files.write_atomically(
      path, ''.join(files.to_json(row) + '\n' for row in kept)
    )
    self._note_evaluations(kept)
    self._file = self._files.enter_context(path.open('a'))
    self._events = self._files.enter_context(
      tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=resumed_step + 1
      )
    )

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *error) -> None:
    self._files.close()

  def write(self, rows: Iterable[Mapping[str, float]]) -> None:
    """Writes rows, each with an integer `step`, and flushes."""
    rows = list(rows)
    self._note_evaluations(rows)
    if not processes.is_primary():
      return
    for row in rows:
      self._file.write(files.to_json(row) + '\n')
      for name, value in row.items():
        if name != 'step':
          self._events.add_scalar(name, value, row['step'])
    self._file.flush()

  def observe(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes to TensorBoard alone what differs from run to run, as speed does.

    The rows of a resumed run are those of one that was never stopped.
    """
    if processes.is_primary():
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)

  def _note_evaluations(self, rows: Iterable[Mapping[str, float]]) -> None:
    self.evaluations |= {
      int(row['step']): row for row in rows if 'eval/top1' in row
    }


def read_metrics(path: str | os.PathLike) -> list[Row]:
  """Reads a `metrics.jsonl`; a last line cut by a kill is left out.

  Where the file has null, rows have NaN.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  rows = [json.loads(line) for line in lines if line.endswith('\n')]
  return [
    {name: math.nan if value is None else value for name, value in row.items()}
    for row in rows
  ]
