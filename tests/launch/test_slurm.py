"""launch/slurm.sbatch on a real Slurm with one controller and two nodes on this machine; needs root.

Debian: apt-get install slurm-wlm munge
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from workers import ROOT, addresses, finish, lines, same_weights

pytestmark = pytest.mark.slow

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""

Slurm = Callable[..., str]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Starts a Slurm cluster, and gives a function that runs Slurm commands on it."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0:
        pytest.skip("needs root and Slurm's daemons: apt-get install slurm-wlm munge")
    # Socket paths must be short, and munged refuses a folder that others can write to.
    folder = Path("/run") / f"hyperprior-slurm-{os.getpid()}"
    for path in (folder, folder / "state", folder / "spool-node1", folder / "spool-node2"):
        path.mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = [address.rpartition(":")[2] for address in addresses(3)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports))
    monkeypatch.setenv("SLURM_CONF", str(config))

    def run(*command: object) -> str:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", f"--socket={folder}/munge.socket", *files]
    daemons = [subprocess.Popen(munged, stderr=subprocess.DEVNULL)]
    time.sleep(1)
    daemons.append(subprocess.Popen(["slurmctld", "-D"], stderr=subprocess.DEVNULL))
    for node in ("node1", "node2"):
        daemons.append(subprocess.Popen(["slurmd", "-D", "-N", node], stderr=subprocess.DEVNULL))
    try:
        for _ in range(60):
            time.sleep(0.5)
            nodes = subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True).stdout
            if nodes.strip() == "2 idle":
                break
        else:
            raise AssertionError(f"{nodes}\n{(folder / 'slurmctld.log').read_text()}")
        yield run
    finally:
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_that_loses_a_node_is_queued_again_and_finishes(
    slurm: Slurm, tmp_path: Path, nested_tar: Path, empty_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERPRIOR", str(Path(sys.executable).with_name("hyperprior")))
    run = tmp_path / "run"
    arguments = [empty_config, *TINY, f"data.train=[{nested_tar}]", "distribute.intra_op_threads=1"]
    arguments += ["train.steps=1200", "train.checkpoint_every=20", "train.validate_every=null"]
    output = f"--output={tmp_path}/job.out"
    script = ROOT / "launch" / "slurm.sbatch"
    job = slurm("sbatch", "--parsable", "--nodes=2", output, script, *arguments, "--run", run)

    def told() -> str:
        logs = [tmp_path / "job.out", *sorted((run / "slurm").glob("rank-*.log"))]
        return "\n".join(f"== {log}\n{log.read_text()}" for log in logs if log.exists())

    def wait_until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, told()
            time.sleep(0.2)

    def rows() -> int:
        return len(lines(run, "train")) if (run / "metrics.jsonl").exists() else 0

    def state() -> str:
        return slurm("squeue", "-h", "-j", job, "-o", "%T")

    wait_until(lambda: rows() > 40, 120)
    assert state() == "RUNNING"
    # Kill the worker of one node.
    pids = subprocess.run(["pgrep", "-f", "bin/hyperprior train"], capture_output=True, text=True).stdout.split()
    (victim,) = [pid for pid in pids if b"SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    wait_until(lambda: "queued again" in told(), 60)
    # Slurm starts a requeued job only after two minutes.
    wait_until(lambda: told().count("restart 1") == 2, 240)
    began = rows()
    wait_until(lambda: rows() > began + 40, 120)
    # SIGTERM to the job's steps, as Slurm sends it before a time limit or on preemption.
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: told().count("queued again") == 2, 60)
    assert "stopped at step" in told()
    wait_until(lambda: (run / "model" / "model.json").exists(), 400)
    wait_until(lambda: subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout == "", 60)
    assert told().count("restart 2") == 2 and "1200 steps" in told()
    finish(tmp_path, 2, *arguments, "--run", "alone")
    same_weights(tmp_path / "alone", run)
