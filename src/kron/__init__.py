"""Second-order optimisation as functions: curvature of a loss, and optax transformations that use it."""

from . import observe
from .blocks import param_names
from .curvature import Curvature, curvature
from .errors import CurvatureError
from .kfac import ClipByKlState, clip_by_kl, kfac
from .logical import from_logical, to_logical
from .newton import (
  ScaleByCurvatureState,
  conjugate_gradients,
  gauss_newton,
  natural_gradient,
  newton,
  scale_by_curvature,
)
from .operators import SHARING
from .precondition import ScaleByKfacState, factors, find_state, scale_by_kfac
from .products import Products
from .statistics import Statistics, accumulate

__all__ = [
  'SHARING',
  'ClipByKlState',
  'Curvature',
  'CurvatureError',
  'Products',
  'ScaleByCurvatureState',
  'ScaleByKfacState',
  'Statistics',
  'accumulate',
  'clip_by_kl',
  'conjugate_gradients',
  'curvature',
  'factors',
  'find_state',
  'from_logical',
  'gauss_newton',
  'kfac',
  'natural_gradient',
  'newton',
  'observe',
  'param_names',
  'scale_by_curvature',
  'scale_by_kfac',
  'to_logical',
]
