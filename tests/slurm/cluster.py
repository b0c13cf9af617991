"""A SLURM cluster of two nodes on this machine's loopback, for the tests; also by hand: ``python -m tests.slurm.cluster DIR``.

Debian's packages ``slurm-wlm`` and ``munge`` must be installed, and the user be root. All state lies below one folder, except
for the link /etc/slurm/slurm.conf: Snakemake's job step drops every variable named SLURM_*, so that srun inside a job finds the
cluster only there. A configuration that is not ours is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LINK = Path("/etc/slurm/slurm.conf")
MARK = "# stpatch's test cluster"
DAEMONS = ("slurmctld", "slurmd", "munged", "srun", "squeue", "scontrol")

# The nodes claim more than the machine has (config_overrides), since jobs ask for what real slices need. A job that takes more
# memory than it asked for is killed (looked at each second). Jobs of `urgent` push those of `batch` out: these get SIGTERM, ten
# seconds to save, and go back into the queue.
CONF = """{mark}
ClusterName=stpatch
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,preempt_youngest_first
MinJobAge=600
KillWait=10
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class CannotRun(RuntimeError):
    """Why a cluster can't be brought up here: says what is missing."""


class Cluster:
    """Daemons of a cluster below ``folder``; ``with Cluster(folder): ...`` leaves nothing running."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = Path(folder).resolve(), [f"n{i}" for i in range(1, nodes + 1)]
        self.conf = self.folder / "slurm.conf"

    def __enter__(self) -> Cluster:
        self.check()
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise CannotRun unless a cluster may be brought up here."""
        missing = [name for name in DAEMONS if not shutil.which(name)]
        if missing:
            raise CannotRun(f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)")
        if os.geteuid():
            raise CannotRun("SLURM's daemons want root, and this user is not")
        if LINK.exists() and MARK not in LINK.read_text():
            raise CannotRun(f"{LINK} belongs to a cluster that is not ours")

    def start(self) -> None:
        for name in ("run", "log", "state", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge/key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = free_ports(len(self.nodes) + 1)
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=128000 Gres=gpu:4"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        facts = {"mark": MARK, "host": host, "port": ports[0], "folder": self.folder, "nodes": "\n".join(nodes)}
        self.conf.write_text(CONF.format(**facts))
        for number in range(4):  # they stand for GPUs: SLURM counts the files
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        LINK.parent.mkdir(exist_ok=True)
        LINK.unlink(missing_ok=True)
        LINK.symlink_to(self.conf)

        munge = ["--key-file", str(key), "--socket", f"{self.folder}/run/munge.sock", "--pid-file", self._pid("munged")]
        munge += ["--log-file", f"{self.folder}/log/munged.log", "--seed-file", f"{self.folder}/munge/seed"]
        run("munged", "--force", *munge)
        run("slurmctld", "-c", "-f", str(self.conf))
        for name in self.nodes:
            run("slurmd", "-N", name, "-f", str(self.conf))
        for _ in range(120):
            if len(run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N").split()) == len(self.nodes):
                return
            time.sleep(0.25)
        raise RuntimeError(f"the nodes did not come up within 30 s:\n{run('sinfo', '-R', '-l')}")

    def stop(self) -> None:
        """Cancel all jobs, end the daemons (also where the start failed half way), remove the link."""
        if (self.folder / "run/slurmctld.pid").exists():
            with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
                run("scancel", "--full", *run("squeue", "-h", "-o", "%i").split(), timeout=20)
                deadline = time.monotonic() + 15
                while run("squeue", "-h", timeout=20) and time.monotonic() < deadline:
                    time.sleep(0.5)
        for name in ("slurmctld", *(f"slurmd-{node}" for node in self.nodes), "munged"):
            end(Path(self._pid(name)))
        if LINK.is_symlink() and LINK.readlink() == self.conf:
            LINK.unlink()

    def jobs(self) -> list[dict[str, str]]:
        """All jobs that the controller remembers: id, state, comment, memory and time asked, restarts, exit code."""
        found = []
        for line in run("scontrol", "show", "job", "--oneliner").splitlines():
            job = dict(re.findall(r"(\S+?)=(\S*)", line))
            if "JobId" in job:
                found.append(job)
        return found

    def _pid(self, name: str) -> str:
        return f"{self.folder}/run/{name}.pid"


def run(*command: str, timeout: float = 60) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end(pid_file: Path) -> None:
    """Stop the process that a pid file names: kindly, after five seconds for good."""
    if not pid_file.is_file() or not pid_file.read_text().strip():
        return
    pid = int(pid_file.read_text())
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(50):
            time.sleep(0.1)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":  # dead, only not yet buried
                return
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1])):
        print(run("sinfo"), "The cluster runs until this command is interrupted.", sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pause()
