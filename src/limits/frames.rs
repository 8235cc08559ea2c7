//! Where frames and messages begin and end in the bytes that a client sends (RFC 6455).
//!
//! Invariant: no input panics; the bytes are counted alike however they are cut.

/// The frames and messages that some bytes have begun and ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct FrameCount {
    /// Frames whose header has begun.
    pub(super) frames: usize,
    /// Whether a message has ended.
    pub(super) has_ended: bool,
}

/// Where frames and messages begin and end in what a client sends. Whether they are right is for
/// the library to say, which reads the same bytes.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// Of the frame's header, read and in all; equal between two frames and in a payload.
    header_read: u8,
    header_length: u8,
    /// Where the header goes on behind the length.
    mask_at: u8,
    /// FIN and opcode.
    first: u8,
    /// Bytes of the payload that are still to come.
    left: u64,
    /// A message has begun and not ended.
    pub(super) is_open: bool,
}

impl Frames {
    /// Source: RFC 6455, section 5.2.
    pub(super) fn count(&mut self, mut bytes: &[u8]) -> FrameCount {
        let mut counted = FrameCount::default();
        while let Some((&byte, rest)) = bytes.split_first() {
            if self.header_read == self.header_length && self.left > 0 {
                let skipped =
                    usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
                bytes = bytes.get(skipped..).unwrap_or_default();
                self.left -= skipped as u64;
            } else {
                bytes = rest;
                self.read_header(byte, &mut counted);
            }
            let is_whole = self.header_read == self.header_length && self.left == 0;
            if is_whole && self.is_data() && self.first & 0x80 != 0 {
                self.is_open = false;
                counted.has_ended = true;
            }
        }
        counted
    }

    fn read_header(&mut self, byte: u8, counted: &mut FrameCount) {
        if self.header_read == self.header_length {
            (self.header_read, self.header_length) = (0, 2);
        }
        match self.header_read {
            0 => {
                self.first = byte;
                counted.frames += 1;
                self.is_open |= self.is_data();
            }
            1 => {
                let (length, more) = match byte & 0x7f {
                    126 => (0, 2),
                    127 => (0, 8),
                    length => (u64::from(length), 0),
                };
                self.left = length;
                self.header_length += more + if byte & 0x80 != 0 { 4 } else { 0 };
                self.mask_at = 2 + more;
            }
            at if at < self.mask_at => self.left = self.left << 8 | u64::from(byte),
            _ => {}
        }
        self.header_read += 1;
    }

    /// Pings, pongs and closes may stand between the frames of a message.
    fn is_data(&self) -> bool {
        self.first & 0x08 == 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A frame of a client: FIN and opcode as given.
    pub(in crate::limits) fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut frame = vec![first];
        match length {
            ..126 => frame.push(0x80 | u8::try_from(length).unwrap()),
            126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([0x7f; 4]);
        frame.resize(frame.len() + length, 0x81);
        frame
    }

    pub(in crate::limits) const TEXT: u8 = 0x81;
    pub(in crate::limits) const TEXT_BEGINS: u8 = 0x01;
    pub(in crate::limits) const GOES_ON: u8 = 0x00;
    pub(in crate::limits) const ENDS: u8 = 0x80;
    pub(in crate::limits) const PING: u8 = 0x89;

    #[test]
    fn a_message_is_open_from_its_first_byte_to_its_last() {
        for (bytes, count, is_open, has_ended) in [
            (vec![], 0, false, false),
            (frame(TEXT, 0), 1, false, true),
            (frame(TEXT, 5)[..1].to_vec(), 1, true, false),
            (frame(TEXT, 5)[..10].to_vec(), 1, true, false),
            (frame(TEXT, 5), 1, false, true),
            (frame(TEXT, 126), 1, false, true),
            (frame(TEXT, 65_535), 1, false, true),
            (frame(TEXT, 65_536), 1, false, true),
            (frame(TEXT, 65_536)[..65_549].to_vec(), 1, true, false),
            (frame(PING, 125), 1, false, false),
            (frame(PING, 0)[..3].to_vec(), 1, false, false),
            ([frame(TEXT_BEGINS, 3), frame(GOES_ON, 0), frame(PING, 4)].concat(), 3, true, false),
            ([frame(TEXT_BEGINS, 3), frame(PING, 0), frame(ENDS, 0)].concat(), 3, false, true),
            ([frame(TEXT, 3), frame(TEXT, 9)[..2].to_vec()].concat(), 2, true, true),
        ] {
            let mut frames = Frames::default();
            let counted = frames.count(&bytes);
            assert_eq!(counted, FrameCount { frames: count, has_ended }, "{bytes:?}");
            assert_eq!(frames.is_open, is_open, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn frames_are_counted_alike_however_their_bytes_arrive(
            parts in prop::collection::vec((any::<u8>(), 0_usize..300), 0..20),
            cuts in prop::collection::vec(1_usize..40, 1..200),
        ) {
            let bytes: Vec<u8> = parts.iter().flat_map(|(first, length)| frame(*first, *length)).collect();
            let mut whole = Frames::default();
            let all = whole.count(&bytes).frames;
            prop_assert_eq!(all, parts.len());
            let (mut cut, mut rest, mut count) = (Frames::default(), &bytes[..], 0);
            for length in cuts.into_iter().chain([usize::MAX]) {
                let (part, left) = rest.split_at(length.min(rest.len()));
                count += cut.count(part).frames;
                rest = left;
            }
            prop_assert_eq!((count, cut.is_open), (all, whole.is_open));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            Frames::default().count(&bytes);
        }
    }
}
