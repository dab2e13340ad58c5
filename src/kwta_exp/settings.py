"""The plain values of a configuration, checked; torch is not needed to read them."""

from typing import Literal

from pydantic import BaseModel, NonNegativeInt, PositiveInt

from kwta_exp.fields import STRICT, Sha256


class Paths(BaseModel):
    """Where data is read from and runs are written to."""

    model_config = STRICT
    data: str
    outputs: str


class EvaluationSettings(BaseModel):
    """How many test images are attacked, how many at a time, and what is kept of them.

    ``conf/evaluation/default.yaml`` says what each does.
    """

    model_config = STRICT
    n: PositiveInt | None
    diagnostic_n: PositiveInt | None
    batch_size: PositiveInt
    save_images: bool
    checks_n: NonNegativeInt
    budget: PositiveInt | None
    processes: PositiveInt
    search: Literal["exact", "fast"]


class Settings(BaseModel):
    """The plain top-level keys of ``conf/config.yaml``."""

    model_config = STRICT
    seed: NonNegativeInt
    weights: str | None
    weights_sha256: Sha256 | None
    trust: bool
    rerun: bool
    paths: Paths
    evaluation: EvaluationSettings
