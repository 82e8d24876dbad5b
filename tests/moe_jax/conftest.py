"""moe_jax, tests: eight CPU devices for all of them, asked for before JAX starts any."""

from moe_jax.parallel import use_cpu_devices

use_cpu_devices(8)
