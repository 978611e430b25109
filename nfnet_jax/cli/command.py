"""What every door shares: how it starts, what it says, exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and saved.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import sys
import threading
import time
import traceback

from absl import app, flags, logging

from nfnet_jax import errors
from nfnet_jax.config import lookup

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75

# Flag -> the settings that say the same to doors that take a configuration.
_SETTINGS = {
  'weights': ('weights',),
  'timm_forward': ('model.timm_forward',),
  'size': ('data.image_size', 'data.eval_size'),
  'dataset': ('dataset',),
  'split': ('data.train_split', 'data.eval_split'),
  'data_dir': ('run.data_dir',),
}


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
  _set_environment()
  logging.set_verbosity(logging.WARNING)
  argv = list(sys.argv if argv is None else argv)

  def guarded(unparsed: Sequence[str]):
    try:
      _check_flags(main.__module__)
      if lookup.LIST.value:
        print(lookup.config_table())
        return 0
      arguments = unparsed[1:]
      if takes and not arguments and not takes.startswith('['):
        raise errors.InputError(f'Say which: {takes} is missing.')
      most = None if '...' in takes else bool(takes)
      if most is not None and (unexpected := arguments[most:]):
        raise errors.InputError(f"Unexpected argument '{unexpected[0]}'.")
      return main(*arguments)
    except errors.InputError as error:
      return _report(error)
    except errors.RunError as error:
      _report(error)
      return EXIT_FAILED
    except KeyboardInterrupt:
      print('nfnet_jax: Interrupted.', file=sys.stderr)
      return EXIT_FAILED

  try:
    argv = lookup.with_config_path(argv)
    if on_a_run:
      argv = lookup.with_saved_config(argv)
  except errors.InputError as error:
    sys.exit(_report(error))
  sys.argv = argv  # config_flags looks for overrides there.
  app.run(guarded, argv=argv, flags_parser=_parse)


def _set_environment() -> None:
  """Silence TensorFlow's start-up messages, unless the user set the variables.

  TensorFlow reads them when it is imported.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # The default, 1, logs that it is in use.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


def _check_flags(module: str) -> None:
  """Checks that a door takes the flags that it was given.

  absl parses whatever an imported module defines, if nobody reads it.

  Raises:
    errors.InputError: with the first that it does not take, and the way out.
  """
  known = flags.FLAGS
  key = known.get_key_flags_for_module(sys.modules[module])
  taken = {flag.name for flag in key}
  for name in known:
    root = name.partition('.')[0]
    of_doors = 'nfnet_jax' in known.find_module_defining_flag(root, '')
    if known[name].present and of_doors and root not in taken:
      is_script = module == '__main__'
      run_command = pathlib.Path(sys.argv[0]).stem if is_script else module
      raise errors.InputError(
        f'{run_command.rpartition(".")[2]} takes no --{root}'
        f'{_way_out(known[name], taken)}'
      )


def _way_out(flag: flags.Flag, taken: set[str]) -> str:
  settings = _SETTINGS.get(flag.name, ()) if 'config' in taken else ()
  if settings:
    instead = [f'--config.{name}={flag.value}' for name in settings]
    return f': use {" or ".join(instead)}.'
  return f'; it takes {", ".join(f"--{name}" for name in sorted(taken))}.'


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(list(argv))
  except (flags.Error, errors.InputError) as error:
    sys.exit(_report(error))
  except errors.RunError as error:  # Of the workdir whose config it takes.
    _report(error)
    sys.exit(EXIT_FAILED)
  except Exception as error:
    if not _is_of_flags(error):
      error = lookup.raised_by_file(error)
    elif isinstance(error, AttributeError) and error.name == 'get_config':
      error = lookup.without_get_config(error.obj.__file__)
    sys.exit(_report(error))


def _is_of_flags(error: Exception) -> bool:
  place = traceback.extract_tb(error.__traceback__)[-1]
  parts = pathlib.Path(place.filename).parts
  return bool({'absl', 'ml_collections'} & set(parts))


def _report(error: Exception) -> int:
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


def log(text: str) -> None:
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
        log(f'{text} {(time.monotonic() - start) / 60:.0f} min')
      else:
        bar.refresh()

  if bar.disable:
    log(text)
  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    bar.close()
