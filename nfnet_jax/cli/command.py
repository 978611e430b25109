"""How every command starts and ends.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import pathlib
import sys
import threading
import time
from typing import NoReturn

from absl import app, flags, logging

from nfnet_jax import errors
from nfnet_jax.cli import config_flag
from nfnet_jax.config import base, lookup

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75

LogFn = Callable[[str], None]

# Flag of some commands -> the settings that commands with a configuration have
# instead.
_SETTINGS = {
  'weights': ('weights',),
  'timm_forward': ('model.timm_forward',),
  'size': ('data.image_size', 'data.eval_size'),
  'dataset': ('dataset',),
  'split': ('data.train_split', 'data.eval_split'),
  'data_dir': ('run.data_dir',),
  'batch_size': ('batch_size',),
}


def run(
  main: Callable[..., int | None],
  argv: Sequence[str] | None = None,
  *,
  on_a_run: bool = False,
  takes: str = '',
) -> NoReturn:
  """Run a command: parse flags, call `main`, and exit with its code.

  Args:
    main: the command, which reads its flags; returns an exit code, None for 0.
    argv: the command line; by default that of the process.
    on_a_run: whether `--config` defaults to that of the run in `--workdir`.
    takes: name of the argument that `main` gets: in brackets if it is optional,
      with dots if there may be several; '' for none.
  """
  _set_environment()
  logging.set_verbosity(logging.WARNING)
  argv = list(sys.argv if argv is None else argv)
  argv = ['--help' if word == '-h' else word for word in argv]

  def call_main(unparsed: Sequence[str]) -> int | None:
    try:
      _check_flags(main.__module__)
      if config_flag.LIST.value:
        print(lookup.format_table())
        return 0
      if config_flag.PRINT.value:
        print(config_flag.format_resolved())
        return 0
      with errors.naming_extras():
        return main(*_check_arguments(unparsed[1:], takes))
    except errors.InputError as error:
      return _report(error)
    except errors.RunError as error:
      _report(error)
      return EXIT_FAILED
    except KeyboardInterrupt:
      log('nfnet_jax: Interrupted.')
      return EXIT_FAILED

  try:
    argv = config_flag.with_path(argv)
    if on_a_run:
      argv = config_flag.with_run_config(argv)
  except errors.InputError as error:
    sys.exit(_report(error))
  sys.argv = argv  # config_flags looks for overrides there.
  with ending_with_reader():
    app.run(call_main, argv=argv, flags_parser=_parse)
  raise AssertionError('app.run does not return')


@contextlib.contextmanager
def ending_with_reader() -> Iterator[None]:
  """Exit without a traceback if a pipe's reader ends first, as `head` does."""
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Or Python would report the text that it cannot write at the exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(EXIT_FAILED)


def _check_arguments(given: Sequence[str], takes: str) -> Sequence[str]:
  if takes and not given and not takes.startswith('['):
    raise errors.InputError(f'The argument {takes} is missing.')
  maximum = len(given) if '...' in takes else int(bool(takes))
  if unexpected := given[maximum:]:
    raise errors.InputError(f"Unexpected argument '{unexpected[0]}'.")
  return given


def _set_environment() -> None:
  """Silence TensorFlow's start-up messages, unless the user set the variables.

  TensorFlow reads them when it is imported.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  # The default, 1, logs that it is in use.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


def _check_flags(module: str) -> None:
  """Check that a command takes the flags that it was given.

  absl accepts every flag that an imported module defines, even if nobody reads
  it.

  Raises:
    errors.InputError: naming the first flag that it does not take.
  """
  known = flags.FLAGS
  key_flags = known.get_key_flags_for_module(sys.modules[module])
  taken = {flag.name for flag in key_flags}
  for name in known:
    root = name.partition('.')[0]
    is_ours = 'nfnet_jax' in (known.find_module_defining_flag(root) or '')
    if known[name].present and is_ours and root not in taken:
      raise errors.InputError(
        f'{_command_name(module)} takes no --{root}'
        f'{_alternative(known[name], taken)}'
      )


def _command_name(module: str) -> str:
  is_script = module == '__main__'
  name = pathlib.Path(sys.argv[0]).stem if is_script else module
  return name.rpartition('.')[2]


def _alternative(flag: flags.Flag, taken: set[str]) -> str:
  names = _SETTINGS.get(flag.name, ()) if 'config' in taken else ()
  if names:
    instead = [f'--config.{name}={flag.value}' for name in names]
    return f': use {" or ".join(instead)}.'
  return f'; it takes {", ".join(f"--{name}" for name in sorted(taken))}.'


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(list(argv))
  except SystemExit:  # absl's --help and its variants exit with 1.
    if any(word.lstrip('-').startswith('help') for word in argv):
      sys.exit(0)
    raise
  except flags.UnrecognizedFlagError as error:
    sys.exit(_report(_unknown_flag(error)))
  except flags.Error as error:
    sys.exit(_report(_explain_flag_error(error)))
  except errors.InputError as error:
    sys.exit(_report(error))
  except errors.RunError as error:  # From the workdir whose config it takes.
    _report(error)
    sys.exit(EXIT_FAILED)
  except BrokenPipeError:  # From printing the help.
    raise
  except Exception as error:
    sys.exit(_report(_explain_config_error(error, argv)))


def _unknown_flag(error: flags.UnrecognizedFlagError) -> Exception:
  """Return an error that names the setting which people may have meant."""
  name = error.flagname
  if name not in lookup.SYNONYMS or 'config' not in flags.FLAGS:
    return error
  value = str(error.flagvalue).partition('=')[2]
  return errors.InputError(
    f"Unknown command line flag '{name}'.{lookup.suggest_setting(name, value)}"
  )


def _explain_flag_error(error: Exception) -> Exception:
  """Return the error of a config file that absl quotes, or the error itself."""
  cause: BaseException | None = error
  while cause and 'Traceback' in str(cause):
    cause = cause.__context__
  if cause is error or not isinstance(cause, Exception):
    return error
  return lookup.explain_file_error(cause)


def _explain_config_error(error: Exception, argv: Sequence[str]) -> Exception:
  """Return what went wrong while a config file and its overrides were read."""
  if isinstance(error, AttributeError) and error.name == 'get_config':
    return lookup.without_get_config(str(getattr(error.obj, '__file__', '')))
  if isinstance(error, (AttributeError, KeyError)):
    for word in argv[1:]:
      flag, _, value = word.lstrip('-').partition('=')
      section, _, name = flag.partition('.')
      if section == 'config' and name and name not in base.settings():
        return lookup.unknown_setting(name, value)
  return lookup.explain_file_error(error)


def _report(error: Exception) -> int:
  log(f'nfnet_jax: {errors.one_line(error)}')
  return EXIT_BAD_INPUT


def log(text: str) -> None:
  """Log a line for people; standard output is for results."""
  print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
  """Show that a long task is in progress, and for how long.

  On a terminal the line counts seconds; elsewhere a line is logged per minute.
  """
  import tqdm

  done, start = threading.Event(), time.monotonic()
  bar = tqdm.tqdm(
    bar_format='{desc} {elapsed}',
    desc=text,
    leave=False,
    disable=not sys.stderr.isatty(),
  )

  def tick() -> None:
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
