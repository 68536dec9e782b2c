"""R(2+1)D on your copy of a set of videos: UCF-101, Kinetics, UCF-Crime, DAD, CCD, or any folder/split/class/*.mp4.

  kronmesh train --config=videos --config.data.source=/my/videos --config.steps=500
  kronmesh train --config=videos:ucf101 --config.data.source=/my/ucf101 --dry_run

Presets behind a colon: `video_folder`, `ucf101`, `kinetics`, `ucf_crime`, `dad`, `ccd`; src/data/layouts.py describes
how each must be laid out. `small` trains a small network on a video_folder, in minutes on two cores. On first use all
videos are decoded once, at `data.rate` frames a second and `data.short_side` pixels, into --config.data.folder. Videos
that cannot be decoded are left out and counted; the folder has a list of them.

Measured: nothing, as none of these sets is available here. The loaders are tested on small files in their layouts.
"""

from ml_collections import ConfigDict

from kronmesh.train.settings.defaults import choose, defaults, model

CLASSES = {'video_folder': 2, 'ucf101': 101, 'kinetics': 400, 'ucf_crime': 14, 'dad': 2, 'ccd': 2}


def get_config(preset: str = 'video_folder') -> ConfigDict:
  choose(preset, ('small', *CLASSES))
  small, preset = preset == 'small', 'video_folder' if preset == 'small' else preset
  config = defaults()
  config.model = model('r2plus1d', blocks=(2, 2, 2, 2), width=64, stem='large', classes=CLASSES[preset])
  config.model.dtype = 'bfloat16'
  config.data.update({'name': preset, 'batch_size': 64, 'image_size': 112, 'frames': 16, 'every': 1, 'colour': 0.2})
  config.data.rate = 15.0
  config.steps = 10_000
  config.eval_every = 500
  config.recipe.update({'label_smoothing': 0.1, 'cutmix': 0.5})
  config.kfac.update({'fisher': 'empirical', 'subsample': 1 / 8, 'warmup_steps': 100})
  if small:
    config.model.update({'blocks': (1, 1, 1), 'width': 8, 'stem': 'patches', 'dtype': 'float32'})
    config.data.update({'batch_size': 32, 'image_size': 56, 'frames': 8, 'short_side': 64})
    config.steps = 100
    config.eval_every = 25
    config.kfac.update({'subsample': 1 / 2, 'warmup_steps': 0})
  return config
