"""Load a run from its folder, or by its name on the hub of Hugging Face."""

import re
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.arguments import checked
from nelbo._utils.numerics import seeded
from nelbo._utils.tensor_files import put_weights, read_tensors
from nelbo._utils.text import shortened
from nelbo.models import custom
from nelbo.models.build import build
from nelbo.runs.config import WEIGHTS, read_config, read_metrics
from nelbo.runs.run import Run

NOT_A_RUN = (
    "other models than nelbo's runs are for evaluate, sweep, elbo, sample and score, and those of"
    " images for report"
)


@checked
def load(path: str | Path, network: custom.Network | None = None) -> Run:
    """Load the run at `path` with its best weights, ready to be measured.

    Args:
        path: a run folder; or, if there is none, the name of a run on the hub of Hugging Face,
            "user/name", see `Run.push_to_hub`.
        network: of a run with a network of your own: the module, of which a copy is used, or a
            function that returns it. Its weights are replaced by those of the run.

    Raises:
        FileNotFoundError: there is no such run, or it has no weights yet.
        ValueError: the weights are truncated or belong to another architecture, the configuration
            has unknown keys, the hub cannot be reached, or the network is missing or another one.
    """
    from nelbo import integrations  # here: a run needs none of it

    if integrations.is_foreign(str(path)):
        raise ValueError(f"{path} is another library's model, and no run; {NOT_A_RUN}")
    if is_name(path):
        from nelbo.runs import hub

        path = hub.pull(str(path))
    path = Path(path)
    run = read_config(path)
    custom.check_given(run.model, network, path)
    tensors, about = read_tensors(limits.contained(path / WEIGHTS, path))
    if network is not None:  # the user's own code, which no file limits
        network = custom.instantiate(network)
    # initial weights are random, but replaced below
    with seeded(0), limits.within_file(tensors, path / WEIGHTS):
        model = build(run.model, run.schema, network=network)
    put_weights(model, tensors, str(path / WEIGHTS), custom.mismatch(network))
    model.eval()
    kind = {"ema": "averaged", "raw": "raw"}.get(str(about.get("weights", "raw")), "other")
    weights = shortened(f"{kind} weights of step {about.get('step', '?')}", 64)
    return Run(path, model, run, weights, read_metrics(path))


def is_name(path: str | Path) -> bool:
    """Return whether a text names a run on the hub: user/name, and nothing here has that path."""
    return (
        isinstance(path, str)
        and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None
        and not Path(path).exists()
        and not Path(path).parent.exists()
    )
