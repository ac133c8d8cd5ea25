"""Ray's workers without an import of their own: each is a fork of one process that has imported what they need.

A worker of a sweep imports torch and transformers for ten seconds of a processor before it does a second's work, and a suite
starts dozens. What Ray starts here in its stead asks that process for a copy of itself, which goes on as Ray's worker does,
with the arguments, environment, folder and files that it would have had; what asked ends as the copy ends, and the copy where
what asked is killed. Programs of tests that drive Ray can begin so too (:func:`warm_program`). All processes of a test run
share the one that is copied, which ends with them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "TESTS_WARM_WORKERS"  # the socket's name, for what Ray starts
PROGRAM = "--program"
SERVING: list[Any] = []  # by this process; it ends when the last process of the run has
ASKS_FOR_A_WORKER, STAYS, BEGUN = b"w", b"s", b"b"
OF_TRANSFORMERS = ("transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava")
OF_RAY = ("asyncio", "google.protobuf", "grpc", "jsonschema", "msgpack", "psutil", "requests", "tqdm.auto", "yaml")
OF_WORKERS = ("pipelines.features.encoding", "pipelines.sweep.answers", "pipelines.workers", *OF_TRANSFORMERS)


def _connect(name: str, tries: int = 1) -> socket.socket:
    for left in reversed(range(tries)):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect("\0" + name)
        except ConnectionRefusedError:  # it has its name and does not listen yet
            connection.close()
            if not left:
                raise
            time.sleep(0.05)
        else:
            break
    return connection


# --- in a test run -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def warm_workers() -> Iterator[None]:
    """Until it ends, what this process starts of Ray has such workers. Linux alone has the names of sockets that this
    needs; elsewhere workers start as they do by themselves."""
    if sys.platform != "linux":
        yield
        return
    from unittest.mock import patch

    name = f"nuwa-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with socket.socket(socket.AF_UNIX) as listening:
        if _is_first(listening, name):
            _serve_from(listening)
    with _connect(name, tries=100) as stays, patch.dict(os.environ, {VARIABLE: name}), _asked_for():
        stays.sendall(STAYS)
        stays.recv(1)  # once it has imported all: Ray gives up a worker that takes long to register
        yield


def _is_first(listening: socket.socket, name: str) -> bool:
    """Whether no other process of this run has the name already."""
    try:
        listening.bind("\0" + name)
    except OSError:
        return False
    listening.listen(64)
    return True


def _serve_from(listening: socket.socket) -> None:
    import subprocess

    command = [sys.executable, __file__, "--serve", str(listening.fileno())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    SERVING.append(subprocess.Popen(command, pass_fds=[listening.fileno()], env=environment))


@contextlib.contextmanager
def _asked_for() -> Iterator[None]:
    """Nodes that this process starts have this file run where their workers would be set up."""
    from unittest.mock import patch

    from ray._private.parameter import RayParams

    complete = RayParams.update_if_absent

    def update_if_absent(self: RayParams, **defaults: Any) -> None:
        if "setup_worker_path" in defaults:
            defaults["setup_worker_path"] = __file__
        complete(self, **defaults)

    with patch.object(RayParams, "update_if_absent", update_if_absent):
        yield


def warm_program(file: Path, *arguments: object) -> list[str]:
    """The command of a Python program that imports the pipeline; Ray that it starts has such workers."""
    return [sys.executable, __file__, PROGRAM, str(file), *map(str, arguments)]


def ray_command() -> None:
    """Ray's command line, whose nodes have such workers."""
    from ray.scripts.scripts import main

    with _asked_for():
        main()


# --- what Ray starts ---------------------------------------------------------------------------------------------------


def ask() -> int:
    """Have a worker or a program in this process's stead, and end as it does; where nobody answers, begin it anew."""
    told = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    with contextlib.suppress(OSError, KeyError), _connect(os.environ[VARIABLE]) as connection:
        connection.sendall(ASKS_FOR_A_WORKER)
        socket.send_fds(connection, [len(told).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(told)
        if connection.recv(1) == BEGUN:
            return int.from_bytes(connection.recv(1) or b"\1", "big")
    from ray._private.workers import setup_worker

    own = sys.argv[2:] if sys.argv[1] == PROGRAM else [setup_worker.__file__, *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, *own])


# --- the process that has imported everything ------------------------------------------------------------------------------


def prepare() -> None:
    """Import what workers of features and sweeps import, transformers' classes among it, and what Ray does of others.

    Not Ray itself, which reads at its import whose worker it is to be.
    """
    import torch

    for name in OF_RAY:
        importlib.import_module(name)
    for name in OF_WORKERS:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "it is imported as whoever is asked for"
    torch.set_num_threads(1)


class Copies:
    """Answers who asks for a worker, and says how each ended."""

    def __init__(self, listening: socket.socket) -> None:
        import selectors

        self.listening, self.selector, self.readable = listening, selectors.DefaultSelector(), selectors.EVENT_READ
        self.staying: set[socket.socket] = set()
        self.workers: dict[int, socket.socket] = {}

        # A child that ends writes a byte where the others are waited for too.
        self.ended, self.wake = socket.socketpair()
        self.ended.setblocking(False)
        self.wake.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for watched in (listening, self.ended):
            self.selector.register(watched, self.readable)

    def serve(self) -> None:
        """Until nobody stays."""
        came = False
        try:
            while self.staying or not came:
                for key, _ in self.selector.select():
                    if key.fileobj is self.listening:
                        self._welcome(self.listening.accept()[0])
                        came = came or bool(self.staying)
                    elif key.fileobj is self.ended:
                        self.ended.recv(4096)
                        self._reap()
                    elif key.fileobj.fileno() >= 0:  # it was not closed a moment ago
                        self._leave(key.fileobj)
        finally:
            for process in self.workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _welcome(self, connection: socket.socket) -> None:
        _, user, _ = _peer(connection)
        kind = connection.recv(1) if user == os.getuid() else b""
        if kind == STAYS:
            self.staying.add(connection)
            connection.sendall(BEGUN)
        elif kind == ASKS_FOR_A_WORKER:
            size, files, *_ = socket.recv_fds(connection, 4, 3)
            told = b""
            while len(told) < int.from_bytes(size, "big") and (more := connection.recv(1 << 16)):
                told += more

            process = os.fork()
            if process == 0:
                connection.close()
                self._become(files, told)

            for file in files:
                os.close(file)
            with contextlib.suppress(OSError):  # killed meanwhile, as will be seen
                connection.sendall(BEGUN)
            self.workers[process] = connection
        else:
            connection.close()
            return
        self.selector.register(connection, self.readable)

    def _become(self, files: list[int], told: bytes) -> None:
        """Go on as what was asked for, from arguments, environment and folder as ``told``, and end."""
        code = 1
        try:
            arguments, environment, folder = json.loads(told)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            self.selector.close()
            for mine in (self.listening, self.ended, self.wake, *self.staying, *self.workers.values()):
                mine.close()

            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            _work(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(code)

    def _leave(self, connection: Any) -> None:
        """Whoever stayed goes, or what asked for a worker was killed, and the worker with it."""
        self.selector.unregister(connection)
        self.staying.discard(connection)
        for process, asked in self.workers.items():
            if asked is connection:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        connection.close()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                process, status = os.waitpid(-1, os.WNOHANG)
                if process == 0:
                    return
                connection = self.workers.pop(process, None)
                if connection is None or connection.fileno() < 0:
                    continue
                self.selector.unregister(connection)
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):
                    connection.sendall(bytes([code if code >= 0 else 128 - code]))
                connection.close()


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end."""
    held = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    process, user, group = (int.from_bytes(held[at : at + 4], sys.byteorder) for at in (0, 4, 8))
    return process, user, group


def _work(arguments: list[str]) -> None:
    """A program, or what Ray's ``setup_worker.py`` does, and its ``default_worker.py``."""
    import runpy

    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    if arguments[0] == PROGRAM:
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        with _asked_for():
            runpy.run_path(sys.argv[0], run_name="__main__")
        return

    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs
    from ray._private.workers import setup_worker

    options, rest = setup_worker.parser.parse_known_args(arguments)
    context = RuntimeEnvContext.deserialize(options.serialized_runtime_env_context or "{}")
    update_envs(context.env_vars)
    prefix = list(context.command_prefix)
    if prefix:  # of a working directory
        assert prefix[0] == "cd" and prefix[2] == "&&" and len(prefix) == 3, prefix
        os.chdir(prefix[1])
        _forget_own_code()  # what was sent along is what has to work
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    sys.argv = rest
    runpy.run_path(rest[0], run_name="__main__")


def _forget_own_code() -> None:
    """Import packages of this checkout anew, from where the worker finds them; those that are installed stay."""
    sys.path[:] = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name != "__main__" and ROOT in Path(file).parents and "site-packages" not in Path(file).parts:
            del sys.modules[name]


def serve(file: int) -> None:
    sys.path[0] = str(ROOT)
    prepare()
    Copies(socket.socket(fileno=file)).serve()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    elif sys.argv[1] == "--ray":
        sys.argv[1:2] = []
        ray_command()
    else:
        sys.exit(ask())
