"""Networks as flax.linen modules. They name logical axes and know nothing of meshes or optimisers."""

from .autoencoder import Autoencoder
from .mlp import MLP
from .resnet import ResNet
from .transformer import Transformer

__all__ = ['MLP', 'Autoencoder', 'ResNet', 'Transformer']
