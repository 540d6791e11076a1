//! The command line beside the daemon: status, peers, ipam, pods, report, reset.
