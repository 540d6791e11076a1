//! Underlay UDP sockets.
