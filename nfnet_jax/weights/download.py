"""Fetch trained networks by name or address, once, into a cache."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from typing import Any
from urllib import parse

from etils import epath

from nfnet_jax import errors
from nfnet_jax.storage import files

PUBLISHED_URL = 'https://storage.googleapis.com/dm-nfnets/{}_haiku.npz'
# MD5 of the published file of each model, as recorded by a third party.
PUBLISHED_MD5 = {
  'nfnet_f0': '0a41039da1cb43adf47f1b7d86ddfe0f',
  'nfnet_f1': 'c9126bbfaf855f9ddb7ff3b902558781',
  'nfnet_f2': '7a018d8d1498020e2f5a8719a1e7f53f',
  'nfnet_f3': 'd8e1e78d26db659c486150dbaccbe78a',
  'nfnet_f4': 'f5974a7e3388aa81b91a9f1403e759a4',
  'nfnet_f5': '8639e925de951030651ac775b9f915c3',
  'nfnet_f6': 'b16cca40ac1ecec2bd5e3273866da0c1',
}
# Model -> its repository on the Hugging Face hub.
PUBLISHED_HUB = {
  'nfnet_l0': 'hf:timm/nfnet_l0.ra2_in1k',
  'eca_nfnet_l0': 'hf:timm/eca_nfnet_l0.ra2_in1k',
  'eca_nfnet_l1': 'hf:timm/eca_nfnet_l1.ra2_in1k',
  'eca_nfnet_l2': 'hf:timm/eca_nfnet_l2.ra3_in1k',
}
_HUB = re.compile(
  r'hf:(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<at>.+))?'
)
_HUB_FILE = 'model.safetensors'
_SECONDS = 30  # Without an answer.
_CHUNK = 1 << 16


def is_remote(name: str | os.PathLike) -> bool:
  """Return whether weights are fetched from elsewhere: by name or address.

  A file or folder of the same name comes first.

  Examples:
    >>> [is_remote(name) for name in ('F0', 'hf:timm/a', 'runs/digits')]
    [True, True, False]
  """
  text = str(name)
  if text.startswith(('http://', 'https://', 'hf:')):
    return True
  return _published(text) is not None and not os.path.exists(text)


def locate(name: str | os.PathLike) -> epath.Path:
  """Return the path of weights, which are fetched unless they are in the cache.

  Args:
    name: a path, which is returned as it is; the name of a model whose weights
      are published, such as 'nfnet_f0', 'F0' or 'eca_nfnet_l0'; an address,
      https://...; or a file of the Hugging Face hub,
      hf:OWNER/REPO[/FILE][@REVISION], by default its model.safetensors.

  Raises:
    ValueError: if they cannot be fetched; one line with the reason.
  """
  text = str(name)
  if not is_remote(text):
    return epath.Path(name)
  model = _published(text)
  if text.startswith('hf:') or model in PUBLISHED_HUB:
    return epath.Path(_from_hub(PUBLISHED_HUB.get(model or '', text)))
  url = PUBLISHED_URL.format(model[-2:].upper()) if model else text
  for known, md5 in PUBLISHED_MD5.items():
    if url == PUBLISHED_URL.format(known[-2:].upper()):
      return epath.Path(_from_address(url, f'md5:{md5}'))
  return epath.Path(_from_address(url, None))


def _published(name: str) -> str | None:
  """Return the model whose published weights a name means."""
  for model in (name.lower(), f'nfnet_{name.lower()}'):
    if model in PUBLISHED_MD5 or model in PUBLISHED_HUB:
      return model
  return None


def _from_address(url: str, checksum: str | None) -> str:
  import pooch
  import requests

  pooch.get_logger().setLevel('WARNING')
  folder = files.cache_folder('weights')
  # The same file name may come from several addresses.
  short = hashlib.sha256(url.encode()).hexdigest()[:8]
  # Without a query, which may be long.
  last = parse.urlsplit(url).path.rstrip('/').rpartition('/')[2]
  file = f'{short}-{last[-100:]}'
  download = _Download(folder / f'{file}.part', resume=checksum is not None)
  try:
    return pooch.retrieve(url, checksum, file, folder, downloader=download)
  except (OSError, ValueError) as error:
    if 'timed out' in str(error):  # Several types of errors say so.
      reason = f'no answer for {_SECONDS} s'
    elif isinstance(error, requests.ConnectionError):
      reason = 'no connection'
    elif isinstance(error, requests.exceptions.ChunkedEncodingError):
      reason = 'the connection ended early'
    else:
      reason = errors.first_line(error)
    reason = reason.removesuffix('.')
    raise ValueError(
      f"'{url}' could not be downloaded: {reason}. Try again, "
      'or download it in another way and name the file'
    ) from error


class _Download:
  """A downloader of pooch, which checks the checksum and renames the file.

  What an interrupted download has fetched is kept, and continued if a checksum
  can show that the parts belong together.
  """

  def __init__(self, part: pathlib.Path, resume: bool):
    self._part, self._resume = part, resume

  def __call__(self, url: str, output_file: Any, pooch: Any) -> None:
    import requests
    import tqdm

    size = 0
    if self._resume and self._part.exists():
      size = self._part.stat().st_size
    # Not compressed, so that the length is that of the file.
    headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={size}-'}
    with requests.get(
      url, headers=headers, stream=True, timeout=_SECONDS
    ) as response:
      if response.status_code == 416:  # The part is complete.
        self._part.replace(output_file)
        return
      response.raise_for_status()
      if response.status_code != 206:
        size = 0
      length = response.headers.get('Content-Length')
      total = None if length is None else size + int(length)
      with (
        self._part.open('ab' if size else 'wb') as file,
        tqdm.tqdm(
          desc=self._part.stem,
          initial=size,
          total=total,
          unit='B',
          unit_scale=True,
          disable=None,
        ) as progress,
      ):
        for chunk in response.iter_content(_CHUNK):
          file.write(chunk)
          progress.update(len(chunk))
    self._part.replace(output_file)


def _from_hub(name: str) -> str:
  match = _HUB.fullmatch(name)
  if not match:
    raise ValueError(f"'{name}' is not hf:OWNER/REPO[/FILE][@REVISION]")
  import huggingface_hub

  repo, file, revision = match['repo'], match['file'] or _HUB_FILE, match['at']
  try:
    return huggingface_hub.hf_hub_download(repo, file, revision=revision)
  # Its errors have several bases, and messages of many lines.
  except Exception as error:
    raise ValueError(
      f"'{name}' could not be downloaded: {errors.first_line(error)}"
    ) from error
