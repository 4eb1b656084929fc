"""What ``[execute] name = "ray"`` may say; imports no Ray."""

from __future__ import annotations

from kdcore import Field, Options


class RayOptions(Options):
    """Which cluster, and what a stage takes of it.

    Args:
        address: "local" starts a cluster on this machine for the run, "auto" joins the one that runs here,
            "10.0.0.1:6379" another.
        cpus: that Ray counts for a stage; default: its threads.
        gpus: the same; default: 1 for a stage on CUDA, else 0.
        tries: how often a stage is begun whose workers die.
        shared: the store is on a file system that all machines see under the same path: nothing is shipped.
    """

    address: str = Field("local", description='"local", "auto", or an address like "10.0.0.1:6379"')
    cpus: float | None = Field(None, gt=0, description="CPUs of a stage, above 0")
    gpus: float | None = Field(None, ge=0, description="GPUs of a stage, from 0")
    tries: int = Field(3, ge=1, description="a number from 1")
    shared: bool = Field(False, description="true or false")
