# SPDX-License-Identifier: Apache-2.0
"""A real Slurm with two nodes on this machine: munged, slurmctld and two slurmd, in a folder of
their own.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. Both nodes are this
machine, under two names; their GPUs are copies of /dev/null, which Slurm allots (GRES,
CUDA_VISIBLE_DEVICES) and nothing can compute on.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "scontrol",
    "sinfo",
    "scancel",
)
NODES = ("n1", "n2")

CONFIG = """\
ClusterName=two_nodes
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
ReturnToService=2
KillWait=30
MinJobAge=300
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
EnforcePartLimits=ALL
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] Gres=gpu:{gpus} CPUs=2 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN
# Jobs of the second partition preempt those of the first, which are warned.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""  # noqa: E501


def why_not() -> str | None:
    """Why no Slurm can be brought up here; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return (
            f"Slurm is not installed ({', '.join(missing)} missing): apt-get install "
            "--no-install-recommends slurmctld slurmd slurm-client munge"
        )
    if os.geteuid() != 0:
        return "only root can start a Slurm with several nodes on one machine"
    return None


def _free_ports(count: int, start: int) -> int:
    """The first of ``count`` neighbouring free ports, below the range for clients."""
    for first in range(start, 19000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise RuntimeError(f"no free ports between {start} and 19000")


class TwoNodes:
    """
    Args:
        folder: everything is below it; sockets are, so it must be short.
        gpus: per node.
        index: of this cluster among those that run on this machine at the same time. Each has
            ports and job numbers of its own, from which Ray's ports follow.
    """

    def __init__(self, folder: Path, gpus: int = 1, index: int = 0):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._pid_files = [
            folder / "run" / f"{name}.pid"
            for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged")
        ]
        for name in ("run", "state", "log", "dev", "spool/n1", "spool/n2"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for i in range(gpus):
            os.mknod(folder / f"dev/nvidia{i}", 0o020666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{gpus - 1}]\n")
        port = _free_ports(3, 16800 + 300 * index)
        values = {
            "first_job": 1 + 500 * index,
            "host": socket.gethostname().split(".")[0],
            "port": port,
            "first": port + 1,
            "last": port + 2,
        }
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, gpus=gpus, **values))

    def start(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        self.call("munged", "--force", f"--key-file={self.folder}/munge.key",
            f"--socket={run}/munge.sock",
                  f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log",
                  f"--seed-file={run}/munged.seed")  # fmt: skip
        self.call("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self.call("slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
        deadline = time.monotonic() + 60
        while (
            self.call("sinfo", "-h", "-N", "-o", "%T").split() != ["idle"] * 4
        ):  # each node in both partitions
            if time.monotonic() > deadline:
                raise RuntimeError(
                    "the nodes did not become idle: " + (log / "slurmctld.log").read_text()[-2000:]
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel what runs, then end the daemons, each after those that need it."""
        self.cancel_all()
        for path in self._pid_files:
            if not path.exists():
                continue
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists():
                    break
                time.sleep(0.1)

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they are gone."""
        self.call("scancel", "--user=root")
        deadline = time.monotonic() + 60
        while self.call("squeue", "--noheader", "--format=%T").strip():
            if time.monotonic() > deadline:
                raise RuntimeError("jobs do not end: " + self.call("squeue"))
            time.sleep(0.5)

    def call(self, *command: str, environment: Mapping[str, str | None] | None = None) -> str:
        """The output of one of Slurm's commands, or of one that calls them. A variable that is None
        is taken away.

        Raises:
            RuntimeError: with what it printed, if it fails.
        """
        variables = {**self.environment, **(environment or {})}
        variables = {name: value for name, value in variables.items() if value is not None}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def log(self, job: int) -> str:
        """What Slurm's daemons have to say about a job."""
        lines = []
        for path in sorted((self.folder / "log").glob("slurm*.log")):
            lines += [
                line
                for line in path.read_text(errors="replace").splitlines()
                if re.search(rf"\b{job}\b", line)
            ]
        return "\n".join(lines[-40:])

    def state(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` knows about a job."""
        fields = self.call("scontrol", "show", "job", str(job), "--oneliner").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)
