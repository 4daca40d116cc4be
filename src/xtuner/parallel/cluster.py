"""How many processes train, on which machines, and their rendezvous address."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from xtuner.errors import LaunchError, listed

LOOPBACK = "127.0.0.1"
PORT = 29500
"""Default rendezvous port of several nodes, as in torchrun."""


def is_first_process() -> bool:
    """Whether this process is the first of its run, which prints and writes for all of them."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, as seen from one node.

    Attributes:
        processes: Number of processes per node.
        nodes: Number of machines.
        node_rank: Rank of this machine, from 0.
        address: Address of node 0; a single node uses the loopback interface.
        port: Port of node 0; 0 is any free port.
    """

    processes: int = 1
    nodes: int = 1
    node_rank: int = 0
    address: str = LOOPBACK
    port: int = 0

    @property
    def world_size(self) -> int:
        """Number of processes on all nodes."""
        return self.processes * self.nodes

    @property
    def first_rank(self) -> int:
        """The rank of this node's first process."""
        return self.processes * self.node_rank

    @classmethod
    def of(
        cls, processes: int, nodes: int, *, node_rank: str, address: str | None, port: str | None
    ) -> Cluster:
        """Check the options of `xtuner train`; the last three only matter with several nodes.

        Raises:
            LaunchError: Lists all problems.
        """
        if nodes == 1:
            return cls(processes)
        problems = []
        rank = int(node_rank) if re.fullmatch(r"\d{1,6}", node_rank) else -1
        if not 0 <= rank < nodes:
            problems.append(
                f"--node-rank (NODE_RANK) = {node_rank!r}: must be 0 to {nodes - 1}, a different "
                f"one on each node"
            )
        if not address:
            problems.append(
                "--master-addr (ADDR) is missing: give node 0's address, the same on every node"
            )
        number = int(port) if port and re.fullmatch(r"\d{1,5}", port) else -1
        if port and not 0 < number < 65536:
            problems.append(f"--master-port (PORT) = {port!r}: must be 1 to 65535")
        if problems:
            raise LaunchError(listed(f"--nnodes (NNODES) = {nodes}:", problems))
        return cls(processes, nodes, rank, address or "", number if port else PORT)

    def listen(self) -> socket.socket:
        """The socket on which node 0 waits for the others: bound to the given address only, or to
        all addresses if the given one is reached through NAT.

        Raises:
            LaunchError: The port is taken, or the address cannot be resolved.
        """
        try:
            family, _, _, _, where = socket.getaddrinfo(
                self.address, self.port, type=socket.SOCK_STREAM
            )[0]
        except OSError as error:
            raise LaunchError(f"--master-addr {self.address}: {error.strerror or error}") from error
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            try:
                listener.bind(where)
            except OSError:
                listener.bind(("", self.port))
        except OSError as error:
            listener.close()
            raise LaunchError(
                f"cannot listen on {self.address}:{self.port}: {error.strerror}. Choose another "
                f"port with --master-port (PORT), the same on every node"
            ) from error
        listener.listen(1024)
        return listener

    def interface(self) -> str | None:
        """The network interface through which this machine reaches node 0; None if unknown."""
        import psutil

        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((self.address, self.port or PORT))  # sends nothing
                own = probe.getsockname()[0]
        except OSError:
            return None
        for name, addresses in psutil.net_if_addrs().items():
            if any(found.address == own for found in addresses):
                return str(name)
        return None


def joined_by_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a task that ``srun`` started: its rank and the rendezvous address.

    Raises:
        LaunchError: The process was not started by srun.
    """
    rank = environment.get("SLURM_PROCID")
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if rank is None or count is None:
        raise LaunchError(
            "--launcher slurm: this process was not started by srun (SLURM_PROCID is not set). "
            "Start one task per GPU: srun --ntasks-per-node=8 xtuner train ... --launcher slurm"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    # Another port for each step of a job, and for a start while an earlier one still shuts down.
    number, restarts, step = (
        int(re.sub(r"\D", "", environment.get(f"SLURM_{name}", "")) or 0)
        for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")
    )
    number += 10_007 * restarts + 503 * step
    layout = environment.get("SLURM_STEP_TASKS_PER_NODE") or count
    per_node = re.match(r"\d+", layout)
    address = environment.get("ADDR") or environment.get("MASTER_ADDR") or first_host(nodes)
    port = environment.get("PORT") or environment.get("MASTER_PORT")
    return {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "GROUP_RANK": environment.get("SLURM_NODEID", "0"),
        "LOCAL_WORLD_SIZE": per_node[0] if per_node else count,
        "MASTER_ADDR": address or LOOPBACK,
        "MASTER_PORT": port or str(20000 + number % 30000),
    }


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*))?", nodes)
    return (match[1] + (match[2] or "")) if match else ""
