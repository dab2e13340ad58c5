"""Networks written out in full, each taking the factory of its activation."""

from kwta_exp.models.cnn import CNN
from kwta_exp.models.mlp import MLP
from kwta_exp.models.resnet import ResNet

__all__ = ["CNN", "MLP", "ResNet"]
