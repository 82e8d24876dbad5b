"""conformance, tests of --device: a subject is told, the report says so, and a device that is not there is named."""

import numpy as np
import pytest

from conformance import Routing, Subject
from conformance.core.judge import Judge
from conformance.core.rounding import EPSILON
from conformance.core.usage import UsageError
from conformance.layer.balls import narrower
from conformance.run import kinds, subjects_by_name
from conformance.run.subjects_by_name import subject_named

assert kinds


class Told(Subject):
    """Computes on 'abacus' alone, in TF32."""

    def route(self, logits_TE, spec, expert_bias_E):
        ids_TK = np.argsort(-logits_TE, axis=-1, kind="stable")[:, : spec.top_k]
        return Routing(expert_ids_TK=ids_TK, weights_TK=np.zeros(ids_TK.shape))

    def to_device(self, device):
        if device != "abacus":
            raise ValueError("there is an abacus alone")
        self.expert_dtype = "tf32"


class Deaf(Told):
    """Has no to_device."""

    to_device = Subject.to_device


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    own = {"told": f"{__name__}:Told", "deaf": f"{__name__}:Deaf"}
    monkeypatch.setattr(subjects_by_name, "known_names", lambda: own)


def test_a_subject_is_told_its_device_and_the_report_says_where_and_in_what():
    subject = subject_named("told", "abacus")
    assert subject.device == "abacus"
    assert Judge(subject).where == "on abacus, in float32, experts in tf32"
    assert Judge(subject_named("told")).where == ""


def test_a_device_that_is_not_there_is_a_usage_error_that_names_it():
    with pytest.raises(UsageError, match="'told' cannot compute on device 'cuda:7': there is an abacus alone"):
        subject_named("told", "cuda:7")
    with pytest.raises(UsageError, match=r"device 'cuda': Deaf has no to_device\(\)"):
        subject_named("deaf", "cuda")


def test_the_interpreter_wants_triton_to_be_told_before_it_is_imported(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="cannot compute on device 'interpreter': set TRITON_INTERPRET=1"):
        subject_named("conformance.subjects.torch.subject:Torch", "interpreter")


def test_tf32_is_a_dtype_of_products_and_of_no_array():
    assert EPSILON["float32"] < EPSILON["tf32"] < EPSILON["bfloat16"]
    assert narrower("float32", "tf32") == "tf32"
    subject = subject_named("told")
    subject.logit_dtypes = ("tf32",)
    with pytest.raises(ValueError, match="'tf32' is not one of"):
        Judge(subject)
