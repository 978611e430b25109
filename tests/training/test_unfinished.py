"""Unfinished checkpoints in a bucket are told by their metadata."""

import json
import time

from etils import epath
import pytest

from nfnet_jax.training import unfinished

NOW, BEFORE = time.time_ns(), time.time_ns() - 10**9 * 7200
# Metadata, and whether the file that is written last is there.
KEPT = {
  'complete': ({'init': BEFORE, 'commit': BEFORE + 1}, True),
  'copied': ({'init': BEFORE, 'commit': BEFORE + 1}, False),
  'said complete': ({'init': BEFORE, 'commit': None}, True),
  'young': ({'init': NOW, 'commit': None}, False),
  'no times': ({'init': None, 'commit': None}, False),
  'damaged': (None, False),
}
ABANDONED = {'init': BEFORE, 'commit': None}


def checkpoint_in(bucket, step, times, is_complete):
  """Put a checkpoint into a bucket; without times its metadata are damaged."""
  folder = f'run/{step}'
  text = json.dumps(
    {f'{k}_timestamp_nsecs': v for k, v in (times or {}).items()}
  )
  bucket[f'{folder}/_CHECKPOINT_METADATA'] = text.encode()[
    : 9 if not times else None
  ]
  for part in 'checksums/metadata', 'state/d/abc', 'state/manifest.ocdbt':
    bucket[f'{folder}/{part}'] = b'bytes'
  if is_complete:
    bucket[f'{folder}/commit_success.txt'] = b'done'


@pytest.mark.slow
def test_only_saves_of_long_ago_are_removed(buckets):
  bucket = buckets.objects['unfinished'] = {}
  for step, (times, is_complete) in enumerate(KEPT.values()):
    checkpoint_in(bucket, step, times, is_complete)
  bucket['run/77/state/d/abc'] = b'no metadata'
  kept = dict(bucket)
  checkpoint_in(bucket, 99, ABANDONED, False)
  unfinished.remove(epath.Path('gs://unfinished/run'))
  assert {n: v for n, v in bucket.items() if not n.endswith('/')} == kept


@pytest.mark.slow
def test_a_removal_that_fails_goes_on_later(buckets):
  bucket = buckets.objects['unfinished'] = {}
  checkpoint_in(bucket, 99, ABANDONED, False)
  buckets.fault = lambda method, path: (
    403
    if method == 'DELETE' and path == 'run/99/state/manifest.ocdbt'
    else None
  )
  directory = epath.Path('gs://unfinished/run')
  with pytest.raises(Exception, match='could not fully delete'):
    unfinished.remove(directory)
  assert 'run/99/_CHECKPOINT_METADATA' in bucket
  buckets.clear_faults()
  unfinished.remove(directory)
  assert not [name for name in bucket if name.startswith('run/99/')]
