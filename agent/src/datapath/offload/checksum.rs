//! The Internet checksum (RFC 1071).
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// A ones' complement sum that can go on. Its parts must begin at even offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes; an odd last one counts as if a zero followed.
    pub fn over(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // Sums of 32-bit words in 64 bits overflow after 2^32 of them; the compiler makes vectors of this.
        let sum = words.iter().fold(self.0, |sum, word| sum + u64::from(u32::from_be_bytes(*word)));
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        Self(sum + u64::from(u32::from_be_bytes(last)))
    }

    pub fn and(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The sum in 16 bits, not complemented: what a partial checksum field holds.
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// What a checksum field holds.
    pub fn checksum(self) -> u16 {
        !self.fold()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rfcs_example_sums_up() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().over(&bytes).fold(), 0xddf2);
    }

    proptest! {
        #[test]
        fn it_is_the_sum_of_words_with_the_carry_around(bytes: Vec<u8>, first: u16) {
            let mut sum = u32::from(first);
            for pair in bytes.chunks(2) {
                sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
                sum = (sum & 0xffff) + (sum >> 16);
            }
            prop_assert_eq!(u32::from(Sum::default().and(first).over(&bytes).fold()), sum);
        }
    }
}
