"""What every config starts from; a config names only what differs."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict


def grid(optimizer: str, **values: Sequence[float]) -> Iterator[dict[str, Any]]:
  """All combinations of an optimiser's settings, as overrides of a config."""
  for combination in itertools.product(*values.values()):
    settings = dict(zip(values, combination, strict=True))
    yield {'optimizer': optimizer, **{f'{optimizer}.{name}': value for name, value in settings.items()}}


def choose(preset: str, presets: Sequence[str]) -> None:
  """Raises ValueError unless the preset (what stands behind the colon of --config=file.py:preset) is one of these."""
  if preset not in presets:
    raise ValueError(f'preset {preset!r} is unknown; choose from {", ".join(presets)}')


def model(name: str, **settings: Any) -> ConfigDict:
  """A model's section: its own settings, and those that all (or all deep ones) have."""
  shared = {'dtype': 'float32'}
  if name in ('r2plus1d', 'resnet', 'transformer', 'video_transformer', 'vit'):
    shared['keep'] = 'all'  # activations for the backward pass: all, products, weights, blocks (models/layers.py)
  if name in ('transformer', 'video_transformer', 'vit'):
    shared['stacked'] = False  # one block in a loop over the layers, which a mesh's `pipe` axis divides
  return ConfigDict({'name': name, **shared, **settings})


def defaults() -> ConfigDict:
  """Units are in the names: *_steps and *_every count optimiser steps, sizes count examples."""
  config = ConfigDict()
  config.seed = 0
  config.steps = 300
  config.eval_every = 20
  config.checkpoint_every = 0  # steps; 0: by time alone
  config.checkpoint_minutes = 10.0  # since the last; 0: by steps alone
  config.keep_checkpoints = 2  # the newest; 0: none are written
  config.keep_best = 0  # beside the newest, so many of the best evaluations, which are saved as they happen
  config.log_every = 10
  config.health_every = 100  # steps between looks at every layer's curvature and update; 0: never
  config.writers = ConfigDict({'tensorboard': True, 'wandb': ''})  # wandb: the project's name
  config.microbatches = 1  # into how many a batch is divided, one after the other: as little memory, the same step
  config.mesh = 'data=-1'
  config.devices = 0  # emulated CPU devices; 0: those there are
  config.watchdog_seconds = 40.0  # several processes end if one does nothing for this and ten steps more; 0: never
  # Where K-FAC's factors live: whether inverses go 'everywhere' or stay with their 'owners', the type in which statistics
  # travel, whether the rows of large factors may be divided over all devices, and whether factors of kernels that lie along
  # `model` are kept in blocks, one for each shard (another approximation; the others change no result).
  config.placement = ConfigDict(
    {'inverses': 'everywhere', 'statistics': 'float32', 'row_sharded': True, 'blocks': False}
  )
  # How gradients are summed over the batch's shards: 'auto' (XLA's choice), or by shard_map 'psum', 'ring', 'hierarchical',
  # 'torus'; half: '', 'bfloat16' or 'float16', the type they travel in.
  config.gradients = ConfigDict({'all_reduce': 'auto', 'half': '', 'bucket_mb': 25.0})
  # What a loss that is not finite means, and one more than so many `deviations` above its moving mean: 'stop', 'skip' (the
  # step changes nothing), 'damp' (skip it, and multiply the damping, which relaxes over some hundred steps), 'rollback' (to
  # the last checkpoint, and on with later data), for spikes also 'ignore'. More than `limit` in a row end the run.
  config.faults = ConfigDict({'not_finite': 'skip', 'spike': 'ignore', 'deviations': 8.0, 'limit': 3})
  config.faults.damping_factor = 10.0
  config.task = 'classify'
  config.target = 0.0  # of the task's metric on the evaluation set; 0: none
  config.stop_at_target = False
  config.optimizer = 'kfac'

  config.model = model('mlp')
  config.data = ConfigDict({'name': 'digits', 'folder': '', 'source': '', 'batch_size': 256, 'augment': False})
  config.data.shape = ()  # of an example of 'noise'
  config.data.image_size = (
    224  # of data sets that are cropped (imagenet2012, videos): height, and width unless that is set
  )
  config.data.image_width = 0  # of videos
  # Of clips: how many frames (0: all, of videos 16) and of which, every so many of those that are kept; what is kept of a
  # video, frames a second, the pixels of their short side, and how many pictures each frame is kept as, so that a process
  # decodes its own rows alone; whether half are mirrored, and how far colours change.
  config.data.update({'frames': 0, 'every': 1, 'rate': 10.0, 'short_side': 128, 'bands': 1})
  config.data.update({'flip': True, 'colour': 0.0})
  # Of graphs: the folder of WordNet's files (Debian's by default), whether nodes' names are exchanged (a control), by which
  # seed (not the run's: the graph is a part of what is built once), and the classes without images in training.
  config.data.update({'graph_source': '', 'graph_shuffled': False, 'graph_seed': 0, 'held_out': ()})
  config.data.train_examples = 0  # only so many, as many of every class, drawn by the seed; 0: all
  config.data.eval_batch_size = 0  # 0: batch_size
  config.data.eval_examples = 0  # only the first so many; 0: all
  config.data.eval_split = 'test'  # 'train' evaluates how well the training set is fitted

  # Of two players (config.task 'generate'): steps of the discriminator for one of the generator, each on its part of the
  # batch; DiffAugment's policy (models/diffaugment.py); the weight of R1; optimisers, '' for config.optimizer; what the
  # generator's learning rate is times the section's; the work folder of a finished classifier that scores images, or ''.
  config.gan = ConfigDict({'discriminator_steps': 1, 'augment': (), 'r1': 0.0, 'generator': '', 'discriminator': ''})
  config.gan.update({'generator_rate': 1.0, 'judge': ''})

  # Of the share of every training batch that a generator makes: its run (a work folder; '' for none), and whether a judge
  # (another) must give an image's own class at least the probability `keep`, in at most so many tries.
  config.generated = ConfigDict({'run': '', 'share': 0.5, 'judge': '', 'keep': 0.5, 'tries': 4})

  # What large batches need; see experiments/recipe.py.
  config.recipe = ConfigDict({'rate_scaling': 'none', 'reference_batch': 256, 'label_smoothing': 0.0, 'mixup': 0.0})
  config.recipe.running_mixup = False
  config.recipe.cutmix = 0.0  # over time, of clips
  config.recipe.clip_norm = 0.0  # of all gradients together, before the optimiser; 0: none
  config.recipe.average = 0.0  # decay of a moving average of the parameters, which is then evaluated; 0: none
  config.recipe.loss_scale = 0.0  # at the start, for model.dtype float16: it halves at an overflow; 0: none
  config.recipe.rescale_weights = ()  # patterns of kernels that a norm follows: '*/conv_*/kernel'

  rate = {'learning_rate': 0.1, 'schedule': 'cosine', 'power': 2.0, 'warmup_steps': 0, 'weight_decay': 0.0}
  momentum = {'momentum': 0.9, 'momentum_follows_rate': False}
  # Intervals are in steps; they grow from 1, see kron.growing. part: the share of a batch that statistics are taken from.
  factors = {'decay': 0.95, 'fisher': 'sampled', 'part': 1.0, 'statistics_every': 1, 'inverses_every': 1}
  config.kfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1})
  config.kfac.update({'statistics_every': 8, 'inverses_every': 32})  # docs/performance.md
  config.stale_kfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1, 'decay': 0.0})
  config.stale_kfac.update({'threshold': 0.1, 'smallest': 1, 'largest': 1000})
  config.ekfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1, 'inverses_every': 10})
  config.kfac_adam = ConfigDict({**rate, **factors, 'learning_rate': 1e-3, 'b1': 0.9, 'b2': 0.99, 'inverses_every': 10})
  # The learning rate is a factor on the step that the quadratic model chooses.
  config.adaptive_kfac = ConfigDict({**rate, **factors, 'learning_rate': 1.0, 'schedule': 'constant', 'damping': 1.0})
  config.adaptive_kfac.update({'damping_every': 5, 'damping_rate': 0.95, 'smallest_damping': 1e-8, 'kl_clip': 0.0})
  # kfac-jax's optimiser, which scripts/compare.py runs where it is installed: its adaptive mode, and its own defaults but
  # for the damping. burn_in_steps: how often statistics are taken before the first step.
  config.kfac_jax = ConfigDict({'damping': 1.0, 'damping_every': 5, 'damping_rate': 0.9, 'smallest_damping': 1e-8})
  config.kfac_jax.update({'decay': 0.95, 'statistics_every': 1, 'inverses_every': 5, 'burn_in_steps': 10})
  config.natural_gradient = ConfigDict({**rate, **factors, 'learning_rate': 0.5, 'damping': 0.01})
  config.natural_gradient.update({'max_iterations': 10, 'tolerance': 0.1})
  config.sgd = ConfigDict({**rate, **momentum})
  config.adam = ConfigDict({**rate, 'learning_rate': 1e-3, 'b1': 0.9, 'b2': 0.999})
  config.lars = ConfigDict({**rate, 'learning_rate': 1.0, 'momentum': 0.9})
  config.lamb = ConfigDict({**rate, 'learning_rate': 1e-2, 'b1': 0.9, 'b2': 0.999})
  config.muon = ConfigDict({**rate, 'learning_rate': 0.02, 'momentum': 0.95})
  return config


def spaces() -> dict[str, dict[str, Sequence[float]]]:
  """What `scripts/compare.py --trials` draws an optimiser's settings from: (lowest, highest), on a logarithmic scale.

  As many numbers are free for each optimiser, two; momentum is tried as 1 - m. A config's own `spaces()` comes first.
  """
  momentum = (0.03, 0.3)
  # The clip sets most steps' length, so that the learning rate matters little while it acts.
  natural = {'damping': (1e-3, 1.0), '1-momentum': (0.1, 0.7)}
  return {
    'kfac': natural,
    'stale_kfac': natural,
    'ekfac': natural,
    'kfac_adam': {'learning_rate': (1e-4, 3e-2), '1-b1': momentum},
    'adaptive_kfac': {'damping': (1e-3, 1.0), '1-damping_rate': (0.02, 0.3)},
    'kfac_jax': {'damping': (1e-2, 1e2), '1-damping_rate': (0.02, 0.3)},
    'natural_gradient': {'learning_rate': (0.1, 1.0), 'damping': (1e-3, 1.0)},
    'sgd': {'learning_rate': (1e-3, 1.0), '1-momentum': momentum},
    'adam': {'learning_rate': (1e-4, 3e-2), '1-b1': momentum},
    'lars': {'learning_rate': (0.1, 30.0), '1-momentum': momentum},
    'lamb': {'learning_rate': (1e-3, 1e-1), '1-b1': momentum},
    'muon': {'learning_rate': (3e-3, 0.3), '1-momentum': momentum},
  }
