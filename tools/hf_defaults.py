"""Writes moe_ref/specs/readers/hf_defaults.py: what the config classes of transformers say of the keys of our rows.

    python -m tools.hf_defaults

Needs transformers; a test holds the file against the installed release.
"""

import inspect
import math
import warnings
from pathlib import Path
from textwrap import wrap
from typing import Any

from moe_ref.specs.readers.hf_rows import ROWS, Row

ROOT = Path(__file__).parents[1]
FILE = ROOT / "moe_ref/specs/readers/hf_defaults.py"
HEAD = '''"""moe_ref, configs of huggingface: what a key is where a file does not have it, and its other names.

Generated from the config classes of transformers 5.24 by `python -m tools.hf_defaults`; do not edit.
"""

from typing import Any

'''
LAYER_KEYS = {
    "first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "mlp_only_layers", "expert_layer_period",
    "expert_layer_offset", "moe_layer_start_index", "moe_layer_interval", "interleave_moe_layer_step",
    "enable_moe_block",
    "moe_layer_end_index",
}  # fmt: skip


def config_class(row: Row) -> Any:
    """The config class of a row's first model type; None where transformers has none."""
    import transformers
    from transformers import CONFIG_MAPPING

    name = row.model_types[0]
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]
    for each in row.model_types:  # parts without an entry of their own
        folder = getattr(transformers.models, row.family, None)
        for found in vars(folder or object).values() if folder else ():
            if inspect.isclass(found) and getattr(found, "model_type", "") == each:
                return found
    return None


def plain(values: dict, row: Row) -> dict:
    """A config as its file is read."""
    values = row.prepare(values) if row.prepare else values
    return {key: value for key, value in values.items() if not isinstance(value, dict)}


def defaults() -> tuple[dict, dict]:
    """Both tables."""
    found, names = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in ROWS:
            if row.source or (cls := config_class(row)) is None:
                continue
            values = plain(cls().to_dict(), row)
            keys = (row.keys | LAYER_KEYS | {row.depth}) & values.keys()
            found[row.model_types[0]] = {key: values[key] for key in sorted(keys)}
            mapped = {other: key for other, key in cls.attribute_map.items() if key in row.keys | {row.depth}}
            if mapped:
                names[row.model_types[0]] = dict(sorted(mapped.items()))
    return found, names


def page() -> str:
    """The text of the file."""
    found, names = defaults()
    text = HEAD + "DEFAULTS: dict[str, dict[str, Any]] = {\n"
    for name, values in found.items():
        text += _entry(name, ", ".join(f"{key!r}: {_literal(value)}" for key, value in values.items()))
    text += "}  # fmt: skip\n\nSYNONYMS: dict[str, dict[str, str]] = {\n"
    for name, values in names.items():
        text += _entry(name, repr(values)[1:-1])
    return (text + "}  # fmt: skip\n").replace("'", '"')


def _entry(name: str, values: str) -> str:
    """A dict under its name, on one line where that is short enough."""
    if len(line := f"    {name!r}: {{{values}}},\n") <= 121:
        return line
    lines = wrap(values, 112, break_long_words=False, break_on_hyphens=False)
    return "".join([f"    {name!r}: {{\n", *(f"        {line}\n" for line in lines), "    },\n"])


def _literal(value) -> str:
    return 'float("inf")' if isinstance(value, float) and math.isinf(value) else repr(value)


if __name__ == "__main__":
    FILE.write_text(page())
