//! Moving packets: TUN to UDP and back.
