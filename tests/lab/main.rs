//! The lab itself: that it works without agents, and that it leaves nothing. Needs root.
mod cleanup;
mod keeper;
mod network;
