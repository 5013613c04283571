"""The experiments of the study, and with them the claims, in the order in which they are reported.

Each file defines what one or several claims need: the training, the measurement, and the plots. To add an experiment,
write such a file and add it to `EXPERIMENTS`. The margins were fixed before anything was trained.
"""

from batchnorm.errors import InputError
from batchnorm.study.claims import Claim
from batchnorm.study.experiments.alternatives import ALTERNATIVES
from batchnorm.study.experiments.batch_sizes import BATCH_SIZES
from batchnorm.study.experiments.convergence import ACCURACY, CONVERGENCE, RATES
from batchnorm.study.experiments.evaluation import EVALUATION
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.experiments.gradients import GRADIENTS
from batchnorm.study.experiments.inference import INFERENCE
from batchnorm.study.experiments.initialization import INITIALIZATION
from batchnorm.study.experiments.paper import PAPER
from batchnorm.study.experiments.regularization import REGULARIZATION
from batchnorm.study.experiments.shift import SHIFT

__all__ = ["CLAIMS", "EXPERIMENTS", "Experiment", "chosen"]

EXPERIMENTS: tuple[Experiment, ...] = (
    CONVERGENCE,
    RATES,
    ACCURACY,
    GRADIENTS,
    INITIALIZATION,
    REGULARIZATION,
    PAPER,
    SHIFT,
    BATCH_SIZES,
    ALTERNATIVES,
    EVALUATION,
    INFERENCE,
)

CLAIMS: tuple[Claim, ...] = tuple(claim for experiment in EXPERIMENTS for claim in experiment.claims)


def chosen(names: list[str]) -> tuple[list[Experiment], list[Claim]]:
    """The experiments and claims with these names, in order; all if there are no names.

    Raises:
        InputError: If a name is unknown.
    """
    known = {claim.id for claim in CLAIMS} | {experiment.id for experiment in EXPERIMENTS}
    if unknown := [name for name in names if name not in known]:
        ids = ", ".join(claim.id for claim in CLAIMS)
        sections = ", ".join(experiment.id for experiment in EXPERIMENTS)
        raise InputError(f"there is no claim {', '.join(unknown)}; choose of {ids}, or whole sections: {sections}.")
    claims = [
        claim
        for experiment in EXPERIMENTS
        for claim in experiment.claims
        if not names or claim.id in names or experiment.id in names
    ]
    return [experiment for experiment in EXPERIMENTS if any(claim in claims for claim in experiment.claims)], claims
