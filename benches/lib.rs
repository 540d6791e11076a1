//! Benches of the pure parts: `cargo bench -p weft-benches`.
