"""Several processes as one training: who belongs to it, whether all mean the same, and whether all are still there."""

import atexit
import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import queue
import socket
import sys
import threading
import time
from typing import Any

from common.cli import UserError, endings
from common.cluster_description import host_and_port

import numpy as np
import tensorflow as tf

EXIT_WORKER_LOST = 76
# Every worker says each second that it is there. One that is silent for so long is lost, stopped or unplugged.
_SILENCE = 10
# The cluster that this process has joined, if any.
joined: list["Cluster"] = []


class _Peer:
    """The connection to another worker. Each message is a line of JSON."""

    def __init__(self, connection: socket.socket, index: int = 0):
        self.connection, self.index = connection, index
        # Not a plain lock: a signal may come while the main thread is sending, and its handler says farewell.
        self.lines, self.sending = connection.makefile("rb"), threading.RLock()
        self.values, self.noted, self.ended = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()

    def send(self, **message: Any) -> None:
        """Sends a message; nobody is told when that fails, for then the reading fails too."""
        with contextlib.suppress(OSError), self.sending:
            self.connection.sendall(json.dumps(message, default=_encoded).encode() + b"\n")

    def receive(self, limit: int = -1) -> dict[str, Any]:
        """The next message, of up to `limit` bytes; an OSError if there is none for too long, or will be none."""
        try:
            message = json.loads(self.lines.readline(limit), object_hook=_decoded)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ConnectionError("closed, or no worker of a training") from error
        if not isinstance(message, dict):
            raise ConnectionError("no worker of a training")
        return message


def _encoded(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return str(value)
    return {"array": base64.b64encode(value.tobytes()).decode(), "dtype": str(value.dtype), "shape": value.shape}


def _decoded(content: dict[str, Any]) -> Any:
    if "array" not in content:
        return content
    return np.frombuffer(base64.b64decode(content["array"]), content["dtype"]).reshape(content["shape"])


class Cluster:
    """The workers of a training, of which this process is one; the first, the chief, decides and writes for all.

    Beside the collective operations of TensorFlow, each worker keeps a connection to the chief. Over it, all
    compare their settings before TensorFlow opens a port; they notice within seconds when one is gone, where TensorFlow
    may wait for minutes; and they come to the same end. Without workers, it is a process that trains alone.
    """

    def __init__(self, workers: tuple[str, ...] = ("this process",), index: int = 0):
        self.workers, self.index, self.chief = workers, index, index == 0
        self.stop_asked, self.save_at = False, 0
        self._peers: dict[int, _Peer] = {}
        self._complete, self._code = threading.Event(), None

    def name(self, index: int) -> str:
        """How a worker is called in messages."""
        return f"worker {index} at {self.workers[index]}"

    def join(self, timeout: float) -> None:
        """Waits until all workers are there.

        Args:
            timeout: seconds to wait.

        Raises:
            UserError: a worker did not come, knows of another cluster, or can't have its port.
        """
        endings.append(self.leave)
        atexit.register(self.leave)
        sys.excepthook = self._crashed
        threading.Thread(target=self._stay_alive, daemon=True).start()
        deadline, own, problem = time.monotonic() + timeout, None, ""
        try:
            own = self._own_port(deadline)
        except UserError as error:
            if self.chief:
                raise
            problem = str(error)
        with own or contextlib.nullcontext():
            if self.chief:
                self._gather_workers(own, deadline, timeout)
            else:
                self._reach_chief(problem, deadline, timeout)

    def _own_port(self, deadline: float) -> socket.socket:
        """This worker's port, so long as TensorFlow does not have it."""
        while True:
            try:
                # With SO_REUSEADDR: TensorFlow can take the port while the connections that came through it go on.
                return socket.create_server(host_and_port(self.workers[self.index]))
            except OSError as error:
                # The names of pods may be known some seconds later than the pods run.
                if not isinstance(error, socket.gaierror) or time.monotonic() > deadline:
                    remedy = "its port must be free, and its host this machine"
                    raise UserError(f"{self.name(self.index)}: {error.strerror}; {remedy}") from error
                time.sleep(0.2)

    def _gather_workers(self, own: socket.socket, deadline: float, timeout: float) -> None:
        own.settimeout(0.2)
        greeted: queue.SimpleQueue = queue.SimpleQueue()

        def greet(connection: socket.socket) -> None:
            # In a thread: whoever connects and says nothing, or nothing sensible, keeps nobody waiting.
            with contextlib.suppress(OSError):
                connection.settimeout(_SILENCE)
                peer = _Peer(connection)
                peer.send(welcome=True)
                hello = peer.receive(100_000)
                known = set(hello) == {"index", "workers", "problem"} and hello["index"] in range(1, len(self.workers))
                if known and isinstance(hello["problem"], str):
                    peer.index = hello["index"]
                    greeted.put((peer, hello))
                    return
            connection.close()

        while len(self._peers) < len(self.workers) - 1:
            if time.monotonic() > deadline:
                absent = [self.name(index) for index in range(1, len(self.workers)) if index not in self._peers]
                raise UserError(f"{', '.join(absent)}: did not come within {timeout:.0f} s; start all workers")
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=greet, args=(own.accept()[0],), daemon=True).start()
            with contextlib.suppress(queue.Empty):
                peer, hello = greeted.get_nowait()
                problem = hello["problem"]
                if hello["workers"] != list(self.workers):
                    problem = (
                        f"worker {peer.index} at {peer.connection.getpeername()[0]}: says that the cluster is "
                        f"{hello['workers']}, but worker 0 {list(self.workers)}; give all the same"
                    )
                elif not problem and peer.index in self._peers:
                    problem = f"{self.name(peer.index)}: was started twice; give each worker its own index"
                if problem:
                    peer.send(end=2, line=f"error: {problem}")
                    raise UserError(problem)
                self._peers[peer.index] = peer
                self._listen(peer)
        self._complete.set()
        if len(self._peers) < len(self.workers) - 1:
            raise UserError("a worker ended while others were still expected; start all again")
        self.from_chief(True)

    def _reach_chief(self, problem: str, deadline: float, timeout: float) -> None:
        while True:
            connection = None
            try:
                connection = socket.create_connection(host_and_port(self.workers[0]), timeout=2)
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                peer = _Peer(connection)
                if peer.receive(100) == {"welcome": True}:
                    break
            except OSError:
                pass
            if connection:
                connection.close()
            if time.monotonic() > deadline:
                raise UserError(problem or f"{self.name(0)}: did not come within {timeout:.0f} s; start all workers")
            time.sleep(0.2)
        self._peers[0] = peer
        peer.send(index=self.index, workers=self.workers, problem=problem)
        self._complete.set()
        self._listen(peer)
        self.from_chief()

    def _listen(self, peer: _Peer) -> None:
        peer.connection.settimeout(_SILENCE)
        threading.Thread(target=self._hear, args=(peer,), daemon=True).start()

    def _hear(self, peer: _Peer) -> None:
        """Takes what a peer sends, until it ends or is lost."""
        while not peer.ended.is_set():
            try:
                message = peer.receive()
            except OSError:
                if self._complete.is_set():
                    line = f"error: {self.name(peer.index)} is lost; the same commands with --resume go on"
                    self._end(EXIT_WORKER_LOST, line)
                self._peers.pop(peer.index, None)  # It may come again, until the training begins.
                return
            if "value" in message:
                peer.values.put(message["value"])
            elif "save_at" in message:
                self.save_at = message["save_at"]
                peer.send(noted=True)
            elif "noted" in message:
                peer.noted.put(True)
            elif "stop" in message:
                self.stop_asked = True
            elif message.get("end") == 0:
                peer.ended.set()
            elif "end" in message:
                self._end(message["end"], message["line"])

    def _end(self, code: int, line: str) -> None:
        """Ends this process from a thread, as the main thread may be waiting for the lost worker."""
        if self._code:
            return  # The main thread is ending it already.
        self.leave(code, line)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os.write(2, (" ".join(line.split()) + "\n").encode())
        os._exit(code)

    def _stay_alive(self) -> None:
        while True:
            time.sleep(1)
            for peer in list(self._peers.values()):
                peer.send(alive=True)

    def leave(self, code: int = 0, line: str = "") -> None:
        """Tells the others how this worker ends, that they end likewise; a good end waits for theirs."""
        if self._code is None or (code and not self._code):
            self._code = code
            for peer in list(self._peers.values()):
                peer.send(end=code, line=line)
            if code == 0:
                for peer in list(self._peers.values()):
                    peer.ended.wait()

    def _crashed(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, tf.errors.OpError):
            time.sleep(_SILENCE + 3)  # Most likely a worker was lost: the connection is going to say which.
        sys.__excepthook__(kind, error, trace)
        os._exit(1)

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, in their order; on the chief only, elsewhere an empty list.

        A value is made of arrays and what JSON can hold. All workers must come here.
        """
        if not self.chief:
            self._peers[0].send(value=value)
            return []
        return [value, *(self._peers[index].values.get() for index in range(1, len(self.workers)))]

    def from_chief(self, value: Any = None) -> Any:
        """The chief's value, on all workers, which must all come here."""
        if not self.chief:
            return self._peers[0].values.get()
        for peer in self._peers.values():
            peer.send(value=value)
        return value

    def compare(self, values: dict[str, Any]) -> None:
        """Ends all workers if one has other values than the chief. All must come here."""
        chiefs, *others = self.gather(values) or [values]
        for index, theirs in enumerate(others, start=1):
            for key in chiefs:
                if theirs.get(key) != chiefs[key]:
                    raise UserError(
                        f"{self.name(index)}: {key} is {theirs.get(key)!r}, but {chiefs[key]!r} on worker 0; "
                        "start all with the same command, code and data"
                    )

    def agree_to_save(self, step: int) -> None:
        """Lets the chief, at the end of `step`, set `save_at`, to the first step that no worker can have ended yet.

        No worker can end a step before all have begun it: so none ends the next one before the chief returns.
        """
        self.save_at = step + (len(self.workers) > 1)
        for peer in self._peers.values():
            peer.send(save_at=self.save_at)
        for peer in self._peers.values():
            peer.noted.get()

    def ask_to_stop(self) -> None:
        """Asks the chief to save and end the training."""
        if not self.stop_asked:
            self.stop_asked = True
            self._peers[0].send(stop=True)


@functools.cache
def joined_cluster(workers: tuple[str, ...], index: int, timeout: float) -> Cluster:
    """The cluster of this process, with all workers there and of the same code; joined once in a process.

    Raises:
        UserError: as `Cluster.join` and `Cluster.compare`.
    """
    cluster = Cluster(workers, index)
    cluster.join(timeout)
    versions = {name: importlib.metadata.version(name) for name in ("tensorflow", "keras")}
    cluster.compare({**versions, "code": _code_sha256()})
    joined.append(cluster)
    return cluster


def _code_sha256() -> str:
    """Digest of the program: of its own modules, wherever they lie."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] in ("__main__", "common")]
    sha256 = hashlib.sha256()
    for file in (getattr(module, "__file__", None) for module in modules):
        if file:
            sha256.update(pathlib.Path(file).read_bytes())
    return sha256.hexdigest()
