"""What an agent refuses, and how a client reads it: calls without a role, blocked calls, and state that is damaged.

Prints one JSON document with what came back in each case, for whoever checks it. Exit status 1, with a sentence on
stderr, where something was not refused.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from blake3 import blake3
from google.protobuf.message import Message
from vfio.checkpoint.v1 import checkpoint_service_pb2 as checkpoints
from vfio.checkpoint.v1 import device_pb2 as device
from vfio.checkpoint.v1 import operation_service_pb2 as operations
from vfio.checkpoint.v1 import stream_pb2 as stream

import client
from client import CALL_TIMEOUT_SECONDS, Agent, Checkpoint, Failed, Link
from errors import decode
from frames import FrameError, checksum

Frames = Iterator[stream.Frame]


def refusal(call: Callable[..., Message], request: Message) -> dict[str, Any]:
    """How a call is refused."""
    try:
        call(request, timeout=CALL_TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        return vars(decode(error))
    raise Failed(f"{request.DESCRIPTOR.name} was not refused")


def calls(agent: Agent, viewer: Agent, name: str) -> dict[str, Any]:
    """Calls that are refused before anything is touched."""
    start = agent.checkpoints.StartSave
    good = checkpoints.StartSaveRequest(devices=[name], memory_capture=checkpoints.MEMORY_CAPTURE_NONE)
    # Three things in the way at once.
    hopeless = checkpoints.StartSaveRequest(
        devices=[name, "devices/no-such-device"],
        memory_capture=checkpoints.MEMORY_CAPTURE_BACKGROUND_SNAPSHOT,
        viommu=True,
    )
    told: dict[str, Any] = {
        "no_role": refusal(viewer.checkpoints.StartSave, good),
        "no_memory_capture": refusal(start, checkpoints.StartSaveRequest(devices=[name])),
        "hopeless": refusal(start, hopeless),
        "no_operation": refusal(
            agent.operations.GetOperation, operations.GetOperationRequest(name="operations/no-such-operation")
        ),
    }
    hopeless.validate_only = True
    told["hopeless_dry_run"] = [
        [device.BlockerReason.Name(blocker.reason), blocker.device]
        for blocker in start(hopeless, timeout=CALL_TIMEOUT_SECONDS).blockers
    ]

    good.request_id = str(uuid.uuid4())
    first = start(good, timeout=CALL_TIMEOUT_SECONDS).operation.name
    told["same_request"] = start(good, timeout=CALL_TIMEOUT_SECONDS).operation.name == first
    other = checkpoints.StartSaveRequest()
    other.CopyFrom(good)
    other.max_bytes = 1 << 40
    told["other_request_same_id"] = refusal(start, other)
    good.request_id = str(uuid.uuid4())
    told["leased"] = refusal(start, good)
    agent.operations.CancelOperation(operations.CancelOperationRequest(name=first), timeout=CALL_TIMEOUT_SECONDS)
    told["cancelled"] = client.as_json(client.wait(agent, first))
    return told


def flipped_bit(frames: Frames) -> Frames:
    """State that was damaged on its way."""
    for frame in frames:
        if frame.HasField("chunk") and frame.sequence == 1:
            data = bytearray(frame.chunk.data)
            data[len(data) // 2] ^= 1
            frame.chunk.data = bytes(data)
        yield frame


def lost_frame(frames: Frames) -> Frames:
    """A frame is missing."""
    return (frame for frame in frames if frame.sequence != 1)


def other_seal(frames: Frames) -> Frames:
    """The seal is on other state, in a frame that is whole."""
    for frame in frames:
        if frame.HasField("seal"):
            frame.seal.blake3 = blake3(b"other state").digest()
            frame.crc32c = checksum(frame)
        yield frame


def no_seal(frames: Frames) -> Frames:
    """The giver stops before the end."""
    return (frame for frame in frames if not frame.HasField("seal"))


def damaged_restore(agent: Agent, name: str, state: Checkpoint, damage: Callable[[Frames], Frames]) -> dict[str, Any]:
    """How a restore of damaged state ends."""
    started = client.start_restore(agent, name, state)
    try:
        with Link(agent, started, stream.STREAM_ROLE_GIVER) as link:
            for frame in damage(client.give_state(link, state)):
                link.send(frame=frame)
            link.end()
            complete = [message.ack.complete for message in link.messages()]
        said = "complete" if any(complete) else "nothing"
    except Failed as error:
        said = str(error)
    return {"said": said} | client.as_json(client.wait(agent, started))


def main() -> int:
    parser = argparse.ArgumentParser(description="Shows what an agent refuses.")
    parser.add_argument("--agent", required=True, help="the agent's address, HOST:PORT")
    parser.add_argument("--tls", required=True, type=Path, help="the TLS files of a saver and restorer")
    parser.add_argument("--viewer-tls", required=True, type=Path, help="the TLS files of a viewer")
    parser.add_argument("--source", required=True, help="the device to save, devices/NAME")
    parser.add_argument("--destination", required=True, help="the device to restore into; loses its state")
    parser.add_argument("--folder", required=True, type=Path, help="where the state is kept")
    arguments = parser.parse_args()
    into = arguments.destination
    try:
        with Agent(arguments.agent, arguments.tls) as agent, Agent(arguments.agent, arguments.viewer_tls) as viewer:
            document = calls(agent, viewer, arguments.source)
            state, _, _ = client.save(agent, arguments.source, arguments.folder)
            for damage in (flipped_bit, lost_frame, other_seal, no_seal):
                document[damage.__name__] = damaged_restore(agent, into, state, damage)
            document["whole"] = client.as_json(client.restore(agent, into, state))
    except grpc.RpcError as error:
        print(f"refused.py: {decode(error)}", file=sys.stderr)
        return 1
    except (Failed, FrameError, OSError) as error:
        print(f"refused.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
