"""Natural training: the cross-entropy of clean images."""

from pydantic import dataclasses
from torch import Tensor, nn

from kwta_exp.data.batches import Batch
from kwta_exp.fields import STRICT
from kwta_exp.training.objectives.base import Training


@dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class NaturalTraining(Training):
    """``min E[-log softmax(f(x))_y]``; BatchNorm sees the clean images in train mode."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.x)
        return self.cross_entropy(logits, batch.y), logits
