"""What every door shares: how it starts, what it says, exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and saved.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import pathlib
import sys
import threading
import time
import traceback

from absl import app, flags, logging

from nfnet_jax.experiments import errors, naming

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75


def run(
  main: Callable[..., int | None],
  argv: Sequence[str] | None = None,
  *,
  on_a_run: bool = False,
  takes: str = '',
) -> None:
  """Runs a door: parses flags, calls `main`, and exits with its code.

  Args:
    main: the door; reads its flags itself.
    argv: the command line; the process's own by default.
    on_a_run: whether `--config` defaults to that of the run in `--workdir`.
    takes: name of the argument that stands without a flag and that `main` gets:
      in brackets if it may be left out, with dots if there may be several; ''
      for none.
  """
  logging.set_verbosity(logging.WARNING)
  argv = list(sys.argv if argv is None else argv)

  def guarded(unparsed: Sequence[str]):
    if naming.LIST.value:
      print(naming.config_table())
      return 0
    try:
      arguments = unparsed[1:]
      if takes and not arguments and not takes.startswith('['):
        raise errors.InputError(f'Say which: {takes} is missing.')
      most = None if '...' in takes else bool(takes)
      if most is not None and (unexpected := arguments[most:]):
        raise errors.InputError(f"Unexpected argument '{unexpected[0]}'.")
      return main(*arguments)
    except errors.InputError as error:
      return _complain(error)
    except errors.RunError as error:
      _complain(error)
      return EXIT_FAILED
    except KeyboardInterrupt:
      print('nfnet_jax: Interrupted.', file=sys.stderr)
      return EXIT_FAILED

  try:
    argv = naming.with_config_path(argv)
    if on_a_run:
      argv = naming.with_saved_config(argv)
  except errors.InputError as error:
    sys.exit(_complain(error))
  sys.argv = argv  # config_flags looks for overrides there.
  app.run(guarded, argv=argv, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(list(argv))
  except (flags.Error, errors.InputError) as error:
    sys.exit(_complain(error))
  except Exception as error:  # A config file may raise anything.
    place = traceback.extract_tb(error.__traceback__)[-1]
    if _is_of_flags(place.filename):
      sys.exit(_complain(error))
    said = f'{type(error).__name__}: {error}'
    where = f'{place.filename}:{place.lineno}'
    sys.exit(_complain(errors.InputError(f'{where}: {said}')))


def _is_of_flags(filename: str) -> bool:
  return bool({'absl', 'ml_collections'} & set(pathlib.Path(filename).parts))


def _complain(error: Exception) -> int:
  print(f'nfnet_jax: {one_line(error)}', file=sys.stderr)
  return EXIT_BAD_INPUT


def one_line(error: BaseException) -> str:
  """Flattens what absl and ml_collections raise for a bad flag."""
  while error.args and isinstance(error.args[0], BaseException):
    error = error.args[0]
  text = str(error.args[0] if error.args else error)
  if 'Traceback' in text:  # A config file that failed, quoted whole.
    text = text.strip().splitlines()[-1]
  line = ' '.join(text.split())
  if isinstance(error, (AttributeError, KeyError)):
    line = f'The config has no such key: {line}'
  return line


def say(text: str) -> None:
  """Tells a person something; standard output is for results."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
  """Shows that something long is under way, and for how long it has been.

  On a terminal the line counts seconds, elsewhere one comes every minute.
  """
  import tqdm

  done, start = threading.Event(), time.monotonic()
  bar = tqdm.tqdm(
    bar_format='{desc} {elapsed}',
    desc=text,
    leave=False,
    disable=not sys.stderr.isatty(),
  )

  def tick():
    while not done.wait(60 if bar.disable else 1):
      if bar.disable:
        say(f'{text} {(time.monotonic() - start) / 60:.0f} min')
      else:
        bar.refresh()

  if bar.disable:
    say(text)
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    bar.close()
