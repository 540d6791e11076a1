//! Features of an interface in the calling thread's network namespace, by name (`linux/ethtool.h`).
use std::io;

use crate::linux;

/// All features: name, and whether it is on.
pub fn get(interface: &str) -> io::Result<Vec<(String, bool)>> {
    let names = names(interface)?;
    let words = words(&names);
    // { available, requested, active, never changed } for each word.
    let mut request = vec![0; 2 + 4 * words];
    (request[0], request[1]) = (GFEATURES, words as u32);
    linux::ethtool(interface, &mut request)?;
    let active = |bit: usize| request[2 + bit / 32 * 4 + 2] >> (bit % 32) & 1 == 1;
    let all = names.into_iter().enumerate().map(|(bit, name)| (name, active(bit)));
    Ok(all.filter(|(name, _)| !name.is_empty()).collect())
}

/// Switches those for which `wanted` says so.
///
/// What the driver can't do stays as it is, and is no error.
pub fn set(interface: &str, wanted: impl Fn(&str) -> Option<bool>) -> io::Result<()> {
    let names = names(interface)?;
    let words = words(&names);
    // { valid, requested } for each word.
    let mut request = vec![0; 2 + 2 * words];
    (request[0], request[1]) = (SFEATURES, words as u32);
    for (bit, name) in names.iter().enumerate() {
        if let Some(on) = wanted(name) {
            let word = 2 + bit / 32 * 2;
            request[word] |= 1 << (bit % 32);
            request[word + 1] |= u32::from(on) << (bit % 32);
        }
    }
    linux::ethtool(interface, &mut request)
}

/// The features' names by their bits; some are empty.
fn names(interface: &str) -> io::Result<Vec<String>> {
    let mut request = vec![0; 3 + MOST * STRING / 4];
    // A length of zero asks for all; since Linux 6.17 any other has to be the right one.
    request[..3].copy_from_slice(&[GSTRINGS, SS_FEATURES, 0]);
    linux::ethtool(interface, &mut request)?;
    let bytes: Vec<u8> = request[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name = |string: &[u8]| {
        let text = string.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    };
    Ok(bytes.chunks_exact(STRING).take(request[2] as usize).map(name).collect())
}

fn words(names: &[String]) -> usize {
    names.len().div_ceil(32)
}

const GSTRINGS: u32 = 0x1b;
const GFEATURES: u32 = 0x3a;
const SFEATURES: u32 = 0x3b;
/// The set of strings that names the features.
const SS_FEATURES: u32 = 4;
/// Bytes of a name.
const STRING: usize = 32;
/// Room for so many names; Linux 6.18 has 64.
const MOST: usize = 256;
