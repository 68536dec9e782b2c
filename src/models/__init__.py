"""Networks as flax.linen modules, which name logical axes and do not depend on meshes or optimisers."""

from ..extras import need

need('train', 'flax', 'einops')  # isort: split

from .autoencoder import Autoencoder
from .convnet import ConvNet
from .diffaugment import POLICIES, augment
from .directed import DirectedVideo
from .gan import Discriminator, Generator
from .graphs import DECODERS, Graph, LinkPredictor, ZeroShot
from .mlp import MLP
from .r2plus1d import R2Plus1D
from .resnet import ResNet
from .ternary import TernaryNet
from .transformer import Transformer
from .video_transformer import VideoTransformer
from .vit import ViT

__all__ = [
  'DECODERS',
  'MLP',
  'POLICIES',
  'Autoencoder',
  'ConvNet',
  'DirectedVideo',
  'Discriminator',
  'Generator',
  'Graph',
  'LinkPredictor',
  'R2Plus1D',
  'ResNet',
  'TernaryNet',
  'Transformer',
  'ViT',
  'VideoTransformer',
  'ZeroShot',
  'augment',
]
