//! Reads the configuration from stdin: at most 1 MiB, and not for ever.

use crate::failure::{Failure, code};
use serde::Deserialize;
use serde_json::Value;
use std::{
    io::{self, Read},
    sync::mpsc,
    thread,
    time::Duration,
};

/// The configuration as JSON, read to the end of stdin.
///
/// # Errors
/// Code 5 if it can't be read, is too long, or does not end in time; code 6 if it is not one JSON document.
pub fn document(deadline: Duration) -> Result<Value, Failure> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = Vec::new();
        let read = io::stdin().take(LIMIT + 1).read_to_end(&mut text);
        // Nobody listens any more once the deadline has passed.
        let _ = sender.send(read.map(|_| text));
    });
    let unreadable =
        |why: String| Failure::new(code::IO, format!("can't read the configuration from stdin: {why}"));
    let text = receiver
        .recv_timeout(deadline)
        .map_err(|_| unreadable(format!("it was not closed within {deadline:?}")))?
        .map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > LIMIT {
        return Err(unreadable(format!("it is longer than {LIMIT} bytes")));
    }
    serde_json::from_slice(&text).map_err(undecodable)
}

/// The first JSON document on stdin, and not a byte beyond it; none if stdin is empty.
///
/// # Errors
/// Code 6 if it is not JSON.
pub fn first_document() -> Result<Option<Value>, Failure> {
    let limited = io::stdin().take(LIMIT);
    match Value::deserialize(&mut serde_json::Deserializer::from_reader(limited)) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_eof() && (error.line(), error.column()) <= (1, 0) => Ok(None),
        Err(error) => Err(undecodable(error)),
    }
}

fn undecodable(error: serde_json::Error) -> Failure {
    Failure::new(code::DECODE, format!("the configuration on stdin is not JSON: {error}"))
}

/// Bytes; no runtime's configuration comes near it.
const LIMIT: u64 = 1 << 20;
