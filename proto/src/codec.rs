//! The codec of all generated clients and servers: prost's, behind a bound on what a message may decode to.
//!
//! ```text
//!   frame of gRPC (bounded by max_decoding_message_size) --> length --> check_parts --> prost
//! ```
//!
//! Invariant: nothing is decoded before its length was compared and its parts were counted. Failure: `OUT_OF_RANGE` for a
//! request that is too long and `INVALID_ARGUMENT` for one that cannot be read, for the call whose message it was. What
//! is wrong with a response is not the caller's fault: prost's own `INTERNAL`.
//!
//! A status from here has no `google.rpc` details: it is made before anything that knows reasons. The agent adds them on
//! the way out.

use std::marker::PhantomData;

use bytes::Buf as _;
use prost::{Message, Name};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::parts::{MAX_REQUEST_PARTS, MAX_RESPONSE_PARTS, check_parts};
use crate::{MAX_REQUEST_BYTES, v1};

/// Encodes `T` and decodes `U`.
#[derive(Debug, Clone)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = SizedEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        SizedEncoder(ProstCodec::<T, U>::raw_encoder(BufferSettings::default()))
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstCodec::<T, U>::raw_decoder(BufferSettings::default()))
    }
}

/// Encodes into a buffer that is made large enough first: one that grows copies a chunk several times over.
#[derive(Debug, Clone)]
pub struct SizedEncoder<T>(ProstEncoder<T>);

impl<T: Message> Encoder for SizedEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.reserve(item.encoded_len());
        self.0.encode(item, buf)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// Counts, then decodes.
#[derive(Debug, Clone)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Name + Default> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let is_request = U::NAME.ends_with("Request");
        // A service has one limit for all of its methods, and that of a stream is much longer.
        let found_bytes = buf.remaining();
        if is_request && U::NAME != v1::StreamStateRequest::NAME && found_bytes > MAX_REQUEST_BYTES {
            return Err(Status::out_of_range(format!(
                "{} has {found_bytes} bytes, and at most {MAX_REQUEST_BYTES} are taken; ask for less at a time",
                U::NAME
            )));
        }
        let max = if is_request { MAX_REQUEST_PARTS } else { MAX_RESPONSE_PARTS };
        // tonic hands a message over in one piece. Should it ever not, the count finds it cut off and refuses it.
        check_parts(&U::full_name(), buf.chunk(), max)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        // Whose mistake it is: prost's own answer, INTERNAL, would be the agent's.
        self.0
            .decode(buf)
            .map_err(|status| if is_request { Status::invalid_argument(status.message()) } else { status })
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}
