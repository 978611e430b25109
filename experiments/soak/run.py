"""Kill and stop a run at random moments, and compare it with one left alone.

  python -m experiments.soak.run --kills 50 --stops 20

Trains on the digits with a checkpoint every four steps. Each time a phase of
the run is chosen, and a process is killed (SIGKILL) or stopped (SIGTERM and
SIGINT in turn) at a random moment of it. Fails if a saved step is lost, or if
metrics or weights differ in a bit from those of the run that was left alone.
Writes results.csv and results.png.
"""

import argparse
import collections
import csv
import itertools
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time

from experiments.soak import attempts
from nfnet_jax import plotting
from nfnet_jax.training import timing

HERE = pathlib.Path(__file__).parent
PHASES = ('starting', *timing.ACTIVITIES[:-1], 'ending')
# Shorter ones cannot be aimed at: most calls that save find nothing to save.
SHORTEST_S = 0.002
# Exit codes after a stop: finished, interrupted and saved, ended by the signal
# before its handler was installed, or by the loss of a process that was.
STOPPED = {0, 1, 75, 130, -signal.SIGTERM, -signal.SIGINT, -signal.SIGABRT}


class Soak:
  """Faults at random moments of runs that go on from one fault to the next."""

  def __init__(self, folder: pathlib.Path, count: int, seed: int):
    """Make the run that is left alone.

    Args:
      folder: for workdirs.
      count: processes of a run.
      seed: of phases and moments.
    """
    self._folder, self._count = folder, count
    self._random = random.Random(seed)
    self._workdirs = (folder / f'run{i}' for i in itertools.count())
    self._saved: list[int] = []
    self.rows: list[dict] = []
    whole = folder / 'whole'
    for _ in range(2):  # The second one finds its programs in the cache.
      shutil.rmtree(whole, ignore_errors=True)
      attempt = attempts.Attempt(whole, count)
      if any(attempt.finish()):
        raise RuntimeError(attempt.output)
    self._reference = attempts.results(whole)
    self._durations = _durations(attempt.phases())
    self._workdir = next(self._workdirs)

  def fault(self, number: int) -> None:
    """Send a signal at a random moment; repeat until the run was running."""
    while not self._try(number):
      pass

  def _try(self, number: int) -> bool:
    phase = self._random.choice(PHASES)
    durations = self._durations[phase]
    left = 1 - max(self._saved, default=0) / attempts.STEPS
    occurrence = self._random.randrange(max(1, int(left * len(durations))))
    victim = self._random.randrange(self._count)
    began = time.time()
    attempt = attempts.Attempt(self._workdir, self._count)
    reached = attempt.wait_for(phase, occurrence + 1, SHORTEST_S)
    time.sleep(self._random.uniform(0, durations[occurrence]))
    if reached and attempt.processes[victim].poll() is None:
      now, names = time.time(), [name for _, name in attempt.phases()]
      name = names[-1] if names else 'starting'
      saved = attempts.saved_steps(self._workdir)
      # At a start, what an earlier fault left unfinished lies there.
      is_writing = name != 'starting' and attempts.is_writing(self._workdir)
      attempt.processes[victim].send_signal(number)
      codes = attempt.finish()
      self._check(attempt, codes, number, saved)
      lost = now - max(began, attempts.last_save(self._workdir))
      self.rows.append(
        {
          'processes': self._count,
          'signal': signal.Signals(number).name,
          'phase': name,
          'writing': 'yes' if is_writing else 'no',
          'codes': ' '.join(map(str, codes)),
          'saved_step': max(attempts.saved_steps(self._workdir), default=''),
          'lost_s': f'{max(lost, 0):.2f}',
        }
      )
      print(*self.rows[-1].values(), flush=True)
      if 0 not in codes:
        return True
      reached = True  # The signal came too late; the run has finished.
    else:
      codes = attempt.finish()
      self._check(attempt, codes, 0, [])
      reached = False
    if 0 in codes:
      self._complete()
    return reached

  def _check(
    self,
    attempt: attempts.Attempt,
    codes: list[int],
    number: int,
    saved: list[int],
  ) -> None:
    """Check exit codes, and that every step that was saved is still there."""
    if number == signal.SIGKILL:
      is_expected = not set(codes) & {2}
    else:
      is_expected = set(codes) <= (STOPPED if number else {0})
    resumed = f'Resuming after step {max(self._saved, default=0)}.'
    output = attempt.output
    if self._saved and 'step ' in output and resumed not in output:
      is_expected = False
    self._saved = attempts.saved_steps(self._workdir)
    if not is_expected or not set(saved) <= set(self._saved):
      raise AssertionError(f'{codes}, {saved}, {self._saved}: {output}')

  def _complete(self) -> None:
    """Compare a finished run, and begin another one."""
    attempts.assert_equal(self._workdir, self._reference)
    shutil.rmtree(self._workdir)
    self._workdir, self._saved = next(self._workdirs), []

  def finish(self) -> None:
    """Let the last run finish, and compare it."""
    attempt = attempts.Attempt(self._workdir, self._count)
    self._check(attempt, attempt.finish(), 0, [])
    self._complete()


def _durations(phases: list[tuple[float, str]]) -> dict[str, list[float]]:
  """Return how long each phase lasted, each time that it was long enough."""
  durations = {name: [] for name in PHASES}
  for (began, name), (ended, _) in itertools.pairwise(phases):
    if ended - began >= SHORTEST_S:
      durations[name].append(ended - began)
  return {name: values or [0.2] for name, values in durations.items()}


def draw(rows: list[dict], path: pathlib.Path) -> None:
  """Draw how many signals hit each phase, and the seconds lost per signal."""
  figure, axes = plotting.subplots(
    1, 2, figsize=(9, 3.2), layout='constrained', squeeze=False
  )
  bars, losses = axes.flat
  kinds = sorted({row['signal'] for row in rows})
  below = collections.Counter()
  for kind in kinds:
    hits = collections.Counter(r['phase'] for r in rows if r['signal'] == kind)
    counts = [hits[phase] for phase in PHASES]
    bars.barh(PHASES, counts, left=[below[p] for p in PHASES], label=kind)
    below.update(hits)
  bars.set_xlabel('signals')
  bars.legend(fontsize=8)
  lost = [[float(r['lost_s']) for r in rows if r['signal'] == k] for k in kinds]
  losses.hist(lost, bins=20, stacked=True)
  losses.set_xlabel('seconds since the start or the last checkpoint')
  losses.set_ylabel('signals')
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--stops', type=int, default=20)
  parser.add_argument('--processes', type=int, nargs='+', default=[1, 2])
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  args = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  rows = []
  for count in args.processes:
    with tempfile.TemporaryDirectory() as folder:
      os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{folder}/programs'
      os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
      soak = Soak(pathlib.Path(folder), count, args.seed)
      for _ in range(args.kills):
        soak.fault(signal.SIGKILL)
      for index in range(args.stops):
        soak.fault(signal.SIGINT if index % 2 else signal.SIGTERM)
      soak.finish()
      rows += soak.rows
  args.out.mkdir(parents=True, exist_ok=True)
  with (args.out / 'results.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  draw(rows, args.out / 'results.png')
  print(f'{len(rows)} signals; no saved step lost, all results equal.')


if __name__ == '__main__':
  main()
