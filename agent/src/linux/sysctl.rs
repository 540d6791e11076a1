//! Network sysctls.
