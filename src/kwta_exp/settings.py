"""The plain values of a configuration, validated without loading torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from kwta_exp.fields import STRICT, FolderName, Sha256


class Paths(BaseModel):
    """Where data is read from and runs are written to."""

    model_config = STRICT
    data: str
    outputs: str


class EvaluationSettings(BaseModel):
    """How many test images are attacked, how many at a time, and what is kept of them.

    ``conf/evaluation/default.yaml`` describes each value.
    """

    model_config = STRICT
    n: PositiveInt | None
    diagnostic_n: PositiveInt | None
    batch_size: PositiveInt
    save_images: bool
    checks_n: NonNegativeInt
    draws: Annotated[int, Field(ge=2)]
    budget: PositiveInt | None
    processes: PositiveInt
    search: Literal["auto", "exact", "fast"]

    def resolved(self, device: str) -> "EvaluationSettings":
        """The same with ``search=auto`` replaced: fast on a GPU (``device="cuda"``), exact on a CPU."""
        if self.search != "auto":
            return self
        return self.model_copy(update={"search": "fast" if device == "cuda" else "exact"})


class Inputs(BaseModel):
    """The keys that name files, and whether a run folder is trusted."""

    model_config = STRICT
    weights: str | None
    weights_sha256: Sha256 | None
    trust: bool
    paths: Paths


class SweepSettings(BaseModel):
    """The name of a grid's folder, and how many of its jobs share a GPU."""

    model_config = STRICT
    sweep: FolderName | None
    jobs_per_gpu: PositiveInt


class Settings(SweepSettings, Inputs):
    """The plain top-level keys of ``conf/config.yaml``."""

    seed: NonNegativeInt
    retries: NonNegativeInt
    fail_fast: bool
    rerun: bool
    evaluation: EvaluationSettings
