"""What a run writes about itself: `metrics.jsonl` and TensorBoard events."""

from collections.abc import Iterable, Mapping
import contextlib
import itertools
import json
import math
import os
import tempfile

from etils import epath
import tensorboardX

from nfnet_jax.distributed import collectives, processes
from nfnet_jax.storage import failures, files

Row = dict[str, float]

_FILE, _EVENTS = 'metrics.jsonl', 'tensorboard'


class MetricsWriter:
  """Appends rows of scalars to `WORKDIR/metrics.jsonl` and TensorBoard.

  Every training step has a row, and so has every evaluation. A row's `step` is
  the number of updates made. Of several processes the first one writes.

  What is in a bucket cannot be appended to. For a run there, files grow in a
  temporary folder of this machine; `publish` copies them, and begins another
  file of events, so that each is copied once.

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
    self._workdir = self._home = epath.Path(workdir)
    self._unpublished, self._parts = False, itertools.count(1)
    if processes.is_primary():
      self._open(resumed_step)
    # All processes must skip the same evaluations when they resume.
    self._note_evaluations(
      collectives.from_primary(lambda: list(self.evaluations.values()))
    )

  def _open(self, resumed_step: int) -> None:
    rows = read_metrics(self._workdir / _FILE)
    kept = [row for row in rows if row['step'] <= resumed_step]
    if files.is_in_bucket(self._workdir):
      self._home = epath.Path(
        self._files.enter_context(tempfile.TemporaryDirectory())
      )
    path = self._home / _FILE
    files.write_atomically(
      path, ''.join(files.to_json(row) + '\n' for row in kept)
    )
    self._note_evaluations(kept)
    self._file = self._files.enter_context(path.open('a'))
    self._open_events(purge_step=resumed_step + 1)
    self._files.callback(lambda: self._events.close())

  def _open_events(self, suffix: str = '', purge_step: int | None = None):
    self._events = tensorboardX.SummaryWriter(
      str(self._home / _EVENTS), purge_step=purge_step, filename_suffix=suffix
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
    self._unpublished |= bool(rows)

  def publish(self) -> None:
    """Brings a bucket up to what was written; for a disk there is no need.

    To be called before a checkpoint is saved: a run that resumes from it finds
    the rows up to there.

    Raises:
      OSError: if the bucket cannot be written.
    """
    if self._home == self._workdir or not self._unpublished:
      return
    self._events.close()  # To flush it would leave rows in its queue.
    for path in (self._home / _EVENTS).iterdir():
      files.upload(path, self._workdir / _EVENTS / path.name)
      path.unlink()
    files.upload(self._home / _FILE, self._workdir / _FILE)
    # The time in a file's name has whole seconds.
    self._open_events(suffix=f'.{next(self._parts)}')
    self._unpublished = False

  def observe(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes to TensorBoard alone what differs from run to run, as speed does.

    The rows of a resumed run are those of one that was never stopped.
    """
    if processes.is_primary():
      for name, value in scalars.items():
        self._events.add_scalar(name, value, step)
      self._unpublished = True

  def _note_evaluations(self, rows: Iterable[Mapping[str, float]]) -> None:
    self.evaluations |= {
      int(row['step']): row for row in rows if 'eval/top1' in row
    }


def read_metrics(path: str | os.PathLike) -> list[Row]:
  """Reads a `metrics.jsonl`; a last line cut by a kill is left out.

  Where the file has null, rows have NaN.

  Raises:
    OSError: if it is there but cannot be read.
  """
  path = epath.Path(path)
  with failures.as_os_error(f'Reading {path}'):
    if not path.exists():
      return []
    lines = path.read_text().splitlines(keepends=True)
  rows = [json.loads(line) for line in lines if line.endswith('\n')]
  return [
    {name: math.nan if value is None else value for name, value in row.items()}
    for row in rows
  ]
