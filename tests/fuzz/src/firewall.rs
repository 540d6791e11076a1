//! What `nft -j list` prints, which shows other programs' tables too.

use weft::links::Firewall;

/// Two listings, as the agent reads several into one, with a line of dashes between them.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut firewall = Firewall::default();
    for listing in text.split("\n---\n") {
        let _ = firewall.read(listing);
    }
}
