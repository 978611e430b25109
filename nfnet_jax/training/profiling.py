"""Profiler traces of some steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Any

from etils import epath
import jax

from nfnet_jax.storage import files

_EXPORTS = ('.xplane.pb', 'perfetto_trace.json.gz')


def folder_of(workdir: str | os.PathLike, steps: range) -> epath.Path:
  """Return the folder of a trace, where TensorBoard's profiler expects it."""
  top = epath.Path(workdir) / 'profile' / 'plugins' / 'profile'
  return top / f'{steps.start}-{steps.stop}'


class Tracer:
  """Traces a range of steps on the devices of this process.

  Process I writes `process_I.xplane.pb` for TensorBoard and XProf, which show
  the files of one folder as the hosts of one run, and
  `process_I.perfetto_trace.json.gz` for Perfetto. JAX writes to local disks
  only, so the files are copied. If tracing fails, the run continues.

  Examples:
    >>> import tempfile
    >>> messages = []
    >>> with Tracer(tempfile.mkdtemp(), range(0, 1), messages.append) as tracer:
    ...   tracer.begin_at(0, state=())
    ...   with tracer.annotate(0):
    ...     pass
    ...   tracer.end_at(1, state=())
    >>> messages[0].partition(': ')[0]
    'profile of steps 0 to 1'
  """

  def __init__(
    self,
    workdir: str | os.PathLike = '',
    steps: range = range(0),
    log_fn: Callable[[str], None] = lambda line: None,
  ):
    """Prepare to trace.

    Args:
      workdir: folder of the run, on a disk or in a bucket.
      steps: 0-based steps to trace; none by default.
      log_fn: receives a message with the trace's folder.
    """
    self._folder = folder_of(workdir, steps)
    self._steps = steps
    self._log_fn = log_fn
    self._trace = contextlib.ExitStack()  # Holds a trace while it is taken.
    self._stop = steps.stop  # Where a trace ends if it ends now.

  def __enter__(self) -> Tracer:
    return self

  def __exit__(self, *error: Any) -> None:
    self._end()  # If a run ends early, its trace up to there is written.

  def begin_at(self, step: int, state: Any) -> None:
    """Begin if this step is the first to trace, once `state` is computed."""
    if self._steps and step == self._steps.start:
      jax.block_until_ready(state)
      with self._log_failure('not taken'):
        self._trace.enter_context(self._write_trace())

  def annotate(self, step: int) -> contextlib.AbstractContextManager:
    """Mark a step in the trace, if it is to be traced."""
    if step not in self._steps:
      return contextlib.nullcontext()
    self._stop = step + 1
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def end_at(self, step: int, state: Any) -> None:
    """End if this step follows the last to trace, once `state` is computed."""
    if self._steps and step == self._steps.stop:
      jax.block_until_ready(state)
      self._end()

  def _end(self) -> None:
    with self._log_failure('not written'):
      self._trace.close()

  @contextlib.contextmanager
  def _log_failure(self, what: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # The profiler, and buckets, raise many kinds.
      self._log(f'{what} ({error})')

  def _log(self, outcome: str) -> None:
    steps = f'{self._steps.start} to {self._stop}'
    self._log_fn(f'profile of steps {steps}: {outcome}')

  @contextlib.contextmanager
  def _write_trace(self) -> Iterator[None]:
    """Trace the body, and write the trace to the folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Tracing Python calls is costly.
    with tempfile.TemporaryDirectory() as local:
      jax.profiler.start_trace(
        local, create_perfetto_trace=True, profiler_options=options
      )
      yield
      jax.profiler.stop_trace()
      self._copy(pathlib.Path(local))
    self._log(str(self._folder))

  def _copy(self, local: pathlib.Path) -> None:
    self._folder.mkdir(parents=True, exist_ok=True)
    for suffix in _EXPORTS:
      (source,) = local.glob(f'plugins/profile/*/*{suffix}')
      name = f'process_{jax.process_index()}.{suffix.removeprefix(".")}'
      with files.atomically(self._folder / name) as temporary:
        shutil.copyfile(source, temporary)
