"""Saving and restoring the state of a run with Orbax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
import logging as std_logging
import os
import pathlib
from typing import Any
import zlib

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from nfnet_jax import errors, trees
from nfnet_jax.storage import buckets, failures
from nfnet_jax.training import state as state_lib
from nfnet_jax.training import unfinished

_STATE = 'state'
_CHECKSUMS = 'checksums'


class UnreadableError(ValueError):
  """The contents of a checkpoint differ from what was saved."""


class OutageError(OSError):
  """Checkpoints could not be read, but may be readable later."""


class SaveError(OSError):
  """A checkpoint could not be saved; earlier ones are intact."""


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
  """Hide the tracebacks that Orbax's threads log before a `SaveError`."""
  logger = logging.get_absl_logger()
  logger.addFilter(_is_no_orbax_traceback)
  try:
    yield
  finally:
    logger.removeFilter(_is_no_orbax_traceback)


def _is_no_orbax_traceback(record: std_logging.LogRecord) -> bool:
  is_orbax = 'orbax' in pathlib.PurePath(record.pathname).parts
  return not (record.exc_info and is_orbax)


class Checkpoints:
  """The checkpoints of a run: `DIR/STEP/`, written in the background.

  On a disk a checkpoint is renamed atomically once it is complete, so that a
  killed run never leaves an incomplete one under its name. In a bucket the file
  that is written last shows which are complete. Each holds a checksum of every
  tensor, which is checked on reading. Only process 0 opens them.

  Examples:
    >>> import tempfile
    >>> state = state_lib.TrainState(np.int32(7), {}, {}, {}, {}, {})
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...   checkpoints.save(state)
    ...   int(checkpoints.restore_latest(template=state).step)
    7
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int = 3,
    *,
    read_only: bool = False,
  ):
    """Open a folder of checkpoints, on a disk or in a bucket.

    Args:
      directory: absolute path; created if it does not exist.
      keep: number of the newest checkpoints that are kept.
      read_only: whether to restore only: nothing is created or removed.

    Raises:
      OSError: if the folder cannot be created, or its bucket not used.
    """
    self.directory = epath.Path(directory)
    self._unreadable: set[int] = set()
    buckets.check(self.directory, to_write=not read_only)
    if not read_only:
      # Orbax does not create the folder if `active_processes` is given.
      self.directory.mkdir(parents=True, exist_ok=True)
      failures.read(
        f'Removing unfinished checkpoints in {self.directory}',
        functools.partial(unfinished.remove, self.directory),
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        # Orbax's own read_only does the same with long warnings.
        max_to_keep=keep,
        create=False,
        # Other processes hold the same state and take no part.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}
        ),
      ),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Wait for the last save and release the directory.

    Raises:
      SaveError: if a save failed.
    """
    with self._as_save_error():
      self._manager.close()

  def wait(self) -> None:
    """Wait until everything saved so far is stored.

    Raises:
      SaveError: if a save failed, such as for lack of space.
    """
    with self._as_save_error():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _as_save_error(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax raises many kinds.
      raise SaveError(
        f'A checkpoint could not be saved in {self.directory} '
        f'({errors.first_line(error)})'
      ) from error

  def steps(self) -> list[int]:
    """List the steps of the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: state_lib.TrainState) -> None:
    """Save a state under its step, and return once the state may be changed.

    Nothing happens if that step is saved already. Checkpoints that could not be
    read are first renamed to `STEP.unreadable`.

    Raises:
      SaveError: if this or an earlier save in the background failed.
    """
    self._set_aside_unreadable()
    step = int(jax.device_get(state.step))
    if step in self._manager.all_steps():
      return
    host = _to_host(state)
    args = ocp.args.Composite(
      **{
        _STATE: ocp.args.PyTreeSave(host),
        _CHECKSUMS: ocp.args.JsonSave(dict(_checksums(host))),
      }
    )
    with self._as_save_error():
      self._manager.save(step, args=args)

  def restore_latest(
    self, template: state_lib.TrainState
  ) -> state_lib.TrainState | None:
    """Read the newest readable checkpoint as NumPy arrays.

    An unreadable one is reported, and the one before it is used. One that
    cannot be read for an outage of storage, or may not be read, is not passed
    over.

    Args:
      template: tree of arrays or shapes with the expected structure.

    Returns:
      The state, or None if there is no checkpoint.

    Raises:
      UnreadableError: if there are checkpoints but none can be read, or the
        newest that may be intact may not be read.
      OutageError: if the newest that may be intact cannot be read now.
    """
    restore = lambda step: self.restore(step, template)
    return self._read_newest(restore, self.steps())

  def restore_fields(
    self, fields: Sequence[str], step: int | None = None
  ) -> dict[str, Any]:
    """Read some fields of a state with any structure.

    Args:
      fields: names of the fields, such as 'ema_params'.
      step: step of the checkpoint; by default the newest readable one.

    Returns:
      Field -> tree of NumPy arrays.

    Raises:
      UnreadableError: if there is no checkpoint, or none can be read.
      OutageError: if the newest that may be intact cannot be read now.
    """

    def read(step: int) -> dict[str, Any]:
      tree = (
        ocp.PyTreeCheckpointHandler()
        .metadata(self.directory / str(step) / _STATE)
        .tree
      )
      return self.restore(step, {field: tree[field] for field in fields})

    steps = self.steps()
    if step is not None and step not in steps:
      raise UnreadableError(
        f'{self.directory} has no checkpoint {step}, only {steps}'
      )
    state = self._read_newest(read, steps if step is None else [step])
    if state is None:
      raise UnreadableError(f'{self.directory} holds no checkpoint yet')
    return state

  def _read_newest(self, read: Callable[[int], Any], steps: list[int]) -> Any:
    """Read the newest readable checkpoint of `steps`; None if that is empty."""
    for step in reversed(steps):
      try:
        return failures.retry(functools.partial(read, step))
      except Exception as error:  # Orbax raises many kinds.
        reason = errors.first_line(error)
        if failures.is_outage(error):
          raise OutageError(
            f'Checkpoint {step} under {self.directory} cannot be read now '
            f'({reason.removesuffix(".")}). If that stays so, rename its '
            'folder to resume from the one before it'
          ) from error
        if failures.is_denied(error):
          raise UnreadableError(
            f'Checkpoint {step} under {self.directory} may not be read '
            f'({reason.removesuffix(".")}). Change the permissions of its '
            'files, or rename its folder to resume from the one before it.'
          ) from error
        logging.warning('Checkpoint %d cannot be read: %s', step, reason)
        self._unreadable.add(step)
    if not steps:
      return None
    raise UnreadableError(
      f'None of the checkpoints {steps} under {self.directory} can be read '
      f'(the oldest: {reason}). If the disk has no fault, start again in a new '
      'workdir.'
    )

  def restore(self, step: int, template: Any) -> Any:
    """Read one checkpoint as NumPy arrays and check its checksums.

    Args:
      step: step of the checkpoint.
      template: tree of arrays or shapes with the expected structure: a
        `TrainState` or, to read only some of its fields, a dict of these.

    Raises:
      UnreadableError: if a checksum differs. Orbax raises other errors.
    """
    target = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype), template
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          _STATE: ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=isinstance(template, dict),
          ),
          _CHECKSUMS: ocp.args.JsonRestore(),
        }
      ),
    )
    state = restored[_STATE]
    for path, checksum in _checksums(state):
      if restored[_CHECKSUMS].get(path) != checksum:
        raise UnreadableError(f"'{path}' differs from what was saved")
    return state

  def _set_aside_unreadable(self) -> None:
    for step in sorted(self._unreadable):
      names = (f'{step}.unreadable{n or ""}' for n in itertools.count())
      free = (self.directory / name for name in names)
      aside = next(path for path in free if not path.exists())
      (self.directory / str(step)).rename(aside)
    if self._unreadable:
      self._unreadable.clear()
      self._manager.reload()


class NullCheckpoints(contextlib.AbstractContextManager):
  """Replaces `Checkpoints` in all processes except process 0, which saves."""

  def __exit__(self, *error: Any) -> None:
    pass

  def restore_latest(self, template: state_lib.TrainState) -> None:
    """Return None: these processes have no checkpoints."""

  def save(self, state: state_lib.TrainState) -> None:
    """Do nothing."""

  def wait(self) -> None:
    """Do nothing."""


def _to_host(tree: Any) -> Any:
  # A copy, because on CPU device_get may return the buffer that is donated to
  # the next step.
  return jax.tree.map(np.array, jax.device_get(tree))


def _checksums(tree: Any) -> Iterator[tuple[str, int]]:
  for path, leaf in trees.named_leaves(tree):
    yield path, zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data)
