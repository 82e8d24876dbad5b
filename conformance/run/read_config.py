"""conformance, the command that reads a published config: `moe-conformance spec --config FILE`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.core.usage import UsageError
from moe_ref import LayerSpec, RouterSpec

READERS: dict[str, Callable[..., LayerSpec]] = {
    "hf": LayerSpec.from_hf,
    "maxtext": LayerSpec.from_maxtext,
    "torchtitan": LayerSpec.from_torchtitan,
    "megatron": LayerSpec.from_megatron,
}


def text_of(file: Path, source: str, *, layers: bool = False, router: bool = False, ignore: tuple[str, ...] = ()
            ) -> str:  # fmt: skip
    """The layer of a config as JSON, which `run --spec` takes; with `layers`, of each decoder layer, null where dense,
    with `router` the router alone.

    Raises:
        UsageError: it cannot be read, with the reader's own sentence.
    """
    try:
        if layers:
            if source != "hf":
                raise UsageError(f"--layers is of configs of huggingface, not of {source}")
            found: Any = [layer and layer.to_dict() for layer in LayerSpec.layers_from_hf(file, ignore=ignore)]
        elif router:
            if source != "hf":
                raise UsageError(f"--router is of configs of huggingface, not of {source}")
            found = RouterSpec.from_hf(file, ignore=ignore).to_dict()
        else:
            found = READERS[source](file, ignore=ignore).to_dict()
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    return json.dumps(found, indent=1)
