//! The TUN device and its queues.
