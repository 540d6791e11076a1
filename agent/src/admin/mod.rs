//! Readiness, metrics and the local API of the command line.
