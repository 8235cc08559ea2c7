//! WebSocket frames as a client sees them: parses the server's, masks its own.
//!
//! Pure. Invariants: a reader keeps at most one unfinished frame and nothing of a finished one, so
//! that ten thousand readers cost ten thousand empty vectors. Messages in several frames are
//! refused by name: no server of this protocol sends them.

/// Largest payload of a frame, in bytes; servers of this protocol stop at 5 MB.
const PAYLOAD_BYTES_MAX: u64 = 16 << 20;

/// One whole frame of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    Text(&'a [u8]),
    Binary(&'a [u8]),
    Ping(&'a [u8]),
    Pong,
    Close(Option<u16>),
}

/// A frame that a server must not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("the server masked a frame")]
    Masked,
    #[error("a message in several frames")]
    Fragmented,
    #[error("reserved bits or an unknown opcode")]
    Reserved,
    #[error("a frame of more than 16 MiB")]
    TooLong,
}

/// Cuts a byte stream into frames, however the bytes arrive.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    unfinished: Vec<u8>,
}

impl FrameReader {
    /// Creates a reader that has already received `rest`, as after a handshake's head.
    pub(crate) const fn resumed(rest: Vec<u8>) -> Self {
        Self { unfinished: rest }
    }

    /// Passes every frame that `input` completes to `each`, in order.
    ///
    /// # Errors
    /// The first error of a frame or of `each`, after which the stream cannot be read any further.
    pub(crate) fn read<E: From<FrameError>>(
        &mut self,
        input: &[u8],
        mut each: impl FnMut(Frame<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.unfinished.is_empty() {
            let rest = read_all(input, &mut each)?;
            self.unfinished.extend_from_slice(rest);
            return Ok(());
        }
        self.unfinished.extend_from_slice(input);
        let left = read_all(&self.unfinished, &mut each)?.len();
        if left == 0 {
            // Frees the buffer: a socket that once got half a frame is idle for seconds.
            self.unfinished = Vec::new();
        } else {
            self.unfinished.drain(..self.unfinished.len() - left);
        }
        Ok(())
    }
}

impl Frame<'_> {
    /// Returns the frame's bytes as a server writes them, header and payload.
    pub(crate) fn to_server_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (opcode, payload) = self.parts();
        push_header(&mut bytes, opcode, 0, payload.len());
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Appends the frame to `out` as a client writes it: masked with a random key.
    pub(crate) fn push_masked(self, out: &mut Vec<u8>) {
        let (opcode, payload) = self.parts();
        push_header(out, opcode, MASKED, payload.len());
        let key = fastrand::u32(..).to_ne_bytes();
        out.extend_from_slice(&key);
        out.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
    }

    /// Returns opcode and payload. A close frame is written without a code: only its opcode matters
    /// here.
    const fn parts(&self) -> (u8, &[u8]) {
        match self {
            Frame::Text(payload) => (OPCODE_TEXT, payload),
            Frame::Binary(payload) => (OPCODE_BINARY, payload),
            Frame::Ping(payload) => (OPCODE_PING, payload),
            Frame::Pong => (OPCODE_PONG, &[]),
            Frame::Close(_) => (OPCODE_CLOSE, &[]),
        }
    }
}

/// Appends the pong that answers a ping, masked. A ping's payload is at most 125 bytes.
pub(crate) fn push_pong(ping: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    Frame::Ping(ping).push_masked(out);
    if let Some(first) = out.get_mut(start) {
        *first = FINAL | OPCODE_PONG;
    }
}

const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;
const OPCODE_CONTINUATION: u8 = 0;
const OPCODE_TEXT: u8 = 1;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;
const OPCODE_PING: u8 = 9;
const OPCODE_PONG: u8 = 10;

/// Passes every whole frame of `input` to `each` and returns the bytes after the last.
fn read_all<'a, E: From<FrameError>>(
    mut input: &'a [u8],
    each: &mut impl FnMut(Frame<'_>) -> Result<(), E>,
) -> Result<&'a [u8], E> {
    while let Some((frame, rest)) = split_frame(input)? {
        each(frame)?;
        input = rest;
    }
    Ok(input)
}

/// Returns the first frame of `input` and the bytes after it; `None` while it is incomplete.
fn split_frame(input: &[u8]) -> Result<Option<(Frame<'_>, &[u8])>, FrameError> {
    let [first, second, rest @ ..] = input else { return Ok(None) };
    if second & MASKED != 0 {
        return Err(FrameError::Masked);
    }
    let (length, rest) = match second {
        126 => match rest.split_first_chunk() {
            Some((length, rest)) => (u64::from(u16::from_be_bytes(*length)), rest),
            None => return Ok(None),
        },
        127 => match rest.split_first_chunk() {
            Some((length, rest)) => (u64::from_be_bytes(*length), rest),
            None => return Ok(None),
        },
        length => (u64::from(*length), rest),
    };
    if length > PAYLOAD_BYTES_MAX {
        return Err(FrameError::TooLong);
    }
    let length = usize::try_from(length).map_err(|_overflow| FrameError::TooLong)?;
    let opcode = first & !FINAL;
    if first & FINAL == 0 || opcode == OPCODE_CONTINUATION {
        return Err(FrameError::Fragmented);
    }
    let Some((payload, rest)) = rest.split_at_checked(length) else { return Ok(None) };
    let frame = match opcode {
        OPCODE_TEXT => Frame::Text(payload),
        OPCODE_BINARY => Frame::Binary(payload),
        OPCODE_CLOSE => Frame::Close(payload.first_chunk().map(|code| u16::from_be_bytes(*code))),
        OPCODE_PING => Frame::Ping(payload),
        OPCODE_PONG => Frame::Pong,
        _ => return Err(FrameError::Reserved),
    };
    Ok(Some((frame, rest)))
}

/// Appends a final frame's header in the shortest of the three length forms.
fn push_header(out: &mut Vec<u8>, opcode: u8, mask: u8, length: usize) {
    out.push(FINAL | opcode);
    if let Ok(short) = u8::try_from(length)
        && short < 126
    {
        out.push(mask | short);
    } else if let Ok(medium) = u16::try_from(length) {
        out.push(mask | 126);
        out.extend_from_slice(&medium.to_be_bytes());
    } else {
        out.push(mask | 127);
        out.extend_from_slice(&(length as u64).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `chunks` one after the other and returns each frame as its server bytes.
    fn frames_of<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Vec<u8>>, FrameError> {
        let mut reader = FrameReader::default();
        let mut frames = Vec::new();
        for chunk in chunks {
            reader.read(chunk, |frame| {
                frames.push(frame.to_server_bytes());
                Ok::<_, FrameError>(())
            })?;
        }
        assert!(reader.unfinished.is_empty(), "bytes are left over");
        assert_eq!(reader.unfinished.capacity(), 0, "an idle reader holds no memory");
        Ok(frames)
    }

    /// One frame for each length form and each edge between them, and each control frame.
    fn samples() -> Vec<Vec<u8>> {
        let long = vec![b'x'; 70_000];
        let mut samples: Vec<Vec<u8>> = [0, 1, 125, 126, 127, 65_535, 65_536, 70_000]
            .iter()
            .flat_map(|length| [Frame::Text(&long[..*length]), Frame::Binary(&long[..*length])])
            .map(Frame::to_server_bytes)
            .collect();
        samples.push(Frame::Ping(b"are you there").to_server_bytes());
        samples.push(Frame::Pong.to_server_bytes());
        samples.push(Frame::Close(None).to_server_bytes());
        samples
    }

    #[test]
    fn all_length_forms_are_read_in_one_piece() {
        let samples = samples();
        let stream = samples.concat();
        assert_eq!(frames_of([stream.as_slice()].into_iter()).unwrap(), samples);
        assert_eq!([samples[0].len(), samples[6].len(), samples[12].len()], [2, 130, 65_546]);
    }

    #[test]
    fn frames_are_read_however_the_bytes_are_cut() {
        let samples = samples();
        let stream = samples.concat();
        assert_eq!(frames_of(stream.chunks(7_001)).unwrap(), samples);
        let short = [&samples[3][..], &samples[6], &samples[16], &samples[17]].concat();
        let expected = [&samples[3], &samples[6], &samples[16], &samples[17]].map(Clone::clone);
        for size in 1..9 {
            assert_eq!(frames_of(short.chunks(size)).unwrap(), expected, "{size} bytes at a time");
        }
    }

    #[test]
    fn a_close_frame_gives_its_code() {
        let read = |bytes: &[u8]| {
            split_frame(bytes).map(|found| found.map(|(frame, _)| frame.into_close()))
        };
        assert_eq!(read(&[0x88, 0x02, 0x03, 0xf4]), Ok(Some(Some(1012))));
        assert_eq!(read(&[0x88, 0x00]), Ok(Some(None)));
        assert_eq!(read(&[0x88, 0x02, 0x03]), Ok(None), "not whole yet");
    }

    impl Frame<'_> {
        fn into_close(self) -> Option<u16> {
            match self {
                Frame::Close(code) => code,
                other => panic!("{other:?} is no close frame"),
            }
        }
    }

    #[test]
    fn what_a_server_must_not_send_is_named() {
        let error = |bytes: &[u8]| split_frame(bytes).unwrap_err();
        assert_eq!(error(&[0x81, 0x80, 0, 0, 0, 0]), FrameError::Masked);
        assert_eq!(error(&[0x01, 0x01, b'a']), FrameError::Fragmented);
        assert_eq!(error(&[0x80, 0x01, b'a']), FrameError::Fragmented);
        assert_eq!(error(&[0xc1, 0x01, b'a']), FrameError::Reserved);
        assert_eq!(error(&[0x83, 0x01, b'a']), FrameError::Reserved);
        assert_eq!(error(&[0x82, 127, 0xff, 0, 0, 0, 0, 0, 0, 0]), FrameError::TooLong);
    }

    #[test]
    fn a_clients_frame_is_masked_with_the_key_that_it_carries() {
        let mut out = b"before".to_vec();
        Frame::Text(b"hello").push_masked(&mut out);
        let [0x81, 0x85, a, b, c, d, masked @ ..] = &out[6..] else { panic!("{out:?}") };
        let key = [a, b, c, d];
        let text: Vec<u8> =
            masked.iter().enumerate().map(|(at, byte)| byte ^ key[at % 4]).collect();
        assert_eq!(text, b"hello");
    }

    #[test]
    fn a_pong_repeats_its_ping() {
        let mut out = Vec::new();
        push_pong(b"id", &mut out);
        let [0x8a, 0x82, a, b, _, _, first, second] = out[..] else { panic!("{out:?}") };
        assert_eq!([first ^ a, second ^ b], *b"id");
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut errors = 0;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..random.usize(..40)).map(|_| random.u8(..)).collect();
            let mut reader = FrameReader::default();
            let read = reader.read(&bytes, |_frame| Ok::<_, FrameError>(()));
            errors += u32::from(read.is_err());
        }
        assert!(errors > 10_000, "most random bytes are no frames: {errors}");
    }
}
