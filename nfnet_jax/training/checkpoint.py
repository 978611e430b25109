"""Saving and restoring the state of a run with Orbax."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import itertools
import logging as std_logging
import os
import pathlib
import re
from typing import Any
import zlib

from absl import logging
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from nfnet_jax import trees
from nfnet_jax.storage import buckets, failures, files
from nfnet_jax.training import state as state_lib

_STATE = 'state'
_CHECKSUMS = 'checksums'
# As Orbax names on a disk what it will rename.
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp.*')


class UnreadableError(ValueError):
  """A checkpoint's contents are not what was saved."""


class OutageError(OSError):
  """Checkpoints could not be read, but perhaps can be at another time."""


class SaveError(OSError):
  """A checkpoint could not be saved; those before it stand."""


class Checkpoints:
  """The checkpoints of a run: `DIR/STEP/`, written in the background.

  A checkpoint appears under its name by an atomic rename once it is complete,
  so that a killed run never leaves half of one. Each holds a checksum of every
  tensor, which is compared on reading. Of several processes the first one
  alone opens them.

  Example:
    >>> import tempfile
    >>> state = state_lib.TrainState(np.int32(7), {}, {}, {}, {}, {})
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...   checkpoints.save(state)
    ...   int(checkpoints.restore_latest(like=state).step)
    7
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep: int = 3,
    *,
    read_only: bool = False,
  ):
    """Opens a folder of checkpoints, a local one or a bucket.

    Args:
      directory: absolute path; made if it is not there.
      keep: how many of the newest checkpoints stay.
      read_only: for those who only restore: nothing is made or removed.

    Raises:
      OSError: if the folder cannot be made, or its bucket not used.
    """
    self.directory = epath.Path(directory)
    self._unreadable: set[int] = set()
    buckets.check(self.directory, to_write=not read_only)
    if not read_only:
      # Orbax does not make it where it is told of `active_processes`.
      self.directory.mkdir(parents=True, exist_ok=True)
      self._remove_unfinished()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        # Orbax's own read_only is as harmless, but complains at length.
        max_to_keep=keep,
        create=False,
        # Other processes hold the same state and do not take part.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}
        ),
      ),
    )

    logging.get_absl_logger().addFilter(self._is_news)

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the last save and lets go of the directory."""
    try:
      with self._as_save_error():
        self._manager.close()
    finally:
      logging.get_absl_logger().removeFilter(self._is_news)

  def _is_news(self, record: std_logging.LogRecord) -> bool:
    """Keeps back tracebacks of Orbax's threads: a `SaveError` follows."""
    path = pathlib.PurePath(record.pathname)
    return not (record.exc_info and 'orbax' in path.parts)

  def wait(self) -> None:
    """Returns once everything saved so far is on disk.

    Raises:
      SaveError: if it cannot be, for want of space perhaps.
    """
    with self._as_save_error():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _as_save_error(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax raises many kinds.
      reason = str(error).partition('\n')[0]
      raise SaveError(
        f'A checkpoint could not be saved in {self.directory} ({reason})'
      ) from error

  def steps(self) -> list[int]:
    """Lists the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: state_lib.TrainState) -> None:
    """Saves a state under its step; returns once the state may be changed.

    Does nothing if that step is saved already. Checkpoints that could not be
    read are moved aside first, as `STEP.unreadable`.

    Raises:
      SaveError: if this or an earlier save, in the background, failed.
    """
    self._set_aside_unreadable()
    host = _to_host(state)
    step = int(host.step)
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(
      **{
        _STATE: ocp.args.PyTreeSave(host),
        _CHECKSUMS: ocp.args.JsonSave(dict(_checksums(host))),
      }
    )
    with self._as_save_error():
      self._manager.save(step, args=args)

  def restore_latest(
    self, like: state_lib.TrainState
  ) -> state_lib.TrainState | None:
    """Reads the newest checkpoint that can be read, as numpy arrays.

    An unreadable one is reported, and the one before it is used.

    Args:
      like: a tree of arrays or shapes of the expected structure.

    Returns:
      The state, or None if there is no checkpoint at all.

    Raises:
      UnreadableError: if there are checkpoints but none can be read.
      OutageError: if none can be, for an outage of at least one.
    """
    return self._newest(lambda step: self.restore(step, like), self.steps())

  def restore_fields(
    self, fields: Sequence[str], step: int | None = None
  ) -> dict[str, Any]:
    """Reads some fields of a state, whatever their structure.

    Args:
      fields: names of the fields, such as 'ema_params'.
      step: which checkpoint; by default the newest that can be read.

    Returns:
      Field -> tree of numpy arrays.

    Raises:
      UnreadableError: if there is no checkpoint, or none can be read.
      OutageError: if none can be, for an outage of at least one.
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
    state = self._newest(read, steps if step is None else [step])
    if state is None:
      raise UnreadableError(f'{self.directory} holds no checkpoint yet')
    return state

  def _newest(self, read: Callable[[int], Any], steps: list[int]) -> Any:
    """Reads the newest of the steps that can be read; None of none."""
    is_outage = False
    for step in reversed(steps):
      try:
        return _patiently(read, step)
      except Exception as error:  # Orbax raises many kinds.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        logging.warning('Checkpoint %d cannot be read: %s', step, reason)
        self._unreadable.add(step)
        is_outage |= failures.is_outage(error)
    if not steps:
      return None
    line = (
      f'None of the checkpoints {steps} under {self.directory} can be read '
      f'(the oldest: {reason})'
    )
    if is_outage:
      raise OutageError(line)
    raise UnreadableError(
      f'{line}. If the disk is well, start again in a new workdir.'
    )

  def restore(self, step: int, like: Any) -> Any:
    """Reads one checkpoint as numpy arrays, and compares its checksums.

    Args:
      step: which.
      like: a tree of arrays or shapes of the expected structure: a `TrainState`
        or, to read no more than some of its fields, a dict of them.
    """
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          _STATE: ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=isinstance(like, dict),
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

  def _remove_unfinished(self) -> None:
    """Removes what saves left that were killed: each up to a whole state.

    On a disk, by its name. In a bucket it has the name of a whole checkpoint
    and lacks the file that Orbax writes last, as does one that was copied there
    from a disk: so there it stays, unseen, until its step is saved again.
    """
    if files.is_in_bucket(self.directory):
      return
    for path in self.directory.iterdir():
      if _UNFINISHED.fullmatch(path.name):
        path.rmtree()

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
  """Stands for `Checkpoints` in processes that leave saving to process 0."""

  def __exit__(self, *error) -> None:
    pass

  def save(self, state: state_lib.TrainState) -> None:
    """Does nothing."""

  def wait(self) -> None:
    """Does nothing."""


def _patiently(read: Callable[[int], Any], step: int) -> Any:
  """Reads twice where the disk, not the contents, may be to blame."""
  try:
    return read(step)
  except OSError:
    return read(step)


def _to_host(tree: Any) -> Any:
  # A copy: on CPU device_get may hand out the very buffer that the next step
  # takes over.
  return jax.tree.map(np.array, jax.device_get(tree))


def _checksums(tree: Any) -> Iterator[tuple[str, int]]:
  for path, leaf in trees.named_leaves(tree):
    yield path, zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data)
