"""tools, families: measures the real routers and blocks of docs/families.md. `python -m tools.families`, two minutes.

What it stores is read by `moe-conformance families` and by `python -m tools.docs`, which need no framework.
"""

from importlib.metadata import version

from conformance.run import kinds  # noqa: F401  (its chapters register)
from conformance.run.verified import store

if __name__ == "__main__":
    store({name: version(name) for name in ("transformers", "torch")})
