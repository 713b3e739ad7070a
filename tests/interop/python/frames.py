"""Frames of device state, as stream.proto has them: their checksum, how to check them, how to make them.

    giver:  state --FrameWriter--> Frame ... Frame(seal)
    taker:  Frame --FrameReader--> checked state, then a checked seal

No I/O here: both ends of StreamState use it, and so would a store of checkpoints.
"""

import struct
from collections.abc import Iterator

from blake3 import blake3
from crc32c import crc32c
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from vfio.checkpoint.v1 import stream_pb2 as stream


class FrameError(Exception):
    """The state that came is not the state that was sent. None of it may be used."""


def checksum(frame: stream.Frame) -> int:
    """The CRC32C that a frame should carry (Frame.crc32c): over what it says, whatever its encoding."""
    body = frame.WhichOneof("body")
    if body is None:
        raise FrameError(f"frame {frame.sequence} has no body")
    number = stream.Frame.DESCRIPTOR.fields_by_name[body].number
    crc = crc32c(struct.pack("<QQII", frame.stream_id, frame.sequence, frame.device, number))
    for piece in _pieces(getattr(frame, body)):
        crc = crc32c(piece, crc)
    return crc


def _pieces(message: Message) -> Iterator[bytes]:
    """The fields of a body in the order of their numbers, as the checksum reads them."""
    for field in sorted(message.DESCRIPTOR.fields, key=lambda field: field.number):
        value = getattr(message, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            present = message.HasField(field.name)
            yield struct.pack("<Q", present)
            if present:
                yield from _pieces(value)
        elif field.type == FieldDescriptor.TYPE_BYTES:
            yield struct.pack("<Q", len(value))
            yield value
        else:  # Integers and enum values; none is negative.
            yield struct.pack("<Q", value)


class _State:
    """What went by of one device's state."""

    def __init__(self) -> None:
        self.length_bytes = 0
        self.digest = blake3()
        self.sealed = False

    def add(self, data: bytes) -> None:
        self.length_bytes += len(data)
        self.digest.update(data)


class FrameReader:
    """Checks the frames of one stream, in the order in which they come. After an error the stream is useless."""

    def __init__(self, opened: stream.StreamOpened) -> None:
        self._stream_id = opened.stream_id
        self._limits = opened.limits
        self._states = [_State() for _ in opened.manifest.devices]
        self.next_sequence = 0

    @property
    def all_sealed(self) -> bool:
        return all(state.sealed for state in self._states)

    def check(self, frame: stream.Frame) -> None:
        """Returns where the frame is the next one and whole. A seal is then proven, too."""
        if frame.crc32c != checksum(frame):
            raise FrameError(f"frame {frame.sequence} is damaged: its CRC32C does not match")
        if frame.stream_id != self._stream_id:
            raise FrameError(f"frame {frame.sequence} is of another stream")
        if frame.sequence != self.next_sequence:
            raise FrameError(f"frame {frame.sequence} came where {self.next_sequence} is the next")
        self.next_sequence += 1
        if frame.HasField("progress"):
            return
        if frame.device >= len(self._states) or self._states[frame.device].sealed:
            raise FrameError(f"frame {frame.sequence} is about device {frame.device}, of which nothing can come")
        state = self._states[frame.device]
        if frame.HasField("chunk"):
            self._check_chunk(frame.chunk, state)
        else:
            self._check_seal(frame.seal, state)

    def _check_chunk(self, chunk: stream.Chunk, state: _State) -> None:
        if chunk.offset != state.length_bytes:
            raise FrameError(f"a chunk begins at {chunk.offset} where the state has {state.length_bytes} bytes")
        if not 0 < len(chunk.data) <= self._limits.max_chunk_bytes:
            raise FrameError(f"a chunk has {len(chunk.data)} bytes; up to {self._limits.max_chunk_bytes} are allowed")
        if state.length_bytes + len(chunk.data) > self._limits.max_device_bytes:
            raise FrameError(f"there is more state than {self._limits.max_device_bytes} bytes")
        state.add(chunk.data)

    def _check_seal(self, seal: stream.StreamSeal, state: _State) -> None:
        if seal.length_bytes != state.length_bytes:
            raise FrameError(f"the seal is on {seal.length_bytes} bytes, and {state.length_bytes} came")
        if seal.blake3 != state.digest.digest():
            raise FrameError("the seal is on other state than came: BLAKE3 does not match")
        state.sealed = True


class FrameWriter:
    """Makes the frames of one stream."""

    def __init__(self, opened: stream.StreamOpened) -> None:
        self._stream_id = opened.stream_id
        self._states = [_State() for _ in opened.manifest.devices]
        self._sequence = 0

    def chunk(self, device: int, data: bytes) -> stream.Frame:
        """The next state of a device: not empty, at most StreamLimits.max_chunk_bytes."""
        state = self._states[device]
        chunk = stream.Chunk(offset=state.length_bytes, data=data)
        state.add(data)
        return self._frame(stream.Frame(device=device, chunk=chunk))

    def seal(self, device: int, saved: stream.StreamSeal) -> stream.Frame:
        """The end of a device's state, which must be the state that was saved under this seal."""
        state = self._states[device]
        if (saved.length_bytes, saved.blake3) != (state.length_bytes, state.digest.digest()):
            raise FrameError(f"the state of device {device} is no longer what was saved: it does not match its seal")
        return self._frame(stream.Frame(device=device, seal=saved))

    def _frame(self, frame: stream.Frame) -> stream.Frame:
        frame.stream_id = self._stream_id
        frame.sequence = self._sequence
        frame.crc32c = checksum(frame)
        self._sequence += 1
        return frame
