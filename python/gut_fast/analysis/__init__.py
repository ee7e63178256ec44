"""The behaviour of an update rule on a topology before a run, from its coefficients and the eigenvalues of W alone.

Where every agent has the gradient ``g = h z`` (curvature h), one step of a rule acts on the component of ``(z, state)``
along an eigenvector of W of eigenvalue λ as the small matrix

    T(λ) = [B + (C + (λ − 1) E) A]  with its g column times h added to its z column.

Its eigenvalues are the rule's *modes*; a mode of modulus above one grows without bound. λ ≠ 1 gives the consensus
modes, the disagreement between agents; λ = 1 the average mode, how the agents' average moves. At curvature zero the
modes do not depend on the learning rate.

Two modes at λ = 1 are no instability and are left out: the eigenvalue 1 of a free translation of all agents (z is in
the null space of a flat loss), and directions that no gradient ever reaches from zero state, such as the mean of GUT's
r or gradient tracking's difference of mean v and mean q, which stay zero.

Where the modes decay, the same matrices give what a rule settles to: its bias and its answer to gradient noise. Agents
that differ in curvature are outside this analysis. `predict` gathers all results; ``gut-fast topology`` prints it.
"""

from gut_fast.analysis.choice import advice, auto_kappa, auto_mu, with_auto
from gut_fast.analysis.coding import coding_advice, coding_error, coding_limit
from gut_fast.analysis.limits import Stability, averaging_rate_limit, learning_rate_limit, stability, stability_limit
from gut_fast.analysis.prediction import Prediction, predict
from gut_fast.analysis.rounding import RECENTRING, Rounding, conserved, keeps_mean, rounding
from gut_fast.analysis.steady import Noise, bias_factor, noise, noise_amplification, step_gain
from gut_fast.analysis.transition import modes

__all__ = [
    "RECENTRING",
    "Noise",
    "Prediction",
    "Rounding",
    "Stability",
    "advice",
    "auto_kappa",
    "auto_mu",
    "averaging_rate_limit",
    "bias_factor",
    "coding_advice",
    "coding_error",
    "coding_limit",
    "conserved",
    "keeps_mean",
    "learning_rate_limit",
    "modes",
    "noise",
    "noise_amplification",
    "predict",
    "rounding",
    "stability",
    "stability_limit",
    "step_gain",
    "with_auto",
]
