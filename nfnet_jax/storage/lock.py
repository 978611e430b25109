"""A lock on a folder, so that only one run at a time writes there."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any
from urllib import parse
import uuid

from absl import logging
from etils import epath

from nfnet_jax import errors
from nfnet_jax.storage import failures, files

FILE = 'lock.json'
# In a bucket: seconds between two renewals, and the age at which a lock no
# longer counts. On a disk the system releases a lock when its process ends.
_RENEW_S, _EXPIRE_S = 20, 120
_POLL_S = 1
# Errors of file systems that have no locks.
_NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
  """Lock a folder while the context is open, and create it if there is none.

  The lock of a process that has ended does not count. In a bucket, this is
  known if it ended on this host; else the call waits until the lock expires.
  File systems without locks are not protected.

  Args:
    folder: on a disk or in a bucket.

  Raises:
    errors.RunError: if another process has locked the folder; names it.
    OSError: if the lock cannot be written.
  """
  path = epath.Path(folder) / FILE
  with failures.as_os_error(f'Making {folder}'):
    path.parent.mkdir(parents=True, exist_ok=True)
  lock = _lock_object if files.is_in_bucket(path) else _lock_file
  with lock(path):
    yield


@contextlib.contextmanager
def _lock_file(path: epath.Path) -> Iterator[None]:
  file = _open_locked(pathlib.Path(path))
  with file:
    file.truncate(0)
    file.write(json.dumps(_myself()) + '\n')
    file.flush()
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def _open_locked(path: pathlib.Path) -> Any:
  """Return the file, opened and locked by this process."""
  while True:
    file = path.open('a+')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      with file:
        raise _held_error(path, _parse(file.read())) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
    # Its last holder may have deleted it after it was opened here.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()


@contextlib.contextmanager
def _lock_object(path: epath.Path) -> Iterator[None]:
  from google.cloud import storage

  bucket, name = parse.urlsplit(os.fspath(path))[1:3]
  blob = storage.Client().bucket(bucket).blob(name.removeprefix('/'))
  lock = _ObjectLock(blob, _myself())
  with failures.as_os_error(f'Locking {path}'):
    generation = _free_generation(blob)
    is_mine = generation is not None and lock.write(generation)
    holder = lock.holder if is_mine else _read(blob)
  if not is_mine:
    raise _held_error(path, holder)
  ended = threading.Event()
  renewal = threading.Thread(
    target=_renew, args=(path, lock, ended), daemon=True
  )
  renewal.start()
  try:
    yield
  finally:
    ended.set()
    renewal.join()
    with contextlib.suppress(Exception):  # It expires.
      blob.delete(if_generation_match=lock.generation)


def _free_generation(blob: Any) -> int | None:
  """Return the generation that a new lock may replace, 0 if there is no lock.

  Waits until the lock that is there expires; None if it is renewed instead.
  """
  seen = None
  while blob.exists():
    blob.reload()
    if seen is not None and blob.generation != seen:
      return None
    age = datetime.datetime.now(datetime.UTC) - blob.updated
    if age.total_seconds() > _EXPIRE_S or _has_ended(_read(blob)):
      return blob.generation
    if seen is None:
      logging.warning('Waiting until the lock of another process expires.')
    seen = blob.generation
    time.sleep(_POLL_S)
  return 0


@dataclasses.dataclass
class _ObjectLock:
  """A lock in a bucket.

  Attributes:
    blob: its object.
    holder: what it says of this process.
    generation: the object's, as this process last wrote it. That of `blob` may
      be another process's.
  """

  blob: Any
  holder: dict[str, Any]
  generation: int = 0

  def write(self, generation: int) -> bool:
    """Write the lock if it has this generation; return whether it is mine."""
    from google.api_core import exceptions

    text = json.dumps(self.holder)
    try:
      self.blob.upload_from_string(text, if_generation_match=generation)
    except exceptions.PreconditionFailed:
      # The response to an upload that succeeded may have been lost.
      self.blob.reload()
      if _read(self.blob) != self.holder:
        return False
    self.generation = self.blob.generation
    return True


def _renew(path: epath.Path, lock: _ObjectLock, ended: threading.Event) -> None:
  """Renew the lock until `ended`; end the process if another one has it.

  That can happen to a process that was stopped for longer than a lock lasts.
  What it would write now would damage the other's run.
  """
  while not ended.wait(_RENEW_S):
    with contextlib.suppress(Exception):  # An outage: the next try may succeed.
      if not lock.write(lock.generation):
        print(
          f'nfnet_jax: Another process has taken over {path}.',
          file=sys.stderr,
          flush=True,
        )
        os._exit(1)


def _read(blob: Any) -> dict[str, Any]:
  return _parse(blob.download_as_bytes())


def _parse(text: str | bytes) -> dict[str, Any]:
  """Return a lock's contents; none if it is damaged or being written."""
  try:
    holder = json.loads(text)
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def _myself() -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {
    'host': socket.gethostname(),
    'process': os.getpid(),
    'since': now.isoformat(sep=' ', timespec='seconds'),
    'id': uuid.uuid4().hex,
  }


def _has_ended(holder: dict[str, Any]) -> bool:
  """Return whether a lock's process is known to have ended on this host."""
  if holder.get('host') != socket.gethostname():
    return False
  try:
    os.kill(int(holder['process']), 0)
  except ProcessLookupError:
    return True
  except (KeyError, OSError, TypeError, ValueError):
    pass
  return False


def _held_error(path: os.PathLike, holder: dict[str, Any]) -> errors.RunError:
  who = 'another process'
  if holder:
    who = (
      f'process {holder.get("process")} on {holder.get("host")} since '
      f'{holder.get("since")}'
    )
  folder = os.path.dirname(os.fspath(path))
  return errors.RunError(
    f"'{folder}' is in use by {who}. Wait until it ends, or use another "
    '--workdir.'
  )
