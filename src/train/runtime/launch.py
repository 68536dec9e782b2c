"""The way from the command line to a function of (config, workdir): flags, devices and one-line errors."""

from __future__ import annotations

import difflib
import logging as python_logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import starting

if starting.is_command():
  starting.answer_signals()

# Set before JAX and SciPy load. Emulated devices share a few cores. A BLAS that starts its own threads makes the
# devices wait for each other (an inverse on 8 devices took 170 ms instead of 10 ms) and may leave no thread to answer a
# collective.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('NPROC', '16')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_ENABLE_PREEMPTION_SERVICE', '0')  # it would swallow SIGTERM in a job of several processes

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ..errors import AGAIN, FAILED, INTERRUPTED, MISTAKE, STOPPED, ConfigError, Preempted, RunError
from ..settings import configfile
from . import helppage, processes, terminal


def _home_cache() -> str:
  """Returns a folder for compiled programs in the user's home, or '' if there is no writable home."""
  try:
    folder = Path.home() / '.cache' / 'kronmesh'
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):
    return ''
  return str(folder) if os.access(folder, os.W_OK) else ''


_CACHE = flags.DEFINE_string('compilation_cache', _home_cache(), "Folder for compiled programs; '' for none.")
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an error that would be one line.')
_PATIENCE = 2.0  # seconds for threads to end after an error
_ROOT = Path(__file__).resolve().parents[3]  # the repository's root, if the package lies in a repository
_DEFAULT = 'digits'  # the packaged config without --config


def launch(main: Callable[[Any, str], None], default_workdir: str = 'runs/train') -> None:
  """Parses the flags and runs `main`.

  Exit codes: 0 done; 2 the user made a mistake; 3 the run failed and can be resumed; 4 another process stopped; 75 the
  run was told to stop and has saved (run it again); 130 interrupted. With --debug, errors keep their traceback.
  """
  if (_ROOT / 'experiments' / 'configs').is_dir() and str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))  # a user's config may import one of experiments/configs
  settings = define(default_workdir)
  logging.set_verbosity(logging.WARNING)
  logging.get_absl_logger().addFilter(_is_told)
  sys.unraisablehook = _tell
  threading.excepthook = _tell_of_thread
  terminal.keep_running_without()
  try:
    app.run(guarded(lambda argv: run(main, settings, argv)), flags_parser=parser_with_help(main))
  except KeyboardInterrupt:
    sys.exit(INTERRUPTED)


def command(work: Callable[[], None], example: str) -> None:
  """Parses the flags of a script that has no config and runs `work`, with the exit codes of `launch`."""

  def main(argv: list[str]) -> None:
    if len(argv) > 1:
      raise ConfigError(f'{argv[1]!r} is not a flag; write {example}')
    use_cache()
    work()

  logging.set_verbosity(logging.ERROR)
  terminal.keep_running_without()
  try:
    app.run(guarded(main), flags_parser=parser_with_help(work))
  except KeyboardInterrupt:
    sys.exit(INTERRUPTED)


def _is_told(record: python_logging.LogRecord) -> bool:
  """Checks whether to show a log record. Orbax's are dropped, because Orbax also raises the errors that it logs."""
  return f'{os.sep}orbax{os.sep}' not in record.pathname or bool(_DEBUG.value)


def _tell(unraisable: Any) -> None:
  """Shows an uncatchable error as Python does, except for those of writers that outlive a failed save."""
  if _DEBUG.value or str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
  """Shows a thread's error as Python does, except for TensorBoard's OSError, which `Writers` reports in one line."""
  board = type(args.thread).__module__.startswith('tensorboardX')
  if _DEBUG.value or not (board and isinstance(args.exc_value, OSError)):
    threading.__excepthook__(args)


class Settings(NamedTuple):
  """The parsed flags that all commands share."""

  values: flags.FlagValues
  config: Any
  workdir: Any


def define(default_workdir: str, values: flags.FlagValues = flags.FLAGS) -> Settings:
  config = config_flags.DEFINE_config_file(
    'config', None, f'A packaged config by its name, or a file; without it, {_DEFAULT}.', flag_values=values
  )
  workdir = define_folder('workdir', default_workdir, 'The folder of the run.', values)
  return Settings(values, config, workdir)


def define_folder(name: str, default: str, words: str, values: flags.FlagValues = flags.FLAGS) -> Any:
  """Defines a flag for an output folder, which must be a non-empty path on this machine."""
  flag = flags.DEFINE_string(name, default, words, flag_values=values)
  rule = 'must be a folder on this machine (a bucket must be mounted first), of characters that print, without ~ and \\'
  flags.register_validator(name, _is_folder, rule, flag_values=values)
  return flag


def _is_folder(name: str | None) -> bool:
  plain = bool(name and name.strip()) and '://' not in name and name.isprintable() and not name.startswith('~')
  return plain and '\\' not in os.path.abspath(name)  # the library that writes arrays reads \ as /


def run(main: Callable[[Any, str], None], settings: Settings, argv: list[str]) -> None:
  """Runs `main` on the devices and with the processes that the flags name."""
  if len(argv) > 1:
    raise ConfigError(f'{argv[1]!r} is not a flag; write --config.name=value')
  name = config_flags.get_config_filename(settings.values['config'])
  file, dot, _ = name.partition('.py:')
  if not Path(file + dot.rstrip(':')).is_file():
    raise ConfigError(configfile.unknown(name))
  try:
    config = settings.config.value
  except (OSError, flags.Error) as error:  # an unreadable file raises only when its config is first used
    raise ConfigError(f'get_config() of {name!r} returns no ConfigDict') from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(f'get_config() of {name!r} returns no ConfigDict')
  from ..settings.ranges import check_whole  # imports the models, for which --help need not wait

  check_whole(config)
  use_cache()
  use_devices(config)
  if processes.are_asked_for():
    from .workdir import check_free

    check_free(Path(settings.workdir.value).absolute(), starting.patience())
  processes.join()
  main(config, settings.workdir.value)


def launch_flags() -> list[str]:
  """Returns the flags of `launch` that this command was given, to pass on to a command that it starts."""
  return [f.serialize() for f in (flags.FLAGS['compilation_cache'], flags.FLAGS['debug']) if not f.using_default_value]


def use_cache() -> None:
  """Keeps compiled programs for the next run. JAX's environment variable takes precedence."""
  folder = _CACHE.value
  if folder and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def use_devices(config: Any) -> None:
  """Emulates `config.devices` CPU devices. Call it before anything computes."""
  if config.get('devices', 0) < 0:
    raise ConfigError(f'config.devices={config.devices} must be at least 0')
  if config.get('devices', 0):
    jax.config.update('jax_num_cpu_devices', int(config.devices))
    jax.config.update('jax_cpu_enable_async_dispatch', False)  # programs in flight could block each other's collectives


def parser_with_help(main: Callable[..., None]) -> Callable[[list[str]], list[str]]:
  """Returns a parser of flags that answers --help with the docstring of the module that defines `main`."""

  def parser(argv: list[str]) -> list[str]:
    if any(word in helppage.HELP for word in argv[1:]):
      print(helppage.page(sys.modules[main.__module__].__doc__ or ''))
      sys.exit(0)
    return parse(argv)

  return parser


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses the flags, where --config may be the name of a packaged config. A mistake ends the program with one line."""
  try:
    # Editors put a byte order mark before the first word of a flag file.
    words = values.read_flags_from_files(argv, force_gnu=False)
    marked = [word for word in words if not word.startswith(('\ufeff#', '\ufeff//'))]
    words = [word.removeprefix('\ufeff') for word in marked]
    return values(_with_path(words) if 'config' in values else words)
  except SystemExit as error:
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    if str(Path(_config_file(argv)).absolute()) in {str(Path(file).absolute()) for file in files}:
      _fail(ConfigError(f'the config file {_config_file(argv)} ends the program'), MISTAKE)
    raise  # --help
  except Exception as error:  # a config file may raise anything
    _fail(ConfigError(_flag_message(error, argv)), MISTAKE, error)


def _with_path(words: list[str]) -> list[str]:
  """Replaces the name of a packaged config by its path, in --config=NAME and in --config NAME; adds the default.

  The flag itself has no default, because ml_collections would read one, with all --config.x, while it is defined.
  """
  replaced = list(words)
  for i, word in enumerate(words):
    name, equals, value = word.partition('=')
    if name in ('--config', '-config') and equals:
      replaced[i] = f'{name}={configfile.resolve(value)}'
    elif name in ('--config', '-config') and i + 1 < len(words):
      replaced[i + 1] = configfile.resolve(words[i + 1])
  named = any(word.partition('=')[0] in ('--config', '-config') for word in words)
  return replaced if named else [replaced[0], f'--config={configfile.resolve(_DEFAULT)}', *replaced[1:]]


def _config_file(argv: list[str]) -> str:
  """Returns the file that --config=FILE or --config FILE names, without the preset."""
  config_path = configfile.resolve(_DEFAULT)
  for word, following in zip(argv, [*argv[1:], ''], strict=True):
    name, equals, value = word.lstrip('-').partition('=')
    if word.startswith('-') and name == 'config':
      config_path = value if equals else following
  file, dot, _ = config_path.partition('.py:')
  return file + dot.rstrip(':')


def _flag_message(error: Exception, argv: list[str]) -> str:
  """Returns a one-line message for a mistake in the flags, with the nearest key if ml_collections names one."""
  text = str(error.args[0] if error.args else error).replace('\\n', '\n').strip()
  lines = text.splitlines()
  if 'Traceback' in text:  # the config file itself raised: keep the file and the last line
    lines = [lines[0].partition(': Error')[0] + ':', lines[-1]]
  text = ' '.join(' '.join(lines).split())
  file = _config_file(argv)
  known = _known_mistake(text, file)
  if known:
    return known
  if not isinstance(error, flags.Error | KeyError | AttributeError):
    text = f'the config file {file} cannot be read: {type(error).__name__}: {text}'
  nearest = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
  if nearest:
    return f'the config has no key {_path_of(nearest[2], argv)!r}; did you mean {nearest[1]!r}?'
  if "no attribute 'get_config" in text:
    return f'the config file {file} has no get_config()'
  if isinstance(error, KeyError | AttributeError):
    return _unknown_key(text.strip(chr(34) + chr(39)), argv)
  return text


def _path_of(key: str, argv: list[str]) -> str:
  """Returns the whole path of a key that the command line names, such as 'kfac.damping'."""
  given = [word.lstrip('-').partition('=')[0].removeprefix('config.') for word in argv if '--config.' in word]
  return next((path for path in given if key in path.split('.')), key)


def _unknown_key(key: str, argv: list[str]) -> str:
  """Names the whole path of a key that the config lacks, with the nearest key of its section, or else all of them."""
  path = _path_of(key, argv)
  section = path.rpartition('.')[0]
  beside = [known.rpartition('.')[2] for known in configfile.known_keys() if known.rpartition('.')[0] == section]
  near = difflib.get_close_matches(path.rpartition('.')[2], beside, 1)
  if near:
    return f'the config has no key {path!r}; did you mean {near[0]!r}?'
  return f'the config has no key {path!r}' + (f'; {section} has {", ".join(beside)}' if section and beside else '')


def _known_mistake(text: str, file: str) -> str | None:
  """Translates messages of absl and ml_collections that users would not understand; None for any other."""
  number = re.search(r'flag --(\S+)=(.*): invalid literal for int\(\)', text)
  if number:
    return f'--{number[1]}={number[2]} must be a whole number, written in digits'
  failed = 'earlier failure to load' in text or 'Failed loading config file' in text
  if 'RequiredValueError' in text or 'required reference' in text:
    return f'the config file {file} has a placeholder without a value (required_placeholder); give it one in the file'
  if 'is defined twice' in text and 'config' in text:
    return '--config is given twice; write it once'
  if (failed or "'NoneType'" in text) and not Path(file).is_file():
    return configfile.unknown(file)
  if failed:
    return f'the config file {file} cannot be loaded; is its name one of a Python file?'
  if "'NoneType'" in text:
    return f'get_config() of {file!r} returns no ConfigDict'
  return None


def _say_once() -> None:
  """Removes the stream handlers that libraries may have added, so that only absl's handler shows warnings."""
  root = python_logging.getLogger()
  for handler in [h for h in root.handlers if type(h) is python_logging.StreamHandler]:
    root.removeHandler(handler)


def guarded(run: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
  """Wraps `run` so that every error becomes one line and an exit code."""
  from ...data import DataError
  from ...edge import EdgeError
  from ...extras import MissingExtra
  from ...kron import CurvatureError
  from ...parallel import MeshError

  def wrapped(argv: list[str]) -> None:
    _say_once()
    try:
      run(argv)
    except (ConfigError, MeshError, DataError, CurvatureError, EdgeError, MissingExtra) as error:
      _fail(error, MISTAKE)
    except Preempted as error:
      _fail(error, AGAIN)
    except RunError as error:
      _fail(error, FAILED)
    except Exception as error:
      if processes.several() and processes.is_lost(error):
        processes.stop(processes.lost(error), STOPPED)
      place = traceback.extract_tb(error.__traceback__)[-1]
      where = f'{Path(place.filename).name}:{place.lineno}'
      _fail(RunError(f'{type(error).__name__}: {error} (at {where}; --debug prints the traceback)'), FAILED, error)
    except KeyboardInterrupt:
      print('error: interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
      # Exit at once: shutting Python down while an XLA thread still computes ends in a segmentation fault.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(INTERRUPTED)

  return wrapped


def _fail(error: Exception | str, code: int, cause: Exception | None = None) -> None:
  if isinstance(error, Exception) and flags.FLAGS.is_parsed() and _DEBUG.value:
    traceback.print_exception(cause or error)
  message = ' '.join(str(error).split())
  if processes.several():
    processes.stop(message, code)
  print(f'error: {message}', file=sys.stderr)
  _leave(code)


def _leave(code: int) -> None:
  """Ends the process without waiting long for threads, since those of a failed save wait for five minutes."""
  end = time.monotonic() + _PATIENCE
  others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
  while any(thread.is_alive() for thread in others) and time.monotonic() < end:
    time.sleep(0.01)
  if any(thread.is_alive() for thread in others):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)
