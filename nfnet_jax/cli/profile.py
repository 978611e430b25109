"""Which steps of a run to trace: a flag, and what is checked of it."""

import re

from absl import flags
from etils import epath

from nfnet_jax import errors

_PROFILE = flags.DEFINE_string(
  'profile',
  None,
  'START:STOP: takes a profiler trace from step START to step STOP, as the log '
  "counts them, into WORKDIR/profile. A run's first step compiles.",
)
FLAGS = ('profile',)


def get_steps() -> range:
  """Returns the steps of `--profile`; none if it is not given.

  Raises:
    errors.InputError: if it is no range, or an empty one.
  """
  text = _PROFILE.value
  if text is None:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or int(match[1]) >= int(match[2]):
    raise errors.InputError(
      f"--profile='{text}' is not START:STOP, two steps of which the first is "
      'the smaller, as in --profile=100:110.'
    )
  return range(int(match[1]), int(match[2]))


def check_total(steps: range, total: int) -> None:
  """Checks that a run is long enough for what is to be traced.

  Raises:
    errors.InputError: if it is not.
  """
  if steps and steps.stop > total:
    raise errors.InputError(
      f'--profile={steps.start}:{steps.stop} goes past the end of the run, '
      f'{total} steps.'
    )


def check_begun(steps: range, workdir: epath.Path) -> None:
  """Checks that a resumed run has what is to be traced before it, or traced.

  Raises:
    errors.InputError: if it is over, and there is no trace of it.
  """
  from nfnet_jax.training import checkpoint, profiling

  folder, saved = profiling.folder_of(workdir, steps), workdir / 'checkpoints'
  if not steps or not saved.is_dir() or folder.is_dir():
    return
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    done = max(checkpoints.steps(), default=0)
  if steps.start < done:
    raise errors.InputError(
      f'--profile={steps.start}:{steps.stop} begins before the step that the '
      f'run resumes from, {done}.'
    )
