"""Start the ranks of a training run: ``python -m trainer.launch --nodes N --ranks R -- FLAGS`` of `trainer.pretrain`.

One rank runs right here; several on this machine, by torchrun. On several nodes srun starts one torchrun on each node of the
SLURM job that this runs in, and SLURM's variables say where they meet. This process becomes what it starts, so that a signal
to stop reaches it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping

from trainer.errors import ConfigError

PRETRAIN = ("-m", "trainer.pretrain")
SIGNALS = "SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT"  # that torchrun passes on to the ranks; USR1 is not among its own
# A step of SLURM's numbers its nodes; the shell on each node puts that number in.
ON_NODE = 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'


def command(
    nodes: int, ranks: int, cpus: int, flags: list[str], python: str, host: str, env: Mapping[str, str]
) -> list[str]:
    """The command that starts ``nodes`` x ``ranks`` ranks; ``cpus`` a node.

    ``host`` must be the first node of the job, where SLURM runs its batch script: the ranks meet there, at a port that
    follows from the job's number, so that two jobs on one node don't meet each other.

    Raises
    ------
    ConfigError
        Several nodes, but not inside a SLURM job.
    """
    if nodes * ranks == 1:
        return [python, *PRETRAIN, *flags]
    torchrun = ["--nproc-per-node", str(ranks), "--signals-to-handle", SIGNALS]
    if nodes == 1:
        return [python, "-m", "torch.distributed.run", "--standalone", *torchrun, *PRETRAIN, *flags]
    if "SLURM_JOB_ID" not in env:
        next_step = "submit it to SLURM, or start torchrun on each node yourself"
        raise ConfigError("--nodes", nodes, "1 outside of a SLURM job", next_step)
    port = 20000 + int(env["SLURM_JOB_ID"]) % 10000
    torchrun += ["--nnodes", str(nodes), "--master-addr", host, "--master-port", str(port)]
    step = ["--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1", "--cpus-per-task", str(cpus)]
    return ["srun", *step, "--kill-on-bad-exit=1", "sh", "-c", ON_NODE, python, *torchrun, *PRETRAIN, *flags]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.launch", description="The rest goes to trainer.pretrain.")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks on each: its GPUs (default 1)")
    parser.add_argument(
        "--cpus", type=int, default=1, metavar="C", help="CPUs on each, shared by its ranks (default 1)"
    )
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="of trainer.pretrain, after --")
    asked = parser.parse_args(argv)
    if min(asked.nodes, asked.ranks, asked.cpus) < 1:
        parser.error("--nodes, --ranks and --cpus are at least 1")
    host = socket.gethostname()
    try:
        start = command(asked.nodes, asked.ranks, asked.cpus, asked.flags, sys.executable, host, os.environ)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if asked.ranks > 1:  # or each would take all of them
        os.environ["OMP_NUM_THREADS"] = str(max(1, asked.cpus // asked.ranks))
    os.execvp(start[0], start)


if __name__ == "__main__":
    main()
