"""Second-order optimisation and model parallelism for JAX."""

from importlib.metadata import PackageNotFoundError, version

try:
  __version__ = version('kronmesh')  # setup.cfg is the one place that states it
except PackageNotFoundError:
  __version__ = 'unknown'  # it runs from a folder that is not installed
