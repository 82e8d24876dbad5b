"""conformance, tests of the subject jax on a device: it computes there, and bounds know how products are rounded."""

import jax
import jax.numpy as jnp
import pytest

from conformance.core.judge import Judge
from conformance.core.usage import UsageError
from conformance.run.subjects_by_name import subject_named
from conformance.subjects.jax.subject import products_in


@pytest.fixture(autouse=True)
def _as_before():
    before = jax.config.values["jax_default_device"]
    yield
    jax.config.update("jax_default_device", before)


def test_it_computes_on_the_device_that_is_named():
    last = jax.devices("cpu")[-1]
    subject = subject_named("jax", f"cpu:{last.id}")
    assert jnp.zeros(1).devices() == {last}
    assert Judge(subject).where == f"on cpu:{last.id}, in float32"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "abacus"])
def test_a_platform_that_is_not_there_is_a_usage_error(device):
    with pytest.raises(UsageError, match=rf"'jax' cannot compute on device '{device}': there is no such device"):
        subject_named("jax", device)


@pytest.mark.parametrize("number", ["99", "-1", "first"])
def test_a_number_that_is_not_there_is_a_usage_error(number):
    with pytest.raises(UsageError, match="there is no such device: cpu has the numbers 0 to"):
        subject_named("jax", f"cpu:{number}")


@pytest.mark.parametrize(
    ("platform", "precision", "dtype"),
    [
        ("cpu", None, "float32"),
        ("gpu", None, "tf32"),
        ("gpu", "default", "tf32"),
        ("gpu", "high", "tf32"),
        ("gpu", "tensorfloat32", "tf32"),
        ("gpu", "highest", "float32"),
        ("gpu", "bfloat16", "bfloat16"),
        ("tpu", None, "bfloat16"),
        ("tpu", "highest", "float32"),
    ],
)
def test_bounds_are_of_the_dtype_of_products(platform, precision, dtype):
    assert products_in(platform, precision) == dtype
