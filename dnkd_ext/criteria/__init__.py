"""KD++, DKD++, DIST++, ReviewKD++ and hard KD++: cross entropy, a distillation and the ND loss.

One page each; what they share is in _base.py.

Source: "Improving Knowledge Distillation via Regularizing Feature Direction and Norm"
(arXiv 2305.17007).
"""

from dnkd_ext.criteria._base import CriterionTerms
from dnkd_ext.criteria.dist import DISTPlusPlus
from dnkd_ext.criteria.dkd import DKDPlusPlus
from dnkd_ext.criteria.hard_kd import HardKDPlusPlus
from dnkd_ext.criteria.kd import KDPlusPlus
from dnkd_ext.criteria.review_kd import ReviewKDPlusPlus

__all__ = [
    "CriterionTerms",
    "DISTPlusPlus",
    "DKDPlusPlus",
    "HardKDPlusPlus",
    "KDPlusPlus",
    "ReviewKDPlusPlus",
]
