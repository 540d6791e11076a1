//! Words as text, of flags, of files and of interfaces' aliases: what is read is said the same way.

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};
use weft::{
    cni::tombstone,
    types::{AttachmentKey, Endpoint, Mac, PeerAddress, PeerName, Universe, VethAlias},
};

/// All are asked about each text.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    said::<PeerName>(text);
    said::<PeerAddress>(text);
    said::<Endpoint>(text);
    said::<Universe>(text);
    if let Some(mac) = said::<Mac>(text) {
        assert_eq!(mac.to_string(), text.to_ascii_lowercase(), "a MAC has one spelling");
    }
    if let Ok(alias) = text.parse::<VethAlias>() {
        // White space in a name was not ours.
        said::<VethAlias>(&alias.to_string()).expect("we read our own");
    }
    if let Some((name, body)) = text.split_once('\n') {
        let found = tombstone::parse(name, body);
        assert!(found.is_none_or(|key| tombstone::file_name(&key) == name));
    }
    if let Some((id, ifname)) = text.split_once('/')
        && let Ok(key) = AttachmentKey::new(id, ifname)
    {
        assert!(key.host_interface().len() <= 15);
        assert_eq!(said::<Mac>(&key.pod_mac().to_string()), Some(key.pod_mac()));
    }
}

fn said<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T> {
    let word: T = text.parse().ok()?;
    assert_eq!(word.to_string().parse().ok().as_ref(), Some(&word), "{text:?} and {:?}", word.to_string());
    Some(word)
}
