//! Attach, detach, check and collect pods, as the shim asks for it.
