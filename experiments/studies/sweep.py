"""Train the runs of a study in parallel, and resume after an interruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import pathlib
import threading

import pandas as pd
import tqdm

from experiments.studies import datasets, tables, training
from nfnet_jax import errors

RESULTS, STEPS = 'results.csv', 'steps.csv'
# Runs that a worker trains together. More of them share more of the work, and
# more are lost by an interruption.
_GROUP = 8


def sweep(
  runs: Sequence[training.Run], folder: pathlib.Path, workers: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
  """Train the runs that `FOLDER/results.csv` lacks.

  The files are written after every group of runs, so that an interrupted sweep
  continues where it was. `steps.csv` has the steps of the runs that keep them,
  `machine.json` the time that they took, and the processor.

  Args:
    runs: all runs of the study.
    folder: folder of the results.
    workers: processes that train at the same time, each on one core.

  Returns:
    The rows of the runs and the rows of the steps, in the order of `runs`.

  Raises:
    errors.InputError: if the folder has results of other runs.
  """
  results = _Results(folder, runs)
  groups = _groups([run for run in runs if run.key not in results.done])
  if groups:
    for name in {run.settings['dataset'] for group in groups for run in group}:
      datasets.prepare(name)
    with _train(groups, workers) as trained:
      for group, outcome in trained:
        results.add(group, outcome)
  return results.table(RESULTS), results.table(STEPS)


def _groups(
  runs: Sequence[training.Run],
) -> list[tuple[training.Run, ...]]:
  """Split runs into groups that share their batches, programs side by side."""
  groups = []
  runs = sorted(runs, key=lambda run: run.batches)
  for _, same in itertools.groupby(runs, key=lambda run: run.batches):
    while group := tuple(itertools.islice(same, _GROUP)):
      groups.append(group)
  return groups


class _Results:
  """The files of a sweep.

  Attributes:
    done: keys of the runs that the files contain.
  """

  def __init__(self, folder: pathlib.Path, runs: Sequence[training.Run]):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._order = {run.key: index for index, run in enumerate(runs)}
    self._tables = {
      name: tables.read(folder / name) for name in (RESULTS, STEPS)
    }
    self.done = set(self._tables[RESULTS].get('run', ()))
    if self.done - set(self._order):
      raise errors.InputError(
        f'{folder / RESULTS} has results of other runs than those of this '
        'study. Delete it, or give another folder with --out.'
      )

  def add(
    self,
    group: Sequence[training.Run],
    outcome: Sequence[tuple[training.Row, list[training.Row]]],
  ) -> None:
    """Add the rows of a group of runs to the files."""
    self.done |= {run.key for run in group}
    self._extend(
      STEPS,
      [
        {**run.labels, **step, 'run': run.key}
        for run, (_, steps) in zip(group, outcome)
        for step in steps
      ],
    )
    self._extend(
      RESULTS,
      [{**row, 'run': run.key} for run, (row, _) in zip(group, outcome)],
    )
    minutes = self._tables[RESULTS].core_seconds.sum() / 60
    tables.write_machine(self._folder, minutes)

  def _extend(self, name: str, rows: list[training.Row]) -> None:
    if rows:
      table = pd.concat([self._tables[name], pd.DataFrame(rows)])
      order = table['run'].map(self._order)
      table = table.iloc[order.argsort(kind='stable')]
      self._tables[name] = table.reset_index(drop=True)
      tables.write(self._folder / name, self._tables[name])

  def table(self, name: str) -> pd.DataFrame:
    return self._tables[name]


@contextlib.contextmanager
def _train(
  groups: Sequence[tuple[training.Run, ...]], workers: int
) -> Iterator[Iterator[tuple[tuple[training.Run, ...], list]]]:
  """Yield an iterator over groups and their results, and show progress."""
  context = multiprocessing.get_context('spawn')
  cores, progress = context.SimpleQueue(), context.SimpleQueue()
  for core in itertools.islice(itertools.cycle(_cores()), workers):
    cores.put(core)
  total = sum(map(len, groups))
  bar = tqdm.tqdm(
    total=total,
    bar_format='{percentage:3.0f}%|{bar}| {n:.1f}/{total} runs, '
    '{elapsed} elapsed, {remaining} left',
  )

  def show() -> None:
    while (share := progress.get()) is not None:
      bar.update(share)

  thread = threading.Thread(target=show)
  thread.start()
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, context, _start_worker, (cores, progress)
  )
  try:
    futures = {pool.submit(_train_group, group): group for group in groups}
    yield (
      (futures[future], future.result())
      for future in concurrent.futures.as_completed(futures)
    )
  finally:
    pool.shutdown(cancel_futures=True)
    progress.put(None)
    thread.join()
    bar.close()


def _cores() -> list[int | None]:
  """Return the cores that this process may use; None if it cannot choose."""
  if not hasattr(os, 'sched_getaffinity'):
    return [None]
  return sorted(os.sched_getaffinity(0))


def _start_worker(cores, progress) -> None:
  # Small networks gain more from one core per run than from several.
  core = cores.get()
  if core is not None:
    os.sched_setaffinity(0, {core})
  _train_group.report = progress.put


def _train_group(
  group: tuple[training.Run, ...],
) -> list[tuple[training.Row, list[training.Row]]]:
  return training.train_together(group, _train_group.report)
