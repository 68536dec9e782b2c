"""Second-order optimisation as functions: curvature of a loss, and optax transformations that use it."""

from . import observe
from .curvature import Curvature, curvature
from .errors import CurvatureError
from .operators import SHARING
from .optimizers.control import AdaptDampingState, QuadraticStepState, adapt_damping, adaptive_kfac, quadratic_step
from .optimizers.eigenbasis import Eigenbasis, basis
from .optimizers.ekfac import ScaleByEkfacState, ekfac, scale_by_ekfac
from .optimizers.health import Health, health
from .optimizers.inverse_schedule import InverseSchedule, inverse_schedule
from .optimizers.kfac import ClipByKlState, clip_by_kl, kfac
from .optimizers.kfac_adam import ScaleByKfacAdamState, kfac_adam, scale_by_kfac_adam
from .optimizers.logical import from_logical, to_logical
from .optimizers.newton import (
  ScaleByCurvatureState,
  conjugate_gradients,
  gauss_newton,
  natural_gradient,
  newton,
  scale_by_curvature,
)
from .optimizers.precondition import ScaleByKfacState, factors, find_state, replace_state, scale_by_kfac
from .optimizers.staleness import ScaleByStaleKfacState, Staleness, due, intervals, scale_by_stale_kfac, stale_kfac
from .param_trees import param_names
from .placing import Local, Placement
from .products import Products
from .state.dealing import Deal, lay_out, least, load
from .state.schedule import Unit, deal_units, growing
from .state.stacks import Layout, Stack, Stacked
from .statistics import Statistics, accumulate
from .uses import copies, used

__all__ = [
  'SHARING',
  'AdaptDampingState',
  'ClipByKlState',
  'Curvature',
  'CurvatureError',
  'Deal',
  'Eigenbasis',
  'Health',
  'InverseSchedule',
  'Layout',
  'Local',
  'Placement',
  'Products',
  'QuadraticStepState',
  'ScaleByCurvatureState',
  'ScaleByEkfacState',
  'ScaleByKfacAdamState',
  'ScaleByKfacState',
  'ScaleByStaleKfacState',
  'Stack',
  'Stacked',
  'Staleness',
  'Statistics',
  'Unit',
  'accumulate',
  'adapt_damping',
  'adaptive_kfac',
  'basis',
  'clip_by_kl',
  'conjugate_gradients',
  'copies',
  'curvature',
  'deal_units',
  'due',
  'ekfac',
  'factors',
  'find_state',
  'from_logical',
  'gauss_newton',
  'growing',
  'health',
  'intervals',
  'inverse_schedule',
  'kfac',
  'kfac_adam',
  'lay_out',
  'least',
  'load',
  'natural_gradient',
  'newton',
  'observe',
  'param_names',
  'quadratic_step',
  'replace_state',
  'scale_by_curvature',
  'scale_by_ekfac',
  'scale_by_kfac',
  'scale_by_kfac_adam',
  'scale_by_stale_kfac',
  'stale_kfac',
  'to_logical',
  'used',
]
