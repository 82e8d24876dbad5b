"""conformance, loading: a subject by its built-in name, by `module:Class`, or by `path/to/file.py:Class`."""

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path

from conformance.core.capabilities import capabilities
from conformance.core.subject import Subject
from conformance.core.usage import UsageError
from conformance.run.deviations import Deviation, read
from moe_ref.specs.checks import nearest

DEFAULT = ("reference", "jax", "torch", "transformers", "torchtitan", "maxtext", "megatron")
"""What `run` judges when nothing is named."""
STARTED_FIRST = ("torchtitan", "transformers", "megatron", "torch", "reference", "jax", "maxtext")
"""Of several subjects: the quickest, so that a table is there soon."""
BUILT_IN = {
    "reference": "conformance.subjects.reference:Reference",
    "jax": "conformance.subjects.jax.subject:Jax",
    "torch": "conformance.subjects.torch.subject:Torch",
    "transformers": "conformance.subjects.transformers.subject:Transformers",
    "torchtitan": "conformance.subjects.torchtitan.subject:Torchtitan",
    "transformers-grouped-mm": "conformance.subjects.transformers.subject:TransformersGroupedMm",
    "transformers-axk2": "conformance.subjects.transformers.subject:TransformersAxk2",
    "transformers-layouts": "conformance.subjects.transformers.sharded:TransformersLayouts",
    "torch-layouts": "conformance.subjects.torch.sharded:TorchLayouts",
    "torchtitan-float32": "conformance.subjects.torchtitan.subject:TorchtitanFloat32",
    "jax-layouts": "conformance.subjects.jax.sharded:JaxLayouts",
    "jax-processes": "conformance.subjects.jax.sharded:JaxProcesses",
    "torchtitan-bfloat16": "conformance.subjects.torchtitan.subject:TorchtitanBfloat16",
    "torchtitan-layouts": "conformance.subjects.torchtitan.sharded:TorchtitanLayouts",
    "torchtitan-spmd-layouts": "conformance.subjects.torchtitan.sharded:TorchtitanSpmdLayouts",
    "maxtext": "conformance.subjects.maxtext.subject:Maxtext",
    "maxtext-dense": "conformance.subjects.maxtext.subject:MaxtextDense",
    "maxtext-deepseek-custom": "conformance.subjects.maxtext.subject:MaxtextDeepseekCustom",
    "maxtext-inference": "conformance.subjects.maxtext.subject:MaxtextInference",
    "maxtext-layouts": "conformance.subjects.maxtext.sharded:MaxtextLayouts",
    "maxtext-bfloat16": "conformance.subjects.maxtext.subject:MaxtextBfloat16",
    "megatron": "conformance.subjects.megatron.subject:Megatron",
    "megatron-alltoall": "conformance.subjects.megatron.sharded:MegatronAlltoall",
    "megatron-allgather": "conformance.subjects.megatron.sharded:MegatronAllgather",
}
ENTRY_POINTS = "moe_conformance.subjects"
"""Packages that ship their own subject register it in this group, and its name works like a built-in one."""


def known_names() -> dict[str, str]:
    """name -> `module:Class` of every subject that has a name."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | BUILT_IN


def subject_named(subject: str, device: str | None = None) -> Subject:
    """The subject of a name, a `module:Class` or a `path.py:Class`, on a device if one is given.

    Raises:
        UsageError: there is no such name, file, module, class or device, or the class is no usable subject.
        ImportError: the subject's framework is not installed.
    """
    where = known_names().get(subject, subject)
    place, colon, class_name = where.rpartition(":")
    if not colon:
        hint = nearest(subject, known_names())
        raise UsageError(f"subject {subject!r} is no known name{hint}, nor module:Class, nor path.py:Class")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    found = getattr(module, class_name, None)
    if found is None:
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Subject)]
        raise UsageError(f"{place} has no class {class_name!r}{nearest(class_name, classes)}")
    if not (isinstance(found, type) and issubclass(found, Subject)):
        raise UsageError(f"{where} is no subclass of conformance.Subject")
    made = found()
    if not capabilities(made):
        raise UsageError(f"{where} defines none of route(), gate(), configure(); route() is enough to start")
    if device is not None:
        try:
            made.to_device(device)
        except ValueError as sentence:
            raise UsageError(f"subject {subject!r} cannot compute on device {device!r}: {sentence}") from None
        made.device = device
    return made


def _module(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise UsageError(f"there is no module {name!r}") from None
        raise


def _module_of_file(path: Path):
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    name = f"moe_conformance_subject_{path.stem}"  # a file named torch.py is not torch
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))  # its neighbours can be imported, after everything that is installed
    spec.loader.exec_module(module)
    return module


def declared(subject: str, files: list[str]) -> list[Deviation]:
    """Deviations of a subject: shipped ones of a built-in, and those of the files given.

    A variant such as torchtitan-layouts that has none of its own has those of torchtitan.
    """
    shipped = [
        Path(__file__).parents[1] / "deviations_of" / f"{name}.toml" for name in (subject, subject.partition("-")[0])
    ]
    own = [path for path in shipped if path.exists()][:1] if subject in BUILT_IN else []
    return [deviation for path in (*own, *map(Path, files)) for deviation in read(path)]
