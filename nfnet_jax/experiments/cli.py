"""What every door shares: flags, configs by name, exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and saved.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import difflib
import pathlib
import re
import runpy
import sys
import threading
import time
import traceback

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

from nfnet_jax.experiments import errors

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75

_CONFIGS = pathlib.Path(__file__).parent / 'configs'

# Flags that several doors share; each declares the ones it takes, for --help.
_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment: a name (see --list_configs), or the path of a Python file; '
  'NAME:ARG passes ARG to its get_config. Override values with '
  '--config.KEY=VALUE.',
)
_LIST = flags.DEFINE_bool('list_configs', False, 'Lists the known configs.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, a local one or gs://BUCKET/FOLDER.'
)
JSON = flags.DEFINE_bool('json', False, 'Prints one JSON object.')
OUT = flags.DEFINE_string('out', '.', 'Folder for tables and pictures.')
DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "Folder of datasets; TFDS's own by default."
)
TO = flags.DEFINE_string('to', None, 'File to write.')
DATASET = flags.DEFINE_string('dataset', None, 'Images of a dataset.')
SPLIT = flags.DEFINE_string('split', 'train', 'Split of the dataset.')
WEIGHTS = flags.DEFINE_string(
  'weights',
  None,
  "Trained network: a published file, timm's or this project's .npz or "
  '.safetensors, or the folder of a run.',
)
TIMM_FORWARD = flags.DEFINE_bool(
  'timm_forward', False, "Computes as timm's dm_nfnet_* do."
)
SIZE = flags.DEFINE_integer(
  'size', None, "Pixels a side; by default the network's own.", lower_bound=1
)


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
    if _LIST.value:
      print(config_table())
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
    argv = with_config_path(argv)
    if on_a_run:
      argv = _with_saved_config(argv)
  except errors.InputError as error:
    sys.exit(_complain(error))
  sys.argv = argv  # config_flags looks for overrides there.
  app.run(guarded, argv=argv, flags_parser=_parse)


def say(text: str) -> None:
  """Tells a person something; standard output is for results."""
  print(text, file=sys.stderr, flush=True)


def get_config() -> ml_collections.ConfigDict:
  """Returns the configuration of `--config`, with its overrides.

  Raises:
    errors.InputError: if none was given.
  """
  if _CONFIG.value is None:
    raise errors.InputError(
      f'Give an experiment: --config=NAME. Known: {", ".join(config_names())}.'
    )
  return _CONFIG.value


def get_config_name() -> str:
  """Returns `--config` as a person would write it, without its folder."""
  path, _, argument = flags.FLAGS['config'].config_filename.partition(':')
  return pathlib.Path(path).stem + (argument and f':{argument}')


def load_config(name: str) -> ml_collections.ConfigDict:
  """Returns another configuration, with the overrides of the command line.

  Args:
    name: what `--config` takes.

  Raises:
    errors.InputError: if there is none, or it takes no such argument or key.
  """
  path, _, argument = _expand(name).partition(':')
  with errors.as_input_error((TypeError, ValueError)):
    get = runpy.run_path(path)['get_config']
    config = get(argument) if argument else get()
  overrides = config_flags.get_override_values(flags.FLAGS['config'])
  with errors.as_input_error(KeyError):
    config.update_from_flattened_dict(overrides)
  return config


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


def get_out() -> pathlib.Path:
  """Returns the folder of `--out`, which is made.

  Raises:
    errors.InputError: if it cannot be made.
  """
  out = pathlib.Path(OUT.value)
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.InputError(
      f"--out='{out}': {error.strerror}. Name a folder, or where one can be "
      'made.'
    ) from error
  return out


def get_to() -> str:
  """Returns the file of `--to`.

  Raises:
    errors.InputError: if none was given, or its folder is not there.
  """
  if not TO.value:
    raise errors.InputError('Say where to write: --to=FILE.')
  if '://' not in TO.value and not pathlib.Path(TO.value).parent.is_dir():
    raise errors.InputError(f"--to='{TO.value}': there is no such folder.")
  return TO.value


def get_weights():
  """Reads the `weights.load.Weights` of `--weights`, as `--size` changes them.

  Raises:
    errors.InputError: if there are none, or they cannot be used.
  """
  from nfnet_jax.weights import load

  if not WEIGHTS.value:
    raise errors.InputError('Name a trained network: --weights=PATH.')
  with errors.as_input_error():
    weights = load.load_weights(WEIGHTS.value)
    if TIMM_FORWARD.value:
      weights = weights.with_options(timm_forward=True)
    return dataclasses.replace(weights, size=SIZE.value or weights.size)


def get_workdir():
  """Returns the absolute `epath.Path` of `--workdir`.

  Raises:
    errors.InputError: if none was given, or it is no place for a run.
  """
  if not _WORKDIR.value:
    raise errors.InputError('Say where the run lives: --workdir=DIR.')
  return to_workdir(_WORKDIR.value)


def to_workdir(name: str):
  """Returns the absolute `epath.Path` of a local folder or one in a bucket.

  Raises:
    errors.InputError: if it is in something else.
  """
  from etils import epath

  if '://' not in name:
    return epath.Path(pathlib.Path(name).resolve())
  if not re.match('gs://[^/]', name):
    raise errors.InputError(
      f"--workdir='{name}' is neither a local folder nor gs://BUCKET/FOLDER."
    )
  return epath.Path(name)


def config_names() -> list[str]:
  """Lists the experiments that come with the package."""
  return sorted(
    path.stem for path in _CONFIGS.glob('*.py') if path.stem != '__init__'
  )


def config_table() -> str:
  """Formats each known config with the first line of its docstring."""
  lines = []
  for name in config_names():
    docstring = ast.get_docstring(ast.parse(config_path(name).read_text()))
    lines.append(f'{name:<16}{docstring.splitlines()[0]}')
  return '\n'.join(lines)


def config_path(name: str) -> pathlib.Path:
  """Returns the file of a config given by name or by path.

  Raises:
    errors.InputError: if there is none; the message lists the known.
  """
  path = pathlib.Path(name)
  if path.suffix == '.py':
    if not path.is_file():
      raise errors.InputError(f"There is no config file '{name}'.")
    return path
  if name not in config_names():
    near = difflib.get_close_matches(name, config_names(), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ''
    raise errors.InputError(
      f"Unknown config '{name}'.{hint} Known: {', '.join(config_names())}."
    )
  return _CONFIGS / f'{name}.py'


def with_config_path(argv: Sequence[str]) -> list[str]:
  """Replaces the name in `--config=NAME[:ARG]` by the path of its file."""
  argv = list(argv)
  for index, word in enumerate(argv):
    if word in ('--config', '-config') and index + 1 < len(argv):
      argv[index + 1] = _expand(argv[index + 1])
    elif word.startswith(('--config=', '-config=')):
      flag, name = word.split('=', 1)
      argv[index] = f'{flag}={_expand(name)}'
  return argv


def _with_saved_config(argv: list[str]) -> list[str]:
  """Puts the run's own configuration first, unless one is given."""
  workdir = _flag_value(argv, 'workdir')
  if _flag_value(argv, 'config') or not workdir:
    return argv
  to_workdir(workdir)  # For what a config raises is quoted with its place.
  path = pathlib.Path(__file__).parent / 'saved.py'
  return [argv[0], f'--config={path}:{workdir}', *argv[1:]]


def _flag_value(argv: list[str], name: str) -> str | None:
  for word, following in zip(argv, [*argv[1:], None]):
    flag, equals, value = word.partition('=')
    if flag in (f'--{name}', f'-{name}'):
      return value if equals else following
  return None


def _expand(name: str) -> str:
  name, colon, argument = name.partition(':')
  return f'{config_path(name)}{colon}{argument}'


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
