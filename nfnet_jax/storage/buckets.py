"""Access checks of Google Cloud Storage buckets."""

from __future__ import annotations

import os
from urllib import parse

from nfnet_jax.storage import failures, files

_TO_READ = (
  # Orbax reads the bucket's metadata.
  'storage.buckets.get',
  'storage.objects.get',
  'storage.objects.list',
)
_TO_WRITE = 'storage.objects.create', 'storage.objects.delete'


def check(path: str | os.PathLike, *, to_write: bool) -> None:
  """Check that the bucket of a path exists and grants the needed permissions.

  Paths on a disk always pass. The check is one request. A refused upload would
  take minutes to fail, because TensorFlow retries it.

  Args:
    path: a folder.
    to_write: whether files will be created and deleted there.

  Raises:
    OSError: if a package, the bucket or a permission is missing.
  """
  if not files.is_in_bucket(path):
    return
  try:
    from google.api_core import exceptions
    from google.cloud import storage
  except ImportError as error:
    raise OSError(
      f'{path} needs google-cloud-storage: '
      "pip install -c constraints.txt '.[gcs]'"
    ) from error
  name = parse.urlsplit(os.fspath(path)).netloc
  needed = {*_TO_READ, *(_TO_WRITE if to_write else ())}
  with failures.as_os_error(f"Opening the bucket '{name}'"):
    try:
      granted = storage.Client().bucket(name).test_iam_permissions(needed)
    except exceptions.NotFound as error:
      raise FileNotFoundError(f"There is no bucket '{name}'.") from error
  if missing := needed - set(granted):
    raise PermissionError(
      f"The bucket '{name}' does not grant you {', '.join(sorted(missing))}."
    )
