"""Named types of the numbers users write, checked where an object is made.

They serve pydantic dataclasses and ``validate_call`` alike, so YAML and Python are held to the
same rules. Numbers are strict: ``true`` is not 1.0 and ``"3"`` is not 3.
"""

import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


_FRACTION = re.compile(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*")


def fraction(value: object) -> object:
    """``"8/255"`` as a number; everything else as it is."""
    if isinstance(value, str) and (written := _FRACTION.fullmatch(value)):
        try:
            return float(Fraction(written[1]) / Fraction(written[2]))
        except (ValueError, ZeroDivisionError, OverflowError):
            return value
    return value


Ratio = Annotated[float, Field(gt=0, le=1)]
"""The share of a layer's values that win, in (0, 1]."""

Eps = Annotated[float, BeforeValidator(fraction), Field(ge=0)]
"""A perturbation radius or step in pixel units of [0, 1]; ``8/255`` may be written as such."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A proper share, in (0, 1)."""

Rate = Annotated[float, Field(ge=0, lt=1)]
"""A share that may be zero, in [0, 1)."""

AtLeastTwo = Annotated[int, Field(ge=2)]
"""An integer of 2 or more."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""The hex digits of a SHA-256."""

Norm = Literal["linf", "l2"]
"""The norm that bounds a perturbation."""
