"""The papers' protocols: what is trained and tested, running it, and the tables beside the published figures."""

from cdc_models.protocols.plan import PROTOCOLS, TRANSFER, Cell, Target, plan
from cdc_models.protocols.published_figures import FIGURES, Figure, published_figure
from cdc_models.protocols.results import is_test
from cdc_models.protocols.run import Runner
from cdc_models.protocols.tables import latex, lines, markdown, summarise

__all__ = [
    "FIGURES",
    "PROTOCOLS",
    "TRANSFER",
    "Cell",
    "Figure",
    "Runner",
    "Target",
    "is_test",
    "latex",
    "lines",
    "markdown",
    "plan",
    "published_figure",
    "summarise",
]
