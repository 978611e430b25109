"""The flag `--profile`: which steps of a run to trace."""

from __future__ import annotations

import re

from absl import flags
from etils import epath

from nfnet_jax import errors
from nfnet_jax.storage import run_files

_PROFILE = flags.DEFINE_string(
  'profile',
  None,
  'START:STOP: write a profiler trace of step START to step STOP, as counted '
  'in the log, to WORKDIR/profile. The first step of a run compiles.',
)
FLAGS = ('profile',)


def get_steps() -> range:
  """Return the steps of `--profile`, none if it is not given.

  Raises:
    errors.InputError: if it is not a range, or an empty one.
  """
  text = _PROFILE.value
  if text is None:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or int(match[1]) >= int(match[2]):
    raise errors.InputError(
      f"--profile='{text}' is not START:STOP. Give two steps, the smaller one "
      'first, as in --profile=100:110.'
    )
  return range(int(match[1]), int(match[2]))


def check_total(steps: range, total: int) -> None:
  """Check that a run is long enough for the trace.

  Raises:
    errors.InputError: if it is not.
  """
  if steps and steps.stop > total:
    raise errors.InputError(
      f'--profile={steps.start}:{steps.stop} goes past the end of the run, '
      f'{total} steps.'
    )


def check_not_passed(steps: range, workdir: epath.Path) -> None:
  """Check that a resumed run will reach the steps, or has traced them.

  Raises:
    errors.InputError: if it has passed them without a trace.
  """
  from nfnet_jax.training import checkpoint, profiling  # Orbax is slow.

  folder = profiling.folder_of(workdir, steps)
  saved = workdir / run_files.CHECKPOINTS
  if not steps or not saved.is_dir() or folder.is_dir():
    return
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    done = max(checkpoints.steps(), default=0)
  if steps.start < done:
    raise errors.InputError(
      f'--profile={steps.start}:{steps.stop} begins before step {done}, from '
      'which the run resumes.'
    )
