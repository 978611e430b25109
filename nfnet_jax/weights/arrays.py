"""Read and write `.npz` and safetensors: flat files of arrays and metadata."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import json
import math
import os
from typing import Any, BinaryIO, IO
import zipfile

from etils import epath
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

Arrays = dict[str, np.ndarray]

# Member of an `.npz`, and key of a safetensors header, that holds the metadata.
_METADATA = 'nfnet_jax'
# Kinds of dtypes: float, int, unsigned, bool.
_KINDS = 'fiub'
# A file may unpack to this many times its size, or to this many bytes.
_MAX_RATIO, _MAX_BYTES = 16, 1 << 30


class DamagedError(ValueError):
  """A file is not what it claims to be."""


def read_npz(file: BinaryIO) -> tuple[Arrays, dict[str, Any]]:
  """Read an `.npz` of plain arrays, and its metadata if it has any.

  No member is unpickled. The size that a member declares is compared with the
  size that it has before memory is allocated.

  Args:
    file: open for reading, seekable.

  Returns:
    Name -> array, and the metadata.

  Raises:
    DamagedError: if a member cannot be read; the message names it.
  """
  try:
    with zipfile.ZipFile(file) as archive:
      members = archive.infolist()
      _check_names(members)
      _check_total(members, file)
      arrays = {
        _array_name(member): _read_member(archive, member) for member in members
      }
  except DamagedError:
    raise
  except Exception as error:  # A damaged archive raises many kinds.
    raise DamagedError(f'the .npz is damaged: {error}') from error
  metadata = arrays.pop(_METADATA, None)
  return arrays, {} if metadata is None else _parse_metadata(str(metadata))


def _array_name(member: zipfile.ZipInfo) -> str:
  return member.filename.removesuffix('.npy')


def _check_names(members: list[zipfile.ZipInfo]) -> None:
  names = [_array_name(member) for member in members]
  if any(name.endswith('/data.pkl') for name in names):
    raise DamagedError(
      'this is a checkpoint of PyTorch; save its state_dict as safetensors'
    )
  for name, count in collections.Counter(names).most_common(1):
    if count > 1:
      raise DamagedError(f'the .npz has {name!r} more than once')


def _check_total(members: list[zipfile.ZipInfo], file: BinaryIO) -> None:
  declared = sum(member.file_size for member in members)
  size = file.seek(0, os.SEEK_END)
  if declared > max(_MAX_BYTES, _MAX_RATIO * size):
    raise DamagedError(
      f'the .npz of {size:,} bytes declares {declared:,} bytes of arrays'
    )


def _read_member(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> np.ndarray:
  where = f"the .npz's member {member.filename!r}"
  with archive.open(member) as stream:
    try:
      shape, dtype = _read_header(stream)
    except ValueError as error:
      raise DamagedError(f'{where} is not an array: {error}') from error
    kinds = 'U' if _array_name(member) == _METADATA else _KINDS
    if dtype.kind not in kinds:
      raise DamagedError(f'{where} has the dtype {dtype}; it was not loaded')
    if math.prod(shape) * dtype.itemsize > member.file_size:
      raise DamagedError(
        f'{where} declares an array {dtype}{list(shape)} and has '
        f'{member.file_size:,} bytes'
      )
  with archive.open(member) as stream:
    try:
      return np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
      raise DamagedError(f'{where} is damaged: {error}') from error


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
  version = np.lib.format.read_magic(stream)
  read = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read is None:
    raise ValueError(f'version {version} is unknown')
  shape, _, dtype = read(stream)
  return shape, dtype


def write_npz(
  path: epath.Path,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, Any],
) -> None:
  """Write arrays and metadata to an `.npz`."""
  members: dict[str, Any] = {
    **arrays,
    _METADATA: np.asarray(json.dumps(metadata)),
  }
  with path.open('wb') as file:
    np.savez(file, **members)


def read_safetensors(data: bytes) -> tuple[Arrays, dict[str, Any]]:
  """Read safetensors, and the metadata in their header if there is any.

  Args:
    data: the whole file.

  Returns:
    Name -> array, and the metadata.

  Raises:
    DamagedError: if the data are damaged, or declare more than they hold.
  """
  try:
    arrays = safetensors_numpy.load(data)
  except KeyError as error:
    raise DamagedError(
      f'the safetensors have the dtype {error}; convert them to F32'
    ) from error
  except (safetensors.SafetensorError, ValueError) as error:
    raise DamagedError(f'the safetensors are damaged: {error}') from error
  for name, array in arrays.items():
    if array.dtype.kind not in _KINDS:
      raise DamagedError(f'the tensor {name!r} has the dtype {array.dtype}')
  length = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8 : 8 + length])
  metadata = (header.get('__metadata__') or {}).get(_METADATA)
  return arrays, {} if metadata is None else _parse_metadata(metadata)


def write_safetensors(
  path: epath.Path,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, Any],
) -> None:
  """Write arrays and metadata as safetensors."""
  # Not ascontiguousarray, which adds an axis to scalars.
  arrays = {name: np.asarray(a, order='C') for name, a in arrays.items()}
  path.write_bytes(
    safetensors_numpy.save(arrays, metadata={_METADATA: json.dumps(metadata)})
  )


def _parse_metadata(text: str) -> dict[str, Any]:
  try:
    metadata = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DamagedError(f'the metadata inside are damaged: {error}') from error
  if not isinstance(metadata, dict):
    raise DamagedError('the metadata inside are damaged')
  return metadata
