"""One LossCase per loss; the tests of parity, autograd, compilation and errors iterate over them.

A new loss adds an entry to CASES and is then held to everything the others are held to.
"""

from tests.cases.base import (
    DTYPES,
    LossCase,
    convert,
    finite,
    replaced,
    rows_of,
    tensors_of,
    truth,
)
from tests.cases.dist import DIST_LOSS
from tests.cases.logits import CE_DKD_LOSS, CE_KD_LOSS, DKD_LOSS, KD_LOSS, LOGIT_CASES
from tests.cases.nd import ND_LOSS

CASES = (ND_LOSS, *LOGIT_CASES, DIST_LOSS)

__all__ = [
    "CASES",
    "CE_DKD_LOSS",
    "CE_KD_LOSS",
    "DIST_LOSS",
    "DKD_LOSS",
    "DTYPES",
    "KD_LOSS",
    "LOGIT_CASES",
    "ND_LOSS",
    "LossCase",
    "convert",
    "finite",
    "replaced",
    "rows_of",
    "tensors_of",
    "truth",
]
