"""Runs commands in processes that have imported the libraries already: half a second for each in place of five.

A test about the start itself, about signals or about several processes starts an interpreter of its own instead.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'grain.python', 'ml_collections.config_flags', 'einops')
# Kronmesh itself is not among them: it reads its environment and its arguments as it is imported.
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(list(LIBRARIES))


def run(*args, cwd=ROOT, env=None, timeout=300):
  """Runs `python *args`, where the first is a script, and returns what `subprocess.run` would.

  env: variables to add.
  """
  args = [str(a) for a in args]
  with tempfile.TemporaryDirectory() as folder:
    out, err = Path(folder, 'out'), Path(folder, 'err')
    process = _context.Process(target=_command, args=(args, str(cwd), env or {}, str(out), str(err)))
    process.start()
    process.join(timeout)
    if process.is_alive():
      process.kill()
      process.join()
      raise subprocess.TimeoutExpired(args, timeout)
    return subprocess.CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def stay(monkeypatch):
  """Lets a command that is called in the test's own process end by SystemExit, even where earlier tests left threads."""
  from kronmesh.train.runtime import launch  # not above: a command imports this module before its environment is set

  monkeypatch.setattr(os, '_exit', sys.exit)
  monkeypatch.setattr(launch, '_PATIENCE', 0.0)


def _command(args, cwd, env, out, err):
  for number, path in ((1, out), (2, err)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, number)
    os.close(file)
  os.environ.update(env)
  os.chdir(cwd)
  script = os.path.abspath(args[0])
  sys.argv = args
  sys.path[0] = os.path.dirname(script)
  sys.modules['__main__'].__file__ = script  # as it is for a command
  runpy.run_path(script, run_name='__main__')
