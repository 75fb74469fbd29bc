"""What jax_private.py imports does what the package needs of it; if not, the message names the version of JAX."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import textwrap

import pytest

WHERE = f"jax {importlib.metadata.version('jax')} has broken what jaxlm/runtime/jax_private.py imports"
# As in processes.py.
STORE = """
    import jax
    from jaxlm.runtime.jax_private import global_state

    assert global_state.client is None and global_state.process_id == 0
    jax.distributed.initialize(ADDRESS, 1, 0, cluster_detection_method="deactivate")
    assert (global_state.process_id, global_state.num_processes) == (0, 1)
    assert global_state.coordinator_address == ADDRESS
    client = global_state.client
    client.key_value_set("folder/a", "1")
    try:
        client.key_value_set("folder/a", "2")
        raise AssertionError("a key was set twice")
    except jax.errors.JaxRuntimeError:
        pass
    client.key_value_set("folder/a", "3", allow_overwrite=True)
    assert client.key_value_try_get("folder/a") == client.blocking_key_value_get("folder/a", 1000) == "3"
    assert client.key_value_dir_get("folder/") == [("folder/a", "3")]
    client.wait_at_barrier("barrier", 1000)
    jax.distributed.shutdown()
"""
SLURM = """
    from jaxlm.runtime.jax_private import SlurmCluster

    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, "1234") == "node7:1234"
"""
UNUSED = """
    import jax
    from jaxlm.runtime.jax_private import dce_jaxpr

    jaxpr = jax.make_jaxpr(lambda x: (jax.numpy.sin(x), jax.numpy.cos(x))[1])(1.0).jaxpr
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["sin", "cos"]
    used, _ = dce_jaxpr(jaxpr, [True])
    assert [equation.primitive.name for equation in used.eqns] == ["cos"]
"""


@pytest.mark.parametrize("program", [STORE, SLURM, UNUSED], ids=["key-value store", "slurm", "unused operations"])
def test_private_parts_of_jax_do_what_is_needed(program: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_NUM_TASKS": "2"}
    program = f"ADDRESS = {address!r}\n{textwrap.dedent(program)}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | slurm | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{WHERE}:\n{done.stderr}"
