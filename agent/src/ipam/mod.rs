//! Who owns which address.
pub mod ring;
pub mod seed;
pub mod span;
pub mod token;
