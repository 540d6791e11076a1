//! What comes through the local socket: whoever may open it is root, and may err.

use prost::Message;
use weft::cni::request;
use weft_proto::local;

/// The first byte says which request it is.
pub fn run(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 4 {
        0 => _ = local::ReserveRequest::decode(bytes).map(request::wish),
        1 => _ = local::ActivateRequest::decode(bytes).map(|asked| request::attachment(asked.attachment)),
        2 => _ = local::ReleaseRequest::decode(bytes).map(|asked| request::attachment(asked.attachment)),
        _ => _ = local::CheckRequest::decode(bytes).map(|asked| request::attachment(asked.attachment)),
    }
}
