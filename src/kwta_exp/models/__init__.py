"""Networks that take a factory for their activation, and conversion of any other network."""

from kwta_exp.models.cnn import CNN
from kwta_exp.models.convert import convert
from kwta_exp.models.converted import Converted, Torchvision
from kwta_exp.models.densenet import DenseNet
from kwta_exp.models.mlp import MLP
from kwta_exp.models.resnet import ResNet
from kwta_exp.models.vgg import VGG
from kwta_exp.models.wideresnet import WideResNet

__all__ = ["CNN", "MLP", "VGG", "Converted", "DenseNet", "ResNet", "Torchvision", "WideResNet", "convert"]
