"""Metrics of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
import itertools
import json
import math
import os
import tempfile
from typing import Any

from etils import epath
import tensorboardX

from nfnet_jax import errors
from nfnet_jax.distributed import collectives, processes
from nfnet_jax.storage import failures, files, run_files

Row = dict[str, float]


class MetricsWriter:
  """Appends rows of scalars to `WORKDIR/metrics.jsonl` and TensorBoard.

  Every training step and every evaluation has a row. A row's `step` is the
  number of updates made. Only process 0 writes.

  Files in a bucket cannot be appended to. If the workdir is in a bucket, files
  are written in a local temporary folder. `publish` copies them and starts
  another file of events, so that each file of events is copied once.

  Attributes:
    evaluations: step -> row of its evaluation, including those before a resume.
    missing_steps: number of steps before a resume that have no row.

  Examples:
    >>> import tempfile
    >>> with MetricsWriter(tempfile.mkdtemp(), resumed_step=0) as writer:
    ...   writer.write([{'step': 1, 'loss': 2.3}])
  """

  def __init__(self, workdir: str | os.PathLike, resumed_step: int):
    """Open the files and drop rows after `resumed_step`."""
    self.evaluations: dict[int, Mapping[str, float]] = {}
    self.missing_steps = 0
    self._files = contextlib.ExitStack()
    self._workdir = self._local = epath.Path(workdir)
    self._unpublished, self._event_files = False, itertools.count(1)
    if processes.is_primary():
      self._open(resumed_step)
    # All processes must skip the same evaluations when they resume.
    self._add_evaluations(
      collectives.from_primary(lambda: list(self.evaluations.values()))
    )

  def _open(self, resumed_step: int) -> None:
    rows = read_metrics(self._workdir / run_files.METRICS)
    kept = [row for row in rows if row['step'] <= resumed_step]
    steps = {row['step'] for row in kept if 'eval/top1' not in row}
    self.missing_steps = resumed_step - len(steps)
    if files.is_in_bucket(self._workdir):
      self._local = epath.Path(
        self._files.enter_context(tempfile.TemporaryDirectory())
      )
    path = self._local / run_files.METRICS
    files.write_atomically(
      path, ''.join(files.to_json(row) + '\n' for row in kept)
    )
    self._add_evaluations(kept)
    self._file = self._files.enter_context(path.open('a'))
    self._open_events(purge_step=resumed_step + 1)
    self._files.callback(lambda: self._events.close())

  def _open_events(
    self, suffix: str = '', purge_step: int | None = None
  ) -> None:
    self._events = tensorboardX.SummaryWriter(
      str(self._local / run_files.EVENTS),
      purge_step=purge_step,
      filename_suffix=suffix,
    )

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *error: Any) -> None:
    self._files.close()

  def write(self, rows: Iterable[Mapping[str, float]]) -> None:
    """Write rows, each with an integer `step`, and flush."""
    rows = list(rows)
    self._add_evaluations(rows)
    if not processes.is_primary():
      return
    for row in rows:
      self._file.write(files.to_json(row) + '\n')
      for name, value in row.items():
        if name != 'step':
          self._events.add_scalar(name, value, row['step'])
    self._file.flush()
    self._unpublished |= bool(rows)

  def publish(self) -> None:
    """Copy what was written to the bucket, if the workdir is in one.

    Call it before a checkpoint is saved, so that a run that resumes from it
    finds the rows up to there.

    Raises:
      OSError: if the bucket cannot be written.
    """
    if self._local == self._workdir or not self._unpublished:
      return
    self._events.close()  # A flush would leave rows in its queue.
    for path in (self._local / run_files.EVENTS).iterdir():
      files.upload(path, self._workdir / run_files.EVENTS / path.name)
      path.unlink()
    path = self._workdir / run_files.METRICS
    files.upload(self._local / path.name, path)
    # The time in a file's name has whole seconds, and so may not be unique.
    self._open_events(suffix=f'.{next(self._event_files)}')
    self._unpublished = False

  def observe(self, step: int, scalars: Mapping[str, float]) -> None:
    """Write scalars that are not reproducible, such as speed, to TensorBoard.

    They are not written to `metrics.jsonl`, so that the rows of a resumed run
    equal those of a run that was never interrupted.
    """
    if processes.is_primary():
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)
      self._unpublished = True

  def _add_evaluations(self, rows: Iterable[Mapping[str, float]]) -> None:
    self.evaluations |= {
      int(row['step']): row for row in rows if 'eval/top1' in row
    }


def read_metrics(path: str | os.PathLike) -> list[Row]:
  """Read the rows of a `metrics.jsonl`; none if there is no such file.

  An incomplete last line, which a killed run leaves, is skipped. A null in the
  file becomes NaN.

  Raises:
    OSError: if the file exists but cannot be read.
    errors.InputError: if it is damaged.
  """
  file = epath.Path(path)
  text = failures.read(
    f'Reading {file}', lambda: file.read_bytes() if file.exists() else b''
  )
  lines = text.splitlines(keepends=True)
  return [
    _parse_row(line, f'line {number} of {file}')
    for number, line in enumerate(lines, 1)
    if line.endswith(b'\n')
  ]


def _parse_row(line: bytes, place: str) -> Row:
  try:
    row = json.loads(line)
    row['step'] = int(row['step'])
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(
      f'{place} holds no metrics of a step. Restore the file, or delete it: '
      'then the run goes on without its earlier metrics.'
    ) from error
  return {
    name: math.nan if value is None else value for name, value in row.items()
  }
