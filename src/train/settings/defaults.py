"""The defaults from which every config starts. A config file sets only the values that differ."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict


def grid(optimizer: str, **values: Sequence[float]) -> Iterator[dict[str, Any]]:
  """Yields all combinations of an optimiser's settings, as overrides of a config.

  Args:
    optimizer: the name of the optimiser, such as 'kfac'.
    **values: for each setting of its section, the values to combine.
  """
  for combination in itertools.product(*values.values()):
    settings = dict(zip(values, combination, strict=True))
    yield {'optimizer': optimizer, **{f'{optimizer}.{name}': value for name, value in settings.items()}}


def choose(preset: str, presets: Sequence[str]) -> None:
  """Checks that `presets` holds the preset of a config file.

  Args:
    preset: the name that follows the colon in --config=file.py:preset.
    presets: the names that the file knows.

  Raises:
    ValueError: the preset is unknown.
  """
  if preset not in presets:
    raise ValueError(f'preset {preset!r} is unknown; choose from {", ".join(presets)}')


def model(name: str, **settings: Any) -> ConfigDict:
  """Returns a model's section of a config: its settings, and those that all models or all deep models share.

  Args:
    name: the name of the model, such as 'resnet'.
    **settings: the attributes of its network, such as those of `models.ResNet`; they override the shared ones.
  """
  shared = {'dtype': 'float32'}
  if name in ('r2plus1d', 'resnet', 'transformer', 'video_transformer', 'vit'):
    shared['keep'] = 'all'  # activations kept for the backward pass: all, products, weights, blocks (models/layers.py)
  if name in ('transformer', 'video_transformer', 'vit'):
    shared['stacked'] = False  # whether one block loops over the layers, which a mesh's `pipe` axis divides
  return ConfigDict({'name': name, **shared, **settings})


def defaults() -> ConfigDict:
  """Returns the default config. Names give units: *_steps and *_every count optimiser steps, sizes count examples.

  The comments beside each value in the source say what it is; `kronmesh configs` lists the values of a config.
  """
  config = ConfigDict()
  config.seed = 0
  config.steps = 300
  config.eval_every = 20
  config.checkpoint_every = 0  # steps between checkpoints; 0: by time alone
  config.checkpoint_minutes = 10.0  # minutes since the last one; 0: by steps alone
  config.keep_checkpoints = 2  # how many of the newest to keep; 0: write none
  config.keep_best = 0  # how many of the best evaluations to keep besides; each is saved as it happens
  config.log_every = 10
  config.health_every = 100  # steps between logs of every layer's curvature and update; 0: never
  config.writers = ConfigDict({'tensorboard': True, 'wandb': ''})  # wandb: the project's name
  config.microbatches = 1  # parts into which a batch is divided, one after the other: less memory, the same step
  config.mesh = 'data=-1'
  config.devices = 0  # how many CPU devices to emulate; 0: use the real devices
  config.watchdog_seconds = 40.0  # several processes end if one is idle for this and ten more steps; 0: never
  # Placement of K-FAC's factors. inverses: whether they go 'everywhere' or stay with their 'owners'. statistics: the
  # type in which they travel. row_sharded: whether the rows of large factors may be divided over all devices. blocks:
  # a block of factors per shard for kernels along `model` (another approximation; the others change no result).
  config.placement = ConfigDict(
    {'inverses': 'everywhere', 'statistics': 'float32', 'row_sharded': True, 'blocks': False}
  )
  # How gradients are summed over the batch's shards. all_reduce: 'auto' (XLA's choice), or with shard_map 'psum',
  # 'ring', 'hierarchical' or 'torus'. half: the type in which they travel, '', 'bfloat16' or 'float16'.
  config.gradients = ConfigDict({'all_reduce': 'auto', 'half': '', 'bucket_mb': 25.0})
  # The response to a loss that is not finite, and to a spike, a loss more than `deviations` above its moving mean:
  # 'stop', 'skip' (the step changes nothing), 'damp' (skip the step and multiply the damping, which relaxes over some
  # hundred steps) or 'rollback' (return to the last checkpoint and go on with later data); for spikes also 'ignore'.
  # The run ends after more than `limit` faults in a row.
  config.faults = ConfigDict({'not_finite': 'skip', 'spike': 'ignore', 'deviations': 8.0, 'limit': 3})
  config.faults.damping_factor = 10.0
  config.start = ''  # the work folder of a finished run whose parameters this one begins with; '': drawn by the seed
  config.task = 'classify'
  config.target = 0.0  # a value of the task's metric on the evaluation set; 0: none
  config.stop_at_target = False
  config.optimizer = 'kfac'

  config.model = model('mlp')
  config.data = ConfigDict({'name': 'digits', 'folder': '', 'source': '', 'batch_size': 256, 'augment': False})
  config.data.shape = ()  # shape of an example of 'noise'
  config.data.image_size = (
    224  # height, and width unless image_width is set, for cropped data sets (imagenet2012, videos)
  )
  config.data.image_width = 0  # for videos
  # Clips. frames: frames in a clip (0: all; 16 for videos). every: their stride, in stored frames. rate: stored frames
  # per second of a video. short_side: pixels of a stored frame's short side. bands: pictures in which a frame is
  # stored, so that a process decodes only its rows. flip: whether to mirror half. colour: how far colours change.
  config.data.update({'frames': 0, 'every': 1, 'rate': 10.0, 'short_side': 128, 'bands': 1})
  config.data.update({'flip': True, 'colour': 0.0})
  # Graphs. graph_source: the folder of WordNet's files (default: Debian's). graph_shuffled: whether nodes exchange
  # names (a control). graph_seed: the seed for that, separate from the run's because the graph is built only once.
  # held_out: the classes without images in training.
  config.data.update({'graph_source': '', 'graph_shuffled': False, 'graph_seed': 0, 'held_out': ()})
  config.data.train_examples = 0  # use this many, the same number from each class, drawn by the seed; 0: all
  config.data.eval_batch_size = 0  # 0: batch_size
  config.data.eval_examples = 0  # use only this many, from the start; 0: all
  config.data.eval_split = 'test'  # 'train': evaluate how well the model fits the training set

  # Two players (config.task 'generate'). discriminator_steps: for each generator step, each on its part of the batch.
  # augment: DiffAugment's policy (models/diffaugment.py). r1: the weight of R1. generator, discriminator: optimisers,
  # '' for config.optimizer. generator_rate: a factor on the generator's learning rate. judge: the work folder of a
  # trained classifier that scores images, or ''.
  config.gan = ConfigDict({'discriminator_steps': 1, 'augment': (), 'r1': 0.0, 'generator': '', 'discriminator': ''})
  config.gan.update({'generator_rate': 1.0, 'judge': ''})

  # Generated images in every training batch. run: the generator's work folder ('' for none). share: their share of the
  # batch. judge: the work folder of a classifier that must give an image's class at least the probability `keep`,
  # within `tries` tries ('' for none).
  config.generated = ConfigDict({'run': '', 'share': 0.5, 'judge': '', 'keep': 0.5, 'tries': 4})

  # Options for large batches; see src/train/recipe.py.
  config.recipe = ConfigDict({'rate_scaling': 'none', 'reference_batch': 256, 'label_smoothing': 0.0, 'mixup': 0.0})
  config.recipe.running_mixup = False
  config.recipe.cutmix = 0.0  # over time for clips
  config.recipe.clip_norm = 0.0  # for all gradients together, before the optimiser; 0: none
  # Distillation. teacher: the work folder of a classifier whose logits are learned too ('' for none). teacher_share: their
  # share of the loss. teacher_temperature: what both networks' logits are divided by.
  config.recipe.update({'teacher': '', 'teacher_share': 0.5, 'teacher_temperature': 2.0})
  config.recipe.average = 0.0  # decay of a moving average of the parameters, which evaluation then uses; 0: none
  config.recipe.loss_scale = 0.0  # initial value for model.dtype float16; halved at an overflow; 0: none
  config.recipe.rescale_weights = ()  # patterns of kernels followed by a norm: '*/conv_*/kernel'

  rate = {'learning_rate': 0.1, 'schedule': 'cosine', 'power': 2.0, 'warmup_steps': 0, 'weight_decay': 0.0}
  momentum = {'momentum': 0.9, 'momentum_follows_rate': False}
  # Intervals are in steps and grow from 1; see kron.growing. subsample: the share of a batch that gives the statistics.
  factors = {'decay': 0.95, 'fisher': 'sampled', 'subsample': 1.0, 'statistics_every': 1, 'inverses_every': 1}
  config.kfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1})
  config.kfac.update({'statistics_every': 8, 'inverses_every': 32})  # docs/performance.md
  config.stale_kfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1, 'decay': 0.0})
  config.stale_kfac.update({'threshold': 0.1, 'smallest': 1, 'largest': 1000})
  config.ekfac = ConfigDict({**rate, **momentum, **factors, 'damping': 0.1, 'kl_clip': 0.1, 'inverses_every': 10})
  config.kfac_adam = ConfigDict({**rate, **factors, 'learning_rate': 1e-3, 'b1': 0.9, 'b2': 0.99, 'inverses_every': 10})
  # Here the learning rate multiplies the step that the quadratic model chooses.
  config.adaptive_kfac = ConfigDict({**rate, **factors, 'learning_rate': 1.0, 'schedule': 'constant', 'damping': 1.0})
  config.adaptive_kfac.update({'damping_every': 5, 'damping_rate': 0.95, 'smallest_damping': 1e-8, 'kl_clip': 0.0})
  # kfac-jax's optimiser, which kronmesh compare runs where it is installed, in adaptive mode and with kfac-jax's
  # defaults except for the damping. burn_in_steps: how often statistics are taken before the first step.
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
  """Returns the ranges from which `kronmesh compare --trials` draws each optimiser's settings.

  The result is optimiser -> setting -> (lowest, highest), on a logarithmic scale. Every optimiser has two free numbers;
  momentum m is tried as 1 - m. The `spaces()` of a config file take precedence.
  """
  momentum = (0.03, 0.3)
  # The clip sets the length of most steps, and while it acts the learning rate matters little.
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
