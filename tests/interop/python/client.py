"""Saves the state of one device and restores it into another: a whole client, out of the .proto files alone.

    ListDevices
    StartSave (dry run: blockers) -> StartSave -> StreamState as the taker -> files -> WatchOperation until done
    Restore (dry run: blockers) -> Restore -> StreamState as the giver <- files -> WaitOperation

Prints one JSON document about what was done. Exit status 1, with a sentence on stderr, where something went wrong.
"""

import argparse
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from vfio.checkpoint.v1 import checkpoint_pb2 as checkpoint
from vfio.checkpoint.v1 import checkpoint_service_pb2 as checkpoints
from vfio.checkpoint.v1 import device_pb2 as device
from vfio.checkpoint.v1 import device_service_pb2 as devices
from vfio.checkpoint.v1 import operation_pb2 as operation
from vfio.checkpoint.v1 import operation_service_pb2 as operations
from vfio.checkpoint.v1 import stream_pb2 as stream
from vfio.checkpoint.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from vfio.checkpoint.v1.device_service_pb2_grpc import DeviceServiceStub
from vfio.checkpoint.v1.operation_service_pb2_grpc import OperationServiceStub

from errors import decode
from frames import FrameError, FrameReader, FrameWriter

CALL_TIMEOUT_SECONDS = 10
# Waiting for an operation. A stream has no deadline here: the agent's limits end it (StreamLimits).
OPERATION_TIMEOUT_SECONDS = 60
# The versions of the stream's protocol that frames.py speaks.
STREAM_VERSION = 1


class Failed(Exception):
    """What was asked for was not done, and why."""


class Agent:
    """A connection to an agent: mutual TLS, and the stubs of its services."""

    def __init__(self, address: str, tls: Path) -> None:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=(tls / "ca.crt").read_bytes(),
            private_key=(tls / "tls.key").read_bytes(),
            certificate_chain=(tls / "tls.crt").read_bytes(),
        )
        # A chunk is up to 2 MiB by contract, and gRPC takes 4 MiB by default: nothing needs to be raised.
        self.channel = grpc.secure_channel(address, credentials)
        self.devices = DeviceServiceStub(self.channel)
        self.checkpoints = CheckpointServiceStub(self.channel)
        self.operations = OperationServiceStub(self.channel)

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


class Link:
    """One StreamState call: messages both ways."""

    def __init__(self, agent: Agent, name: str, role: "stream.StreamRole") -> None:
        # Bounded: gRPC takes the next message when there is room on the wire, and so a slow agent slows the giver.
        self._outgoing: Queue[stream.StreamStateRequest | None] = Queue(maxsize=2)
        self._call = agent.checkpoints.StreamState(iter(self._outgoing.get, None))
        self.send(
            open=stream.StreamOpen(operation=name, role=role, min_version=STREAM_VERSION, max_version=STREAM_VERSION)
        )
        first = next(self.messages(), None)
        if first is None or not first.HasField("opened"):
            raise Failed(f"the agent did not open the stream of {name}")
        self.opened = first.opened

    def send(self, **kind: Any) -> None:
        """Sends one message: `open`, `frame`, `ack`, `cutover` or `abort`."""
        request = stream.StreamStateRequest(message=stream.StreamMessage(**kind))
        while self._call.is_active():
            try:
                return self._outgoing.put(request, timeout=1)
            except Full:
                continue
        # What the agent said last tells why the call is over.
        for _ in self.messages():
            pass
        raise Failed("the agent ended the stream")

    def messages(self) -> Iterator[stream.StreamMessage]:
        """What the agent sends, to the end of the stream."""
        for response in self._call:
            if response.message.HasField("abort"):
                raise Failed(f"the agent gave the stream up: {response.message.abort.reason}")
            yield response.message

    def end(self) -> None:
        """Sends nothing more. The agent may."""
        while self._call.is_active():
            try:
                return self._outgoing.put(None, timeout=1)
            except Full:
                continue

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            # The agent undoes a save and resets a restore.
            self._call.cancel()
        self.end()


@dataclass
class Checkpoint:
    """A saved state: a file and a seal for each device, in the order of the manifest."""

    manifest: checkpoint.CheckpointManifest
    files: list[Path]
    seals: list[stream.StreamSeal]


def blocked(blockers: list[device.Blocker]) -> None:
    """Fails with all that is in the way, where something is."""
    if blockers:
        sentences = [f"{blocker.device or 'the set'}: {blocker.message}" for blocker in blockers]
        raise Failed("nothing was touched: " + "; ".join(sentences))


def succeeded(done: operation.Operation) -> operation.Operation:
    """Fails unless the operation did all of what was asked for."""
    if done.result != operation.OPERATION_RESULT_SUCCEEDED:
        result = operation.OperationResult.Name(done.result)
        raise Failed(f"{done.name} ended {result}: {done.failure.reason}: {done.failure.message}")
    return done


def take_state(link: Link, folder: Path) -> Checkpoint:
    """Writes the state of a save into files, one for each device, and tells the agent when all of it is durable."""
    opened = link.opened
    reader = FrameReader(opened)
    taken = [folder / f"{index}.state" for index in range(len(opened.manifest.devices))]
    seals = [stream.StreamSeal() for _ in taken]
    unacked_bytes = 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in taken]
        # To the end of the stream, which the agent ends once it has heard `complete`.
        for message in link.messages():
            frame = message.frame
            reader.check(frame)
            if frame.HasField("chunk"):
                files[frame.device].write(frame.chunk.data)
                unacked_bytes += len(frame.chunk.data)
            elif frame.HasField("seal"):
                files[frame.device].flush()
                # After `complete` the agent holds nothing for us any more.
                os.fsync(files[frame.device].fileno())
                seals[frame.device] = frame.seal
            if unacked_bytes >= opened.limits.ack_interval_bytes:
                link.send(ack=stream.StreamAck(next_sequence=reader.next_sequence))
                unacked_bytes = 0
            if reader.all_sealed:
                link.send(ack=stream.StreamAck(next_sequence=reader.next_sequence, complete=True))
    if not reader.all_sealed:
        raise Failed("the stream ended before all state was sealed")
    return Checkpoint(opened.manifest, taken, seals)


def save(agent: Agent, name: str, folder: Path) -> tuple[Checkpoint, operation.Operation, list[str]]:
    """Saves one device. Returns the checkpoint, the operation at its end, and the phases that were seen."""
    request = checkpoints.StartSaveRequest(
        devices=[name],
        # Device state alone. Whoever captures memory as well says how, so that what cannot work is refused.
        memory_capture=checkpoints.MEMORY_CAPTURE_NONE,
        validate_only=True,
    )
    blocked(list(agent.checkpoints.StartSave(request, timeout=CALL_TIMEOUT_SECONDS).blockers))
    request.validate_only = False
    # Made up once, and kept over retries: a call whose answer was lost then starts nothing twice.
    request.request_id = str(uuid.uuid4())
    started = agent.checkpoints.StartSave(request, timeout=CALL_TIMEOUT_SECONDS).operation
    watch = agent.operations.WatchOperation(
        operations.WatchOperationRequest(name=started.name), timeout=OPERATION_TIMEOUT_SECONDS
    )
    seen = [next(watch).operation]
    with Link(agent, started.name, stream.STREAM_ROLE_TAKER) as link:
        state = take_state(link, folder)
    seen += [update.operation for update in watch]
    phases = [operation.OperationPhase.Name(update.phase) for update in seen]
    return state, succeeded(seen[-1]), phases


def give_state(link: Link, state: Checkpoint) -> Iterator[stream.Frame]:
    """The frames of a checkpoint, read from its files as they are sent."""
    writer = FrameWriter(link.opened)
    for index, path in enumerate(state.files):
        with path.open("rb") as file:
            while data := file.read(link.opened.limits.max_chunk_bytes):
                yield writer.chunk(index, data)
        yield writer.seal(index, state.seals[index])


def start_restore(agent: Agent, name: str, state: Checkpoint) -> str:
    """Admits a restore into one device, and returns the name of its operation."""
    request = checkpoints.RestoreRequest(devices=[name], manifest=state.manifest, allow_fork=True, validate_only=True)
    blocked(list(agent.checkpoints.Restore(request, timeout=CALL_TIMEOUT_SECONDS).blockers))
    request.validate_only = False
    request.request_id = str(uuid.uuid4())
    return agent.checkpoints.Restore(request, timeout=CALL_TIMEOUT_SECONDS).operation.name


def give(link: Link, frames: Iterable[stream.Frame]) -> None:
    """Sends frames, and returns once the agent has all state of all devices, verified."""
    for frame in frames:
        link.send(frame=frame)
    # To the end of the stream, which the agent ends after it has said `complete`.
    complete = [message.HasField("ack") and message.ack.complete for message in link.messages()]
    if not any(complete):
        raise Failed("the stream ended before the agent had taken all state")


def wait(agent: Agent, name: str) -> operation.Operation:
    """The operation at its end, however it ended."""
    request = operations.WaitOperationRequest(name=name, timeout=Duration(seconds=OPERATION_TIMEOUT_SECONDS))
    waited = agent.operations.WaitOperation(request, timeout=OPERATION_TIMEOUT_SECONDS + CALL_TIMEOUT_SECONDS)
    if not waited.operation.done:
        raise Failed(f"{name} is not done after {OPERATION_TIMEOUT_SECONDS} seconds")
    return waited.operation


def restore(agent: Agent, name: str, state: Checkpoint) -> operation.Operation:
    """Restores a checkpoint of one device, and returns the operation at its end."""
    started = start_restore(agent, name, state)
    with Link(agent, started, stream.STREAM_ROLE_GIVER) as link:
        give(link, give_state(link, state))
    return succeeded(wait(agent, started))


def as_json(done: operation.Operation) -> dict[str, Any]:
    """What is told of an operation."""
    return {
        "operation": done.name,
        "result": operation.OperationResult.Name(done.result),
        "outcome": operation.StateOutcome.Name(done.outcome),
        "failure": {"reason": done.failure.reason, "message": done.failure.message},
        "blake3": [part.seal.blake3.hex() for part in done.devices],
        "length_bytes": [part.seal.length_bytes for part in done.devices],
    }


def run(agent: Agent, source: str, destination: str, folder: Path) -> dict[str, Any]:
    """All of it."""
    listed = agent.devices.ListDevices(devices.ListDevicesRequest(), timeout=CALL_TIMEOUT_SECONDS).devices
    state, saved, phases = save(agent, source, folder)
    restored = restore(agent, destination, state)
    return {
        "devices": [
            {"name": item.name, "state": device.MigrationState.Name(item.state), "driver": item.driver}
            for item in listed
        ],
        "taken": {
            "blake3": [seal.blake3.hex() for seal in state.seals],
            "length_bytes": [seal.length_bytes for seal in state.seals],
        },
        "phases": phases,
        "save": as_json(saved),
        "restore": as_json(restored),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Saves the state of one device and restores it into another.")
    parser.add_argument("--agent", required=True, help="the agent's address, HOST:PORT")
    parser.add_argument("--tls", required=True, type=Path, help="a folder with tls.crt, tls.key and ca.crt")
    parser.add_argument("--source", required=True, help="the device to save, devices/NAME")
    parser.add_argument("--destination", required=True, help="the device to restore into, devices/NAME")
    parser.add_argument("--folder", required=True, type=Path, help="where the state is kept")
    arguments = parser.parse_args()
    try:
        with Agent(arguments.agent, arguments.tls) as agent:
            document = run(agent, arguments.source, arguments.destination, arguments.folder)
    except grpc.RpcError as error:
        print(f"client.py: {decode(error)}", file=sys.stderr)
        return 1
    except (Failed, FrameError, OSError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
