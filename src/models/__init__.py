"""Networks as flax.linen modules. They name logical axes and know nothing of meshes or optimisers."""

from .autoencoder import Autoencoder
from .convnet import ConvNet
from .mlp import MLP
from .r2plus1d import R2Plus1D
from .resnet import ResNet
from .transformer import Transformer
from .video_transformer import VideoTransformer
from .vit import ViT

__all__ = ['MLP', 'Autoencoder', 'ConvNet', 'R2Plus1D', 'ResNet', 'Transformer', 'ViT', 'VideoTransformer']
