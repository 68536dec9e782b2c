"""Networks as flax.linen modules. They name logical axes and know nothing of meshes or optimisers."""

from .autoencoder import Autoencoder
from .convnet import ConvNet
from .mlp import MLP
from .resnet import ResNet
from .transformer import Transformer
from .vit import ViT

__all__ = ['MLP', 'Autoencoder', 'ConvNet', 'ResNet', 'Transformer', 'ViT']
