//! Who owns which address.
